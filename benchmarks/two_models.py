"""What it is worth that models compute in one thread: `python benchmarks/two_models.py [--model NAME|DIR]`.

Prints the median tokens per second of a model alone, of one that takes turns with another, and of one that does so if
each computes in a thread of its own (`runtimes/compute.py` says why they do not).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from statistics import median

import click

from llava_edge import Llava
from llava_edge.options import EngineOptions, Options
from llava_edge.runtimes import compute
from llava_edge.runtimes.jobs import Worker
from llava_edge.store import DEFAULT_MODEL

QUESTION = "Write the alphabet three times, the letters separated by commas."


@click.command()
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--threads", default=0, help="0 is one per physical core.")
@click.option("--repeats", default=5, show_default=True)
@click.option("--tokens", default=60, show_default=True, help="Of an answer, at most.")
def main(model: str, threads: int, repeats: int, tokens: int) -> None:
    """Print a line for each way; the models are loaded anew for each repetition, in turns."""
    engine, options = EngineOptions(device="cpu", threads=threads, cache=False), Options(tokens, speculate="off")
    ways: dict[str, tuple[int, Callable[[], Worker]]] = {
        "alone": (1, compute.shared_worker),
        "two, one thread": (2, compute.shared_worker),
        "two, a thread each": (2, lambda: Worker("llama.cpp")),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, (count, compute.shared_worker) in ways.items():
            with ExitStack() as stack:
                models = [stack.enter_context(Llava.load(model, engine)) for _ in range(count)]
                answers = [[one.ask(QUESTION, options=options) for one in models] for _ in range(3)]
            rates[name] += [found.timings.decode_tokens_per_s for found, *_ in answers[1:]]
    for name, found in rates.items():
        print(f"{name:20} {median(found):6.1f} tokens/s ({min(found):.1f} to {max(found):.1f})")


if __name__ == "__main__":
    main()
