"""Test and benchmark the kernels on this machine; run in a child process, because a faulty kernel may crash.

Every kernel computes small matrix products, as a ggml backend, which are compared with float64. The correct ones are
benchmarked against llama.cpp's on shapes of a 7B model, with mapped weights and with weights that llama.cpp repacked.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from timeit import timeit
from typing import Any

import numpy as np

from llava_edge.runtimes import bindings, machine, projector
from llava_edge.runtimes.native import operator
from llava_edge.runtimes.native.choice import MANY_ROWS, ONE_ROW
from llava_edge.runtimes.native.ggml import TYPES, Array, Ggml, Operation, Weights
from llava_edge.runtimes.native.installed import OPERATOR
from llava_edge.runtimes.native.library import DEVICE, FEW, Library

# Relative error of a product, by the suffix of the kernel's name.
MAX_ERROR, MAX_ERROR_OTHERS = {"int8": 2e-2, "bf16": 5e-3, FEW: 2e-2}, 2e-3
MAX_ATTENTION_ERROR = 1e-2

REPEATS, SECONDS = 5, 0.4  # minimum of each per benchmark: short runs are easily disturbed
SOME_ROWS, SIXTEEN_ROWS = (64, 2048, 4096), (16, 2048, 4096)  # rows, columns, inner
EIGHT_ROWS = (8, 4096, 4096)  # 9 MB at 4 bits
ADAPTER = (4096, 64)  # columns, inner: with few rows, float16 weights are adapters
ATTENTION = {"many": (16, 512, 512), "eight": (32, 8, 640), "one": (32, 1, 640)}  # heads, queries, keys
ATTENTION_WIDTH = 128


def main(path: str) -> None:
    """Body of the child process: test the library at `path` and print the results as one line of JSON."""
    load = machine.ExternalLoad()
    bindings.library()
    ggml, library = Ggml(), Library(Path(path))
    results: dict[str, Any] = {"kernels": library.kernels(), "problems": {}, "types": {}}
    library.configure()
    if not ggml.load_backend(Path(path)) or not ggml.device(DEVICE):
        sys.stdout.write(json.dumps({"failed": "ggml does not accept the backend"}) + "\n")
        return
    for kernel in [*library.kernels(), FEW]:
        if problem := check_products(ggml, library, kernel):
            results["problems"][kernel] = problem
    for name, queries in (("attention", 45), ("few attention", 9)):
        if problem := check_attention(ggml, library, queries):
            results["problems"][name] = problem
    threads = machine.thread_count()[0]
    operators = Path(path).with_name(OPERATOR)
    if operators.exists():
        if problem := check_operators(operators):
            results["problems"][OPERATOR] = problem
        results["projector"] = _benchmark_projector(operators, threads)
    correct = [kernel for kernel in library.kernels() if kernel not in results["problems"]]
    few = [] if FEW in results["problems"] else [FEW]
    for kind in TYPES:
        one, eight = ((1, *ADAPTER), (8, *ADAPTER)) if kind == "F16" else (ONE_ROW, EIGHT_ROWS)
        results["types"][kind] = {
            "many": _benchmark_products(ggml, library, kind, MANY_ROWS, correct, threads),
            "some": _benchmark_products(ggml, library, kind, SOME_ROWS, correct, threads),
            "sixteen": _benchmark_products(ggml, library, kind, SIXTEEN_ROWS, [*correct, *few], threads),
            "eight": _benchmark_products(ggml, library, kind, eight, few, threads),
            "one": _benchmark_products(ggml, library, kind, one, few, threads),
        }
    results["attention"] = {
        name: _benchmark_attention(ggml, library, *shape, threads) for name, shape in ATTENTION.items()
    }
    results["crowded"] = load.share() > machine.MAX_EXTERNAL_LOAD
    sys.stdout.write(json.dumps(results) + "\n")


def check_products(ggml: Ggml, library: Library, kernel: str) -> str:
    """Compare a kernel's products with float64; returns what is wrong as a sentence, or empty."""
    rng = np.random.default_rng(0)
    for kind in TYPES:
        if not library.select(kernel, kind):
            continue
        weights = Weights(kind, 70, 768, ggml.quantize(kind, rng.standard_normal((70, 768), np.float32)))
        x = rng.standard_normal((9 if kernel == FEW else 45, 768), np.float32)
        operation = ggml.mul_mat(weights, x, device=ggml.device(DEVICE), threads=2)
        if operation is None:
            return f"{kernel} does not support {kind}."
        with operation:
            error = _error(operation.values(), x.astype(np.float64) @ ggml.dequantize(weights).astype(np.float64).T)
        if not error < MAX_ERROR.get(kernel.rpartition("-")[2], MAX_ERROR_OTHERS):
            return f"{kernel} is off by {error:.1e} on {kind}."
    return ""


def check_attention(ggml: Ggml, library: Library, queries: int) -> str:
    """Compare attention of `queries` queries with float64; returns what is wrong as a sentence, or empty."""
    library.configure(attention=True, few_attention=True)
    for width, bits in ((64, 16), (80, 16), (64, 8)):  # AVX-512 computes multiples of 32, AVX2 the others
        q, k, v, mask = attention_inputs(4, 2, queries, 96, width)
        cached = (k, v)
        if bits == 8:
            (k, v), cached = zip(*map(in_eight_bits, cached), strict=True)
        operation = ggml.flash_attention(q, *cached, mask, device=ggml.device(DEVICE), threads=2)
        if operation is None:
            return f"Attention of {queries} queries is not supported."
        with operation:
            error = _error(operation.values(), exact_attention(q, k, v, mask))
        if not error < MAX_ATTENTION_ERROR:  # also if it is NaN
            return f"Attention of {queries} queries in heads of {width} with {bits} bits is off by {error:.1e}."
    return ""


def check_operators(library: Path) -> str:
    """Compare ONNX Runtime's operators and the projector's kernel with float64; returns what is wrong, or empty."""
    rng = np.random.default_rng(0)
    x, scale, bias = (rng.standard_normal(shape, np.float32) for shape in ((45, 768), 70, 70))
    weight = rng.integers(-127, 128, (768, 70), np.int8)
    half_weight = rng.standard_normal((70, 768), np.float32).astype(np.float16)
    q, k, v = qkv = rng.standard_normal((3, 2, 45, 64), np.float32)
    packed_qkv = np.ascontiguousarray(qkv.transpose(2, 0, 1, 3)).reshape(1, 45, -1)
    try:
        linear, quick_gelu = (operator.linear(library, x, weight, scale, bias, 2, flag) for flag in (False, True))
        projected, gelu = (operator.project(library, x, half_weight, bias, 2, flag) for flag in (False, True))
        attention = operator.attention(library, packed_qkv, 2, 2)
    except (OSError, MemoryError) as error:
        return f"The operators for ONNX Runtime do not work: {error}."
    x64 = x.astype(np.float64)
    layer, projection = x64 @ weight * scale + bias, x64 @ half_weight.T + bias
    errors = (
        _error(linear, layer),
        _error(quick_gelu, layer * (1 + np.tanh(1.702 / 2 * layer)) / 2),
        _error(projected, projection),
        _error(gelu, projection * np.vectorize(math.erfc)(-projection / math.sqrt(2)) / 2),
        _error(attention, exact_attention(q, k, v, np.zeros((45, 45)))),
    )
    return "" if max(errors) < MAX_ERROR_OTHERS else f"An operator for ONNX Runtime is off by {max(errors):.1e}."


def attention_inputs(
    heads: int, kv_heads: int, queries: int, keys: int, width: int
) -> tuple[Array, Array, Array, Array]:
    """Random q, k, v, and a causal mask that lets the last query attend to all keys."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((heads, queries, width), np.float32)
    k, v = (rng.standard_normal((kv_heads, keys, width), np.float32).astype(np.float16) for _ in "kv")
    visible = np.arange(keys)[None] <= np.arange(queries)[:, None] + keys - queries
    return q, k, v, np.where(visible, 0, -np.inf).astype(np.float16)


def in_eight_bits(values: Array) -> tuple[Array, Array]:
    """Values (..., width) rounded to Q8_0, as float32; and its blocks, (..., bytes) uint8."""
    blocks = values.astype(np.float32).reshape(*values.shape[:-1], -1, 32)
    scales = (np.abs(blocks).max(-1, keepdims=True) / 127).astype(np.float16)
    quants = np.rint(blocks / np.where(scales > 0, scales, 1)).astype(np.int8)
    stored = np.concatenate([scales.view(np.uint8), quants.view(np.uint8)], -1)
    return (quants * scales.astype(np.float32)).reshape(values.shape), stored.reshape(*values.shape[:-1], -1)


def exact_attention(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """Attention in float64: (queries, heads, width)."""
    k, v = (np.repeat(values, len(q) // len(values), 0).astype(np.float64) for values in (k, v))
    scores = q.astype(np.float64) @ k.transpose(0, 2, 1) * q.shape[-1] ** -0.5 + mask.astype(np.float64)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out: Array = (weights / weights.sum(-1, keepdims=True) @ v).transpose(1, 0, 2)
    return out


def _error(actual: Array, expected: Array) -> float:
    """Relative root mean square error."""
    return float(np.sqrt(((actual.reshape(expected.shape) - expected) ** 2).mean() / (expected**2).mean()))


def _benchmark_products(
    ggml: Ggml, library: Library, kind: str, shape: tuple[int, int, int], kernels: list[str], threads: int
) -> dict[str, float]:
    """Time products by each of `kernels` and by llama.cpp, "plain" and "repacked": milliseconds by name.

    Inputs are evicted from the caches first, as a model's weights come from memory.
    """
    rows, columns, inner = shape
    rng = np.random.default_rng(0)
    block = ggml.quantize(kind, rng.standard_normal((64, inner), np.float32))
    weights = Weights(kind, columns, inner, block * (columns // 64))
    x = rng.standard_normal((rows, inner), np.float32)
    cpu, ours = ggml.device(), ggml.device(DEVICE)
    with ExitStack() as stack:
        candidates: dict[str, Operation | None] = {
            "plain": ggml.mul_mat(weights, x, device=cpu, threads=threads),
            "repacked": ggml.mul_mat(weights, x, device=cpu, threads=threads, repacked=True),
        }
        for kernel in kernels:
            if library.select(kernel, kind):
                candidates[kernel] = ggml.mul_mat(weights, x, device=ours, threads=threads)
        operations = {name: stack.enter_context(item) for name, item in candidates.items() if item is not None}

        def prepare(name: str) -> None:
            if name in kernels:
                library.select(name, kind)
            for address, size in operations[name].inputs():
                library.evict(address, size)

        return _benchmark({name: operation.run for name, operation in operations.items()}, prepare)


def _benchmark_projector(library: Path, threads: int) -> dict[str, float]:
    """Time a layer of LLaVA-1.5-7B's projector in numpy ("plain") and by our kernel ("ours"), in milliseconds."""
    rng = np.random.default_rng(0)
    x, bias = rng.standard_normal((576, 1024), np.float32), np.zeros(4096, np.float32)
    weight = rng.standard_normal((4096, 1024), np.float32).astype(np.float16)
    functions: dict[str, Callable[[], object]] = {
        "plain": lambda: projector.linear(x, weight, bias),
        "ours": lambda: operator.project(library, x, weight, bias, threads),
    }
    return _benchmark({name: partial(timeit, function, number=1) for name, function in functions.items()})


def _benchmark_attention(
    ggml: Ggml, library: Library, heads: int, queries: int, keys: int, threads: int
) -> dict[str, float]:
    inputs = attention_inputs(heads, heads, queries, keys, ATTENTION_WIDTH)
    library.configure(attention=True, few_attention=True)
    with ExitStack() as stack:
        operations = {
            "plain": ggml.flash_attention(*inputs, device=ggml.device(), threads=threads),
            "ours": ggml.flash_attention(*inputs, device=ggml.device(DEVICE), threads=threads),
        }
        return _benchmark({name: stack.enter_context(item).run for name, item in operations.items() if item})


def _benchmark(
    functions: dict[str, Callable[[], float]], prepare: Callable[[str], None] = lambda name: None
) -> dict[str, float]:
    """Run functions that return their duration in seconds, interleaved; returns the best of each in milliseconds."""
    best = dict.fromkeys(functions, float("inf"))
    rounds, end = 0, time.monotonic() + SECONDS
    while rounds <= REPEATS or time.monotonic() < end:
        rounds += 1
        for name, function in functions.items():
            prepare(name)
            best[name] = min(best[name], 1000 * function())
    return {name: round(value, 3) for name, value in best.items()}
