"""Tokens per second after a prompt: our decode loop beside the plainest loop over llama.cpp.

    python benchmarks/decode.py BUNDLE [--threads N] [--positions N] [--tokens N] [--repeats N]

Both evaluate the same prompt, then decode greedily, from the same file with the same threads and context. Theirs is
llama_decode and llama.cpp's greedy sampler alone; ours is what `llava-edge run` uses, including text and end tokens.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from interleave import report, run_persistent, serve

from llava_edge.bundle import LANGUAGE

CONTEXT = 2048


def prompt(arguments: argparse.Namespace) -> list[int]:
    """Return token ids that every vocabulary has and that are not control tokens."""
    return [300 + 7 * i % 400 for i in range(arguments.positions)]


def ours(arguments: argparse.Namespace) -> Callable[[], dict[str, Any]]:
    from llava_edge.options import Options
    from llava_edge.runtimes.decoding import Answer, decode
    from llava_edge.runtimes.jobs import Job
    from llava_edge.runtimes.language import LanguageModel
    from llava_edge.runtimes.sampling import Sampler
    from llava_edge.runtimes.speculation import Speculation
    from llava_edge.runtimes.stats import RequestStats
    from llava_edge.runtimes.text import TextStream

    repack = not arguments.mapped
    model = LanguageModel(arguments.bundle / LANGUAGE, context=CONTEXT, threads=arguments.threads, repack=repack)
    speculation, options = Speculation(model), Options(speculate="off")
    clock = time.process_time if arguments.processor_time else time.monotonic

    def work() -> dict[str, Any]:
        model.keep_common_prefix([])
        model.evaluate_tokens(prompt(arguments))
        stats = RequestStats(time.monotonic())
        job = Job(lambda job: None, threading.Event(), lambda: True)
        answer = Answer(model, set(), TextStream(()), arguments.tokens, stats, job)
        start = clock()
        with closing(Sampler(model, options)) as sampler:
            decode(answer, options, sampler, speculation, lambda: False)
        return _rate(stats.tokens - 1, clock() - start)

    return work


def theirs(arguments: argparse.Namespace) -> Callable[[], dict[str, Any]]:
    import ctypes

    from llama_cpp import llama_cpp as api

    api.llama_backend_init()
    clock = time.process_time if arguments.processor_time else time.monotonic
    model_settings = api.llama_model_default_params()
    model_settings.use_extra_bufts = not arguments.mapped
    model = api.llama_model_load_from_file(str(arguments.bundle / LANGUAGE).encode(), model_settings)
    settings = api.llama_context_default_params()
    settings.n_ctx, settings.n_threads, settings.n_threads_batch = CONTEXT, arguments.threads, arguments.threads
    context = api.llama_init_from_model(model, settings)
    sampler, vocabulary = api.llama_sampler_init_greedy(), api.llama_model_get_vocab(model)

    def evaluate(tokens: list[int]) -> int:
        """Append tokens; return the most likely next one."""
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        if api.llama_decode(context, api.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama_decode failed")
        return int(api.llama_sampler_sample(sampler, context, -1))

    def work() -> dict[str, Any]:
        api.llama_memory_clear(api.llama_get_memory(context), True)
        token, count = evaluate(prompt(arguments)), 0
        start = clock()
        while count < arguments.tokens - 1 and not api.llama_vocab_is_eog(vocabulary, token):
            token = evaluate([token])
            count += 1
        return _rate(count, clock() - start)

    return work


def _rate(count: int, seconds: float) -> dict[str, Any]:
    return {"tokens_per_s": count / seconds if count > 0 else 0.0, "tokens": count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--positions", type=int, default=64, help="of the prompt")
    parser.add_argument("--tokens", type=int, default=48, help="of the answer")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--mapped", action="store_true", help="do not repack weights, in either")
    parser.add_argument("--processor-time", action="store_true", help="for a busy machine; with one thread")
    parser.add_argument("--worker", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        serve((ours if arguments.worker == "ours" else theirs)(arguments))
        return
    command = [sys.executable, *sys.argv, "--worker"]
    peers = {"llava-edge": [*command, "ours"], "llama.cpp": [*command, "theirs"]}
    report(run_persistent(peers, arguments.repeats), "llava-edge", "tokens_per_s", more_is_better=True)


if __name__ == "__main__":
    main()
