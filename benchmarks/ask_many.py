"""Times several questions about one picture, and one question about several pictures, batched and one after another:
`python benchmarks/ask_many.py [--model NAME|DIR]`.

Both are measured in turn, in one process. The picture of several questions is cached, several pictures are not. Prints
the median time of all answers, which have up to `--tokens` tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Literal

import click
from PIL import Image

from llava_edge import Llava
from llava_edge.export.samples import held_out, pictures
from llava_edge.options import EngineOptions, Options, Result, result_of
from llava_edge.runtimes.jobs import Stream
from llava_edge.store import DEFAULT_MODEL

QUESTIONS = (
    "Describe the picture in detail.",
    "What is in the picture?",
    "What colours are there?",
    "What would you use this for?",
    "Write a product description for this.",
    "Where could this have been taken?",
    "Which category does this belong to?",
    "What is this?",
)


@click.command()
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--image", "images", multiple=True, metavar="FILE", help="To be asked about, up to 8; else drawn ones.")
@click.option("--threads", default=0, help="0 is one per physical core.")
@click.option("--context", default=0, help="0 is the model's, at most 4096.")
@click.option("--repeats", default=3, show_default=True)
@click.option("--tokens", default=48, show_default=True, help="Of an answer, at most.")
@click.option("--count", "counts", type=click.IntRange(1, 8), multiple=True, default=(2, 4, 8), show_default=True)
def main(
    model: str, images: Sequence[str], threads: int, context: int, repeats: int, tokens: int, counts: Sequence[int]
) -> None:
    """Print a line for each number of questions, and of pictures."""
    options = Options(max_tokens=tokens, speculate="off")
    shown: list[str | Image.Image] = [*images] if images else [*pictures(), *held_out()]

    def load(cache: Literal[False, "memory"]) -> Llava:
        return Llava.load(model, EngineOptions(device="cpu", threads=threads, context=context, cache=cache))

    print("what        count  tokens  batched s  single s  ratio  equal answers")
    with load("memory") as llava:
        for count in counts:
            single = [partial(llava.ask, question, shown[0], options) for question in QUESTIONS[:count]]
            compare("questions", repeats, partial(llava.ask_many, QUESTIONS[:count], shown[0], options), single)
    with load(False) as llava:
        for count in counts:
            single = [partial(llava.ask, QUESTIONS[0], image, options) for image in shown[:count]]
            compare("pictures", repeats, partial(llava.ask_each, shown[:count], QUESTIONS[0], options), single)


def compare(
    what: str, repeats: int, batched: Callable[[], Iterable[Stream]], single: Sequence[Callable[[], Result]]
) -> None:
    """Measure both in turn and print a line."""
    seconds: list[tuple[float, float]] = []
    for _ in range(repeats + 1):  # the first warms up
        start = time.perf_counter()
        found = [result_of(stream) for stream in batched()]
        middle = time.perf_counter()
        expected = [ask() for ask in single]
        seconds.append((middle - start, time.perf_counter() - middle))
    batched_s, single_s = (statistics.median(column) for column in zip(*seconds[1:], strict=True))
    equal = sum(a.text == b.text for a, b in zip(found, expected, strict=True))
    total = sum(result.completion_tokens for result in expected)
    count, ratio = len(found), single_s / batched_s
    print(f"{what:9} {count:7} {total:7} {batched_s:10.2f} {single_s:9.2f} {ratio:6.2f}  {equal} of {count}")


if __name__ == "__main__":
    main()
