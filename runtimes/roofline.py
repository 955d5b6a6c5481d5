"""The machine's roofline: peak rates of matrix products and memory reads, measured with the engines installed here.

Stages are compared with it. A peak is what the fastest product available to us reaches on a large, favourable shape,
not what the processor's manual promises: for 8 bits ONNX Runtime's u8 x s8 product or, where it is faster, one of our
kernels for quantized weights; for float32 ONNX Runtime's sgemm.
There is none for bfloat16, because on a CPU neither engine has a product that is faster than its float32 one.
Knows nothing about models.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from timeit import timeit
from typing import Any

import numpy as np

from llava_edge.protobuf import encode
from llava_edge.runtimes import bindings, machine, native
from llava_edge.runtimes.native import choice
from llava_edge.runtimes.native.ggml import Ggml, Weights
from llava_edge.runtimes.native.library import DEVICE

SHAPE = (1024, 2048, 2048)  # rows, inner, columns: of several shapes tried, the fastest with AMX
MAX_UINT8 = 127  # on the left, as in vision.onnx: sums of two products then fit into 16 bits on every processor
SECONDS = 0.3  # for each measurement
MIN_BYTES, MAX_BYTES = 1 << 28, 1 << 30  # of the array that is read
_FLOAT, _UINT8, _INT8, _INT32 = 1, 2, 3, 6  # onnx.TensorProto


@dataclass(frozen=True)
class Roofline:
    """Peaks per second with `threads` threads: operations (a multiplication and an addition are two), bytes read."""

    threads: int
    int8_ops: float
    fp32_ops: float
    read_bytes: float


def measure(threads: int) -> Roofline:
    """Measure for `SECONDS` each; takes a few seconds and up to 1 GiB of memory, so use a separate process."""
    rows, inner, columns = SHAPE
    numbers = np.random.default_rng(0)
    weights = numbers.integers(-127, 128, (inner, columns), np.int8)
    bytes_in = numbers.integers(0, MAX_UINT8 + 1, (rows, inner), np.uint8)
    floats_in = numbers.standard_normal((rows, inner), np.float32)
    int8 = _session("MatMulInteger", _UINT8, _INT8, _INT32, weights, threads)
    fp32 = _session("MatMul", _FLOAT, _FLOAT, _FLOAT, weights.astype(np.float32), threads)
    work = 2.0 * rows * inner * columns
    return Roofline(
        threads,
        max(work / _fastest_seconds(lambda: int8.run(None, {"a": bytes_in})), _native_int8_rate(threads)),
        work / _fastest_seconds(lambda: fp32.run(None, {"a": floats_in})),
        _read_rate(threads),
    )


def _native_int8_rate(threads: int) -> float:
    """Return the operations per second of our fastest int8 kernel; 0 if none is used here."""
    bindings.library()
    kinds = [kind for kind, kernel, _ in native.activate().many_rows if kernel.endswith("-int8")]
    if not kinds:
        return 0.0
    rows, columns, inner = choice.MANY_ROWS
    ggml, x = Ggml(), np.ones((rows, inner), np.float32)
    rates = []
    for kind in kinds:
        weights = Weights(kind, columns, inner, ggml.quantize(kind, np.ones((columns, inner), np.float32)))
        operation = ggml.mul_mat(weights, x, device=ggml.device(DEVICE), threads=threads)
        if operation is not None:
            with operation:
                rates.append(2.0 * rows * columns * inner / _fastest_seconds(operation.run))
    return max(rates, default=0.0)


def _read_rate(threads: int) -> float:
    """Return the bytes per second read by a bitwise OR over an array larger than the last-level cache."""
    values = np.full(_array_bytes() // 8, 1, np.uint64)  # not zeros, which would all share one page
    parts = np.array_split(values, threads)
    with ThreadPoolExecutor(threads) as pool:
        return values.nbytes / _fastest_seconds(lambda: list(pool.map(np.bitwise_or.reduce, parts)))


def _array_bytes() -> int:
    """Return twice the size of the last-level cache, within bounds and a quarter of the free memory."""
    caches = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [int(text[:-1]) << 10 for path in caches if (text := path.read_text().strip()).endswith("K")]
    size = min(max(2 * max(sizes, default=0), MIN_BYTES), MAX_BYTES)
    free = machine.available_memory()
    return size if free is None else min(size, free // 4)


def _fastest_seconds(call: Callable[[], Any]) -> float:
    """Return the time of the fastest call, not counting the first one."""
    call()
    times: list[float] = []
    while sum(times) < SECONDS or len(times) < 3:
        times.append(timeit(call, number=1))
    return min(times)


def _session(operator: str, left: int, right: int, out: int, weights: np.ndarray[Any, Any], threads: int) -> Any:
    """Return an ONNX Runtime session of `c = operator(a, weights)`; types are those of onnx.TensorProto."""
    ort = bindings.onnxruntime()
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    rows, inner, columns = SHAPE
    tensor = encode(1, inner) + encode(1, columns) + encode(2, right) + encode(8, b"b") + encode(9, weights.tobytes())
    node = encode(1, b"a") + encode(1, b"b") + encode(2, b"c") + encode(4, operator.encode())
    graph = encode(1, node) + encode(2, b"roofline") + encode(5, tensor)
    graph += encode(11, _value(b"a", left, rows, inner)) + encode(12, _value(b"c", out, rows, columns))
    model = encode(1, 8) + encode(7, graph) + encode(8, encode(2, 17))
    return ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])


def _value(name: bytes, kind: int, *shape: int) -> bytes:
    """Encode the onnx.ValueInfoProto of a tensor."""
    sizes = b"".join(encode(1, encode(1, size)) for size in shape)
    return encode(1, name) + encode(2, encode(1, encode(1, kind) + encode(2, sizes)))
