"""Measures the shared compute thread of two models: `python benchmarks/two_models.py [--model NAME|DIR]`.

Prints the median tokens per second of a model alone, of one that takes turns with another, and of one that does so with
a compute thread per model (`runtimes/compute.py` says why they share one).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from statistics import median

import click

from llava_edge import Llava
from llava_edge.options import EngineOptions, Options
from llava_edge.runtimes import compute
from llava_edge.runtimes.worker import Worker
from llava_edge.store import DEFAULT_MODEL

QUESTION = "Write the alphabet three times, the letters separated by commas."


@click.command()
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--threads", default=0, help="0 is one per physical core.")
@click.option("--repeats", default=5, show_default=True)
@click.option("--tokens", default=60, show_default=True, help="Of an answer, at most.")
def main(model: str, threads: int, repeats: int, tokens: int) -> None:
    """Print a line for each variant; the models are reloaded for each repetition, in interleaved rounds."""
    engine, options = EngineOptions(device="cpu", threads=threads, cache=False), Options(tokens, speculate="off")
    variants: dict[str, tuple[int, Callable[[], Worker]]] = {
        "alone": (1, compute.shared_worker),
        "two, one thread": (2, compute.shared_worker),
        "two, a thread each": (2, lambda: Worker("llama.cpp")),
    }
    rates: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, (count, worker) in variants.items():
            compute.shared_worker = worker  # also within the models that are loaded next
            with ExitStack() as stack:
                models = [stack.enter_context(Llava.load(model, engine)) for _ in range(count)]
                answers = [[llava.ask(QUESTION, options=options) for llava in models] for _ in range(3)]
            rates[name] += [first.timings.decode_tokens_per_s for first, *_ in answers[1:]]
    for name, values in rates.items():
        print(f"{name:20} {median(values):6.1f} tokens/s ({min(values):.1f} to {max(values):.1f})")


if __name__ == "__main__":
    main()
