"""Prefill, decoding and memory of one language model: llama.cpp's kernels, on mapped and re-ordered weights, and ours.

    python benchmarks/native.py my-bundle/language.gguf --positions 600 --rounds 5

Each measurement has a fresh process; the ways take turns. Prints medians, and ratios within rounds. Build the native
kernels before (`python -m llava_edge.runtimes.native`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import median

import numpy as np

WAYS = {"mapped": ("off", False), "re-ordered": ("off", True), "ours": ("", True), "ours, mapped": ("", False)}


def measure(path: Path, positions: int, tokens: int, repack: bool) -> dict[str, float]:
    """In this process: seconds of the second prefill, tokens per second after it, MiB."""
    from llava_edge.runtimes import devices
    from llava_edge.runtimes.language import LanguageModel

    model = LanguageModel(path, context=2048, threads=devices.thread_count()[0], repack=repack)
    rows = np.random.default_rng(0).standard_normal((positions, model.hidden_size), np.float32) * 0.02
    never = threading.Event()
    for _ in range(2):
        model.forget(0)
        start = time.perf_counter()
        model.evaluate_embeddings(rows, [("image", i) for i in range(positions)], never)
        prefill = time.perf_counter() - start
    start = time.perf_counter()
    for token in range(tokens):
        model.evaluate_tokens([100 + token], never)
    rate = tokens / (time.perf_counter() - start)
    memory = devices.memory_use()
    found = {"prefill": prefill, "tokens/s": rate, "private": (memory.private_bytes or 0) / 2**20}
    return {**found, "peak": (memory.peak_rss_bytes or 0) / 2**20}


def main() -> None:
    """Parent: the ways in turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--positions", type=int, default=600)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", choices=WAYS)
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(measure(asked.model, asked.positions, asked.tokens, WAYS[asked.child][1])))
        return
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(asked.rounds):
        for way, (native, _) in WAYS.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--child", way]
            environment = {**os.environ, "LLAVA_EDGE_NATIVE": native}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
    for way, runs in found.items():
        line = {name: median(run[name] for run in runs) for name in runs[0]}
        shares = [run["prefill"] / base["prefill"] for run, base in zip(found["ours"], runs, strict=True)]
        print(f"{way:14}", ", ".join(f"{name} {value:.2f}" for name, value in line.items()), end="; ")
        print(f"ours takes {median(shares):.2f} of its prefill")


if __name__ == "__main__":
    main()
