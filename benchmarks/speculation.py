"""Measures speculative decoding: `python benchmarks/speculation.py [--model NAME|DIR] [IMAGE...]`.

Asks for answers that quote or list, or `--prompt` about each image, with and without speculation in turn, and prints
the median time of the tokens after the first. Answers must be the same. `--draft` adds a draft model. `--cost` instead
prints what a batch costs in single tokens after each number of positions, and whether its bits equal theirs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np

from llava_edge import Llava
from llava_edge.bundle import LANGUAGE, Bundle
from llava_edge.options import DEFAULT_PROMPT, EngineOptions, Options, Result, Speculate
from llava_edge.runtimes.language import LanguageModel
from llava_edge.runtimes.machine import thread_count
from llava_edge.store import DEFAULT_MODEL, resolve

PASSAGES = (
    "The harbour opens at seven in the morning. Boats over ten metres must report to the office before they leave. "
    "No fishing is allowed near the red buoys.",
    "Wash the rice until the water stays clear. Add one and a half cups of water, bring it to a boil, and let it rest "
    "under the lid for twelve minutes.",
    "Invoice 20417 of 3 March: two office chairs at 149.90 each, one desk lamp at 38.50, delivery 12.00. "
    "Payable within thirty days.",
    "The museum keeps four hundred clocks. The oldest was made in Augsburg in 1571 and still strikes the hour; the "
    "largest came from a railway station.",
)
QUOTE = 'Repeat this text word for word: "{}"'
LISTS = (
    "List the days of the week, then list them again.",
    "Write the sentence 'The quick brown fox jumps over the lazy dog.' five times.",
    "Write the alphabet three times, the letters separated by commas.",
    "Write the months of the year in order, three times.",
)
QUESTIONS = [*(QUOTE.format(passage) for passage in PASSAGES), *LISTS]
WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16)


@click.command()
@click.argument("images", nargs=-1, type=Path)
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--threads", default=0, help="0 is one per physical core.")
@click.option("--repeats", default=3, show_default=True)
@click.option("--draft", type=Path, help="GGUF file of a small model with the same vocabulary.")
@click.option("--prompt", default=DEFAULT_PROMPT, show_default=True, help="What is asked about each image.")
@click.option("--cost", is_flag=True, help="Print what a batch costs.")
@click.option("--positions", type=int, multiple=True, default=(64, 600), show_default=True)
def main(
    images: Sequence[Path],
    model: str,
    threads: int,
    repeats: int,
    draft: Path | None,
    prompt: str,
    cost: bool,
    positions: Sequence[int],
) -> None:
    """Print one of the two tables."""
    if cost:
        _cost(model, threads, repeats, positions)
        return
    with Llava.load(model, EngineOptions(device="cpu", threads=threads, draft=draft)) as llava:
        _answers(llava, repeats, [(prompt, [image]) for image in images] or [(text, []) for text in QUESTIONS])


def _answers(llava: Llava, repeats: int, questions: Sequence[tuple[str, list[Path]]]) -> None:
    ratios, totals = [], np.zeros(2)
    print("tokens  drafted  accepted  plain ms  speculative ms  ratio  question")
    for text, images in questions:
        pairs = [[_ask(llava, text, images, mode) for mode in ("off", "auto")] for _ in range(repeats)]
        plain, speculative = pairs[-1]
        if any(first.text != second.text for first, second in pairs):
            raise SystemExit(f"Speculation changed the answer to {text!r}.")
        times = [[max(result.timings.decode_ms, 1e-3) for result in pair] for pair in pairs]
        ratios.append(statistics.median(first / second for first, second in times))
        medians = np.median(times, axis=0)
        totals += medians
        print(
            f"{plain.completion_tokens:6} {speculative.drafted_tokens:8} {speculative.accepted_tokens:9} "
            f"{medians[0]:9.0f} {medians[1]:15.0f} {ratios[-1]:6.2f}  {images[0].name if images else text[:60]}"
        )
    print(f"all {totals[0]:30.0f} {totals[1]:15.0f} {statistics.median(ratios):6.2f}  (median ratio)")


def _ask(llava: Llava, question: str, images: Sequence[Path], speculate: Speculate) -> Result:
    return llava.ask(question, images, Options(max_tokens=120, speculate=speculate))


def _cost(model: str, threads: int, repeats: int, positions: Sequence[int]) -> None:
    path = Bundle.open(resolve(model)).part(LANGUAGE)
    language = LanguageModel(path, context=max(positions) + WIDTHS[-1], threads=threads or thread_count()[0])
    tokens = [int(token) for token in np.random.default_rng(0).integers(300, language.vocabulary.size, WIDTHS[-1])]
    print("positions  batch      ms  singles  same bits")
    for start in positions:
        language.truncate(0)
        language.evaluate_tokens([7] * start)
        single = [language.evaluate_all_logits([token])[0] for token in tokens]
        times: dict[int, list[float]] = {width: [] for width in WIDTHS}
        same = dict.fromkeys(WIDTHS, 0)
        for _ in range(repeats):
            for width in WIDTHS:
                language.truncate(start)
                begin = time.perf_counter()
                rows = language.evaluate_all_logits(tokens[:width])
                times[width].append(time.perf_counter() - begin)
                same[width] = sum(np.array_equal(*pair) for pair in zip(rows, single, strict=False))
        single_time = statistics.median(times[1])
        for width in WIDTHS:
            median = statistics.median(times[width])
            print(
                f"{start:9} {width:6} {median * 1000:7.1f} {median / single_time:8.2f}  {same[width]} of {width} rows"
            )
    language.close()


if __name__ == "__main__":
    main()
