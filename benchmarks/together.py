"""What answering several questions in the same passes is worth: `python benchmarks/together.py [--model NAME|DIR]`.

The same questions about one picture, together and one after another, in turns, in one process that knows the picture:
prints the median time of all answers. Answers have `--tokens` tokens, if the model does not end them before.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import click

from llava_edge import Llava
from llava_edge.export.samples import pictures
from llava_edge.options import EngineOptions, Options, result_of
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
@click.option("--threads", default=0, help="0 is one per physical core.")
@click.option("--repeats", default=3, show_default=True)
@click.option("--tokens", default=48, show_default=True, help="Of an answer, at most.")
@click.option("--questions", type=click.IntRange(1, 8), multiple=True, default=(2, 4, 8), show_default=True)
def main(model: str, threads: int, repeats: int, tokens: int, questions: Sequence[int]) -> None:
    """Print a line for each number of questions."""
    options = Options(max_tokens=tokens, speculate="off")
    image = pictures()[0]
    with Llava.load(model, EngineOptions(device="cpu", threads=threads, cache="memory")) as llava:
        llava.ask(QUESTIONS[0], image, options)
        print("questions  tokens  together s  apart s  ratio  equal answers")
        for count in questions:
            asked = QUESTIONS[:count]
            seconds: list[tuple[float, float]] = []
            for _ in range(repeats):
                start = time.perf_counter()
                together = [result_of(stream) for stream in llava.ask_many(asked, image, options)]
                middle = time.perf_counter()
                apart = [llava.ask(question, image, options) for question in asked]
                seconds.append((middle - start, time.perf_counter() - middle))
            one, other = (statistics.median(column) for column in zip(*seconds, strict=True))
            equal = sum(a.text == b.text for a, b in zip(together, apart, strict=True))
            total = sum(result.completion_tokens for result in apart)
            print(f"{count:9} {total:7} {one:11.2f} {other:8.2f} {other / one:6.2f}  {equal} of {count}")


if __name__ == "__main__":
    main()
