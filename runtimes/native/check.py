"""Are the kernels right here, and do they pay? Run in a process of its own, because a wrong one may kill it.

Every kernel computes small products and an attention as a ggml backend, next to float64. The right ones race those of
llama.cpp on shapes of a 7B model: with weights as they are mapped, and with weights that it has re-ordered for itself.
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
from typing import Any

import numpy as np

from llava_edge.runtimes import devices, language, projector
from llava_edge.runtimes.native import OPERATOR, operator
from llava_edge.runtimes.native.choice import MANY, ONE
from llava_edge.runtimes.native.ggml import TYPES, Array, Ggml, Operation, Weights
from llava_edge.runtimes.native.library import DEVICE, FEW, Library

# Of the relative error of a product, by how a kernel's name ends.
BOUND, OTHERS_BOUND = {"int8": 2e-2, "bf16": 5e-3, FEW: 2e-2}, 2e-3
ATTENTION_BOUND = 1e-2

REPEATS, SECONDS = 5, 0.4  # of a race: both at least, since what takes a millisecond is easily disturbed
SOME, SIXTEEN = (64, 2048, 4096), (16, 2048, 4096)  # rows, columns, inner
EIGHT = (8, 4096, 4096)  # 9 MB at 4 bits
ADAPTER = (4096, 64)  # columns, inner: for few rows float16 means adapters
ATTENTION = {"many": (16, 512, 512), "eight": (32, 8, 640), "one": (32, 1, 640)}  # heads, queries, keys
ATTENTION_WIDTH = 128


def main(path: str) -> None:
    """Body of the child process: one line of JSON."""
    others = devices.ExternalLoad()
    language.library()
    ggml, library = Ggml(), Library(Path(path))
    facts: dict[str, Any] = {"kernels": library.kernels(), "problems": {}, "types": {}}
    library.use()
    if not ggml.load_backend(Path(path)) or not ggml.device(DEVICE):
        sys.stdout.write(json.dumps({"failed": "ggml does not accept the backend"}) + "\n")
        return
    for kernel in [*library.kernels(), FEW]:
        if problem := product_problem(ggml, library, kernel):
            facts["problems"][kernel] = problem
    for name, queries in (("attention", 45), ("few attention", 9)):
        if problem := attention_problem(ggml, library, queries):
            facts["problems"][name] = problem
    its_operator = Path(path).with_name(OPERATOR)
    if its_operator.exists():
        if problem := operator_problem(its_operator):
            facts["problems"][OPERATOR] = problem
        facts["projector"] = _race_projector(its_operator, devices.thread_count()[0])
    right = [kernel for kernel in library.kernels() if kernel not in facts["problems"]]
    threads = devices.thread_count()[0]
    few = [] if FEW in facts["problems"] else [FEW]
    for kind in TYPES:
        one, eight = ((1, *ADAPTER), (8, *ADAPTER)) if kind == "F16" else (ONE, EIGHT)
        facts["types"][kind] = {
            "many": _race_products(ggml, library, kind, MANY, right, threads),
            "some": _race_products(ggml, library, kind, SOME, right, threads),
            "sixteen": _race_products(ggml, library, kind, SIXTEEN, [*right, *few], threads),
            "eight": _race_products(ggml, library, kind, eight, few, threads),
            "one": _race_products(ggml, library, kind, one, few, threads),
        }
    facts["attention"] = {name: _race_attention(ggml, library, *shape, threads) for name, shape in ATTENTION.items()}
    facts["crowded"] = others.share() > devices.MAX_EXTERNAL_LOAD
    sys.stdout.write(json.dumps(facts) + "\n")


def product_problem(ggml: Ggml, library: Library, kernel: str) -> str:
    """What is wrong with a kernel's products, as a sentence; empty if nothing is."""
    numbers = np.random.default_rng(0)
    for kind in TYPES:
        if not library.take(kernel, kind):
            continue
        weights = Weights(kind, 70, 768, ggml.quantize(kind, numbers.standard_normal((70, 768), np.float32)))
        x = numbers.standard_normal((9 if kernel == FEW else 45, 768), np.float32)
        made = ggml.multiply(weights, x, device=ggml.device(DEVICE), threads=2)
        if made is None:
            return f"{kernel} does not take {kind}."
        with made:
            error = _error(made.values(), x.astype(np.float64) @ ggml.rows(weights).astype(np.float64).T)
        if not error < BOUND.get(kernel.rpartition("-")[2], OTHERS_BOUND):
            return f"{kernel} is off by {error:.1e} on {kind}."
    return ""


def attention_problem(ggml: Ggml, library: Library, queries: int) -> str:
    """What is wrong with attention of so many queries, as a sentence; empty if nothing is."""
    library.use(attention=True, few_attention=True)
    for width in (64, 80):  # AVX-512 takes multiples of 32, AVX2 the others
        inputs = attention_inputs(4, 2, queries, 96, width)
        made = ggml.attend(*inputs, device=ggml.device(DEVICE), threads=2)
        if made is None:
            return f"Attention of {queries} queries is not taken."
        with made:
            error = _error(made.values(), exact_attention(*inputs))
        if not error < ATTENTION_BOUND:  # NaN is not
            return f"Attention of {queries} queries in heads of {width} is off by {error:.1e}."
    return ""


def operator_problem(library: Path) -> str:
    """What is wrong with ONNX Runtime's operators or the projector's kernel, as a sentence; empty if nothing is."""
    numbers = np.random.default_rng(0)
    x, scale, bias = (numbers.standard_normal(shape, np.float32) for shape in ((45, 768), 70, 70))
    weight = numbers.integers(-127, 128, (768, 70), np.int8)
    halves = numbers.standard_normal((70, 768), np.float32).astype(np.float16)
    q, k, v = qkv = numbers.standard_normal((3, 2, 45, 64), np.float32)
    try:
        found, activated = (operator.linear(library, x, weight, scale, bias, 2, then) for then in (False, True))
        projected, gelu = (operator.project(library, x, halves, bias, 2, then) for then in (False, True))
        attended = operator.attention(library, np.ascontiguousarray(qkv.transpose(2, 0, 1, 3)).reshape(1, 45, -1), 2, 2)
    except OSError as problem:
        return f"The operators for ONNX Runtime do not work: {problem}."
    wide = x.astype(np.float64)
    layer, projection = wide @ weight * scale + bias, wide @ halves.T + bias
    errors = (
        _error(found, layer),
        _error(activated, layer * (1 + np.tanh(1.702 / 2 * layer)) / 2),
        _error(projected, projection),
        _error(gelu, projection * np.vectorize(math.erfc)(-projection / math.sqrt(2)) / 2),
        _error(attended, exact_attention(q, k, v, np.zeros((45, 45)))),
    )
    return "" if max(errors) < OTHERS_BOUND else f"An operator for ONNX Runtime is off by {max(errors):.1e}."


def attention_inputs(heads: int, shared: int, queries: int, keys: int, width: int) -> tuple[Array, Array, Array, Array]:
    """Random q, k, v, and a causal mask under which the last query sees all keys."""
    numbers = np.random.default_rng(0)
    q = numbers.standard_normal((heads, queries, width), np.float32)
    k, v = (numbers.standard_normal((shared, keys, width), np.float32).astype(np.float16) for _ in "kv")
    seen = np.arange(keys)[None] <= np.arange(queries)[:, None] + keys - queries
    return q, k, v, np.where(seen, 0, -np.inf).astype(np.float16)


def exact_attention(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """In float64: (queries, heads, width)."""
    k, v = (np.repeat(values, len(q) // len(values), 0).astype(np.float64) for values in (k, v))
    scores = q.astype(np.float64) @ k.transpose(0, 2, 1) * q.shape[-1] ** -0.5 + mask.astype(np.float64)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out: Array = (weights / weights.sum(-1, keepdims=True) @ v).transpose(1, 0, 2)
    return out


def _error(found: Array, expected: Array) -> float:
    """Root of the mean square, relative."""
    return float(np.sqrt(((found.reshape(expected.shape) - expected) ** 2).mean() / (expected**2).mean()))


def _race_products(
    ggml: Ggml, library: Library, kind: str, shape: tuple[int, int, int], kernels: list[str], threads: int
) -> dict[str, float]:
    """Milliseconds of the fastest of `REPEATS` or more, in turns: by kernel, "plain" and "repacked".

    All is read from memory, as a model's weights are: some processors' caches hold a whole matrix.
    """
    rows, columns, inner = shape
    numbers = np.random.default_rng(0)
    some = ggml.quantize(kind, numbers.standard_normal((64, inner), np.float32))
    weights = Weights(kind, columns, inner, some * (columns // 64))
    x = numbers.standard_normal((rows, inner), np.float32)
    cpu, ours = ggml.device(), ggml.device(DEVICE)
    with ExitStack() as stack:
        runners: dict[str, Operation | None] = {
            "plain": ggml.multiply(weights, x, device=cpu, threads=threads),
            "repacked": ggml.multiply(weights, x, device=cpu, threads=threads, repacked=True),
        }
        for kernel in kernels:
            if library.take(kernel, kind):
                runners[kernel] = ggml.multiply(weights, x, device=ours, threads=threads)
        there = {name: stack.enter_context(made) for name, made in runners.items() if made is not None}

        def before(name: str) -> None:
            if name in kernels:
                library.take(name, kind)
            for address, size in there[name].memory():
                library.forget(address, size)

        return _race({name: made.seconds for name, made in there.items()}, before)


def _race_projector(library: Path, threads: int) -> dict[str, float]:
    """A layer of LLaVA-1.5-7B's projector, in numpy and by our kernel."""
    numbers = np.random.default_rng(0)
    x, bias = numbers.standard_normal((576, 1024), np.float32), np.zeros(4096, np.float32)
    weight = numbers.standard_normal((4096, 1024), np.float32).astype(np.float16)
    ways: dict[str, Callable[[], object]] = {
        "plain": lambda: projector.linear(x, weight, bias),
        "ours": lambda: operator.project(library, x, weight, bias, threads),
    }

    def timed(way: Callable[[], object]) -> float:
        start = time.perf_counter()
        way()
        return time.perf_counter() - start

    return _race({name: partial(timed, way) for name, way in ways.items()})


def _race_attention(
    ggml: Ggml, library: Library, heads: int, queries: int, keys: int, threads: int
) -> dict[str, float]:
    inputs = attention_inputs(heads, heads, queries, keys, ATTENTION_WIDTH)
    library.use(attention=True, few_attention=True)
    with ExitStack() as stack:
        made = {
            "plain": ggml.attend(*inputs, device=ggml.device(), threads=threads),
            "ours": ggml.attend(*inputs, device=ggml.device(DEVICE), threads=threads),
        }
        return _race({name: stack.enter_context(one).seconds for name, one in made.items() if one})


def _race(
    runners: dict[str, Callable[[], float]], before: Callable[[str], None] = lambda name: None
) -> dict[str, float]:
    """Of those that say how many seconds they took."""
    best = dict.fromkeys(runners, float("inf"))
    turns, end = 0, time.monotonic() + SECONDS
    while turns <= REPEATS or time.monotonic() < end:
        turns += 1
        for name, runner in runners.items():
            before(name)
            best[name] = min(best[name], 1000 * runner())
    return {name: round(value, 3) for name, value in best.items()}
