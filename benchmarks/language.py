"""Compares settings of the language model: mapped or repacked weights, kernels, KV cache type, batch size, flash
attention.

    python benchmarks/language.py BUNDLE [BUNDLE ...] [--threads N] [--repeats N] [--positions N] [--only CHOICE]

Each choice opens language.gguf in its own process, in interleaved rounds. Prints the time to load, to prefill image
embeddings, and per token after that; private and file-backed memory at the end. Build the native kernels first
(`python -m llava_edge.runtimes.native`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from interleave import run_fresh

from llava_edge.bundle import LANGUAGE
from llava_edge.runtimes import bindings, machine, mapping
from llava_edge.runtimes.kv_cache import Key
from llava_edge.runtimes.language import LanguageModel

CONTEXT = 2048
CHOICES: dict[str, dict[str, Any]] = {
    "mapped": {"repack": False},
    "repacked": {"repack": True},
    "repacked, held twice": {"repack": True, "twice": True},
    "mapped, q8_0": {"repack": False, "kv": "q8_0"},
    "mapped, batches of 576": {"repack": False, "batch": 576},
    "repacked, batches of 576": {"repack": True, "batch": 576},
    "mapped, no flash attention": {"repack": False, "flash": 0},
    "mapped, llama.cpp's kernels": {"repack": False, "native": "off"},
    "repacked, llama.cpp's kernels": {"repack": True, "native": "off"},
}
COLUMNS = ("load_ms", "prefill_ms", "token_ms", "private_mb", "file_mb")


def measure(bundle: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    choice = dict(CHOICES[arguments.worker])
    if kernels := choice.pop("native", ""):
        os.environ["LLAVA_EDGE_NATIVE"] = kernels
    _override(choice.pop("twice", False), choice.pop("flash", None))
    clock = time.process_time if arguments.processor_time else time.perf_counter
    start = clock()
    model = LanguageModel(bundle / LANGUAGE, context=CONTEXT, threads=arguments.threads, **choice)
    loaded = clock()
    rows = np.random.default_rng(0).standard_normal((arguments.positions, model.hidden_size), np.float32) * 0.02
    keys: list[Key] = [("picture", row) for row in range(len(rows))]
    model.evaluate_embeddings(rows, keys)
    prefilled = clock()
    for number in range(arguments.tokens):
        model.evaluate_tokens([300 + 7 * number])
    done, memory = clock(), machine.memory_use()
    return {
        "load_ms": (loaded - start) * 1000,
        "prefill_ms": (prefilled - loaded) * 1000,
        "token_ms": (done - prefilled) * 1000 / arguments.tokens,
        "private_mb": (memory.private_bytes or 0) / 1e6,
        "file_mb": (memory.file_bytes or 0) / 1e6,
    }


def _override(twice: bool, flash: int | None) -> None:
    """Change settings that the product does not expose."""
    if twice:
        mapping.release_pages = lambda path: None
    api = bindings.library()
    init_from_model = api.llama_init_from_model

    def init_with_override(model: Any, settings: Any) -> Any:
        if flash is not None:
            settings.flash_attn_type = flash
        return init_from_model(model, settings)

    api.llama_init_from_model = init_with_override


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--positions", type=int, default=576, help="of the prompt")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--only", action="append", choices=CHOICES, help="choice; may be repeated")
    parser.add_argument("--processor-time", action="store_true", help="for a busy machine; with one thread")
    parser.add_argument("--worker", choices=CHOICES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(arguments.bundles[0], arguments)))
        return
    settings = [f"--{name}={getattr(arguments, name)}" for name in ("threads", "positions", "tokens")]
    settings += ["--processor-time"] if arguments.processor_time else []
    commands = {
        f"{bundle.name}: {name}": [sys.executable, sys.argv[0], str(bundle), *settings, "--worker", name]
        for bundle in arguments.bundles
        for name in arguments.only or CHOICES
    }
    samples = run_fresh(commands, arguments.repeats, arguments.warmup)
    medians = {name: {key: median(item[key] for item in rows) for key in COLUMNS} for name, rows in samples.items()}
    print("| choice | " + " | ".join(key.replace("_", " ") for key in COLUMNS) + " |", file=sys.stderr)
    for name, row in medians.items():
        print(f"| {name} | " + " | ".join(f"{row[key]:.0f}" for key in COLUMNS) + " |", file=sys.stderr)
    print(json.dumps({"medians": medians, "samples": samples}))


if __name__ == "__main__":
    main()
