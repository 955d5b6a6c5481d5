"""What guessing tokens is worth: `python benchmarks/speculation.py [--model NAME|DIR]`.

Asks for answers that quote or list, each with and without guesses in turn, and prints the median time of the tokens
after the first. Answers have to be the same. `--cost` prints instead what a batch costs in single tokens, behind each
number of positions, and whether it gives their bits.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Sequence

import click
import numpy as np

from llava_edge import Llava
from llava_edge.bundle import LANGUAGE, Bundle
from llava_edge.options import EngineOptions, Options, Result, Speculate
from llava_edge.runtimes.devices import thread_count
from llava_edge.runtimes.language import LanguageModel
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
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--threads", default=0, help="0 is one per physical core.")
@click.option("--repeats", default=3, show_default=True)
@click.option("--cost", is_flag=True, help="Print what a batch costs.")
@click.option("--positions", type=int, multiple=True, default=(64, 600), show_default=True)
def main(model: str, threads: int, repeats: int, cost: bool, positions: Sequence[int]) -> None:
    """Print one of the two tables."""
    if cost:
        _cost(model, threads, repeats, positions)
    else:
        _answers(model, threads, repeats)


def _answers(model: str, threads: int, repeats: int) -> None:
    ratios = []
    with Llava.load(model, EngineOptions(device="cpu", threads=threads)) as llava:
        print("tokens  guessed  right  plain ms  guessed ms  ratio  question")
        for question in QUESTIONS:
            pairs = [(_ask(llava, question, "off"), _ask(llava, question, "auto")) for _ in range(repeats)]
            plain, guessed = pairs[-1]
            if any(one.text != other.text for one, other in pairs):
                raise SystemExit(f"Guessing changed the answer to {question!r}.")
            ratios.append(statistics.median(one.timings.decode_ms / max(other.timings.decode_ms, 1e-3)
                                            for one, other in pairs))  # fmt: skip
            print(
                f"{plain.completion_tokens:6} {guessed.drafted_tokens:8} {guessed.accepted_tokens:6} "
                f"{plain.timings.decode_ms:9.0f} {guessed.timings.decode_ms:11.0f} {ratios[-1]:6.2f}  {question[:60]}"
            )
    print(f"median ratio {statistics.median(ratios):.2f}")


def _ask(llava: Llava, question: str, speculate: Speculate) -> Result:
    return llava.ask(question, options=Options(max_tokens=120, speculate=speculate))


def _cost(model: str, threads: int, repeats: int, positions: Sequence[int]) -> None:
    path = Bundle.open(resolve(model)).part(LANGUAGE)
    language = LanguageModel(path, context=max(positions) + WIDTHS[-1], threads=threads or thread_count()[0])
    never = threading.Event()
    tokens = [int(token) for token in np.random.default_rng(0).integers(300, language.vocab_size, WIDTHS[-1])]
    print("positions  batch      ms  singles  same bits")
    for start in positions:
        language.forget(0)
        language.evaluate_tokens([7] * start, never)
        single = [language.evaluate_all([token], never)[0] for token in tokens]
        times: dict[int, list[float]] = {width: [] for width in WIDTHS}
        same = dict.fromkeys(WIDTHS, 0)
        for _ in range(repeats):
            for width in WIDTHS:
                language.forget(start)
                begin = time.perf_counter()
                rows = language.evaluate_all(tokens[:width], never)
                times[width].append(time.perf_counter() - begin)
                same[width] = sum(np.array_equal(*pair) for pair in zip(rows, single, strict=False))
        one = statistics.median(times[1])
        for width in WIDTHS:
            median = statistics.median(times[width])
            print(f"{start:9} {width:6} {median * 1000:7.1f} {median / one:8.2f}  {same[width]} of {width} rows")
    language.close()


if __name__ == "__main__":
    main()
