"""Times several questions about one picture, batched and one after another:
`python benchmarks/ask_many.py [--model NAME|DIR]`.

Both are measured in turn, in one process in which the picture is cached. Prints the median time of all answers. Answers
have up to `--tokens` tokens.
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
        print("questions  tokens  batched s  single s  ratio  equal answers")
        for count in questions:
            prompts = QUESTIONS[:count]
            seconds: list[tuple[float, float]] = []
            for _ in range(repeats):
                start = time.perf_counter()
                batched = [result_of(stream) for stream in llava.ask_many(prompts, image, options)]
                middle = time.perf_counter()
                single = [llava.ask(question, image, options) for question in prompts]
                seconds.append((middle - start, time.perf_counter() - middle))
            batched_s, single_s = (statistics.median(column) for column in zip(*seconds, strict=True))
            equal = sum(a.text == b.text for a, b in zip(batched, single, strict=True))
            total = sum(result.completion_tokens for result in single)
            print(
                f"{count:9} {total:7} {batched_s:10.2f} {single_s:9.2f} {single_s / batched_s:6.2f}  {equal} of {count}"
            )


if __name__ == "__main__":
    main()
