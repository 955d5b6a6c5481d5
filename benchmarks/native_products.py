"""Times single products and attention: llama.cpp's own kernels, on mapped and on repacked weights, and ours.

    python benchmarks/native_products.py Q4_0 Q4_K --kernel avx2

With one thread, in CPU time, so that other work on the machine disturbs little; interleaved; medians. Build the native
kernels first (`python -m llava_edge.runtimes.native`).
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import numpy as np

from llava_edge.runtimes import bindings
from llava_edge.runtimes.native import check, installed
from llava_edge.runtimes.native.ggml import TYPES, Ggml, Operation, Weights
from llava_edge.runtimes.native.library import DEVICE, FEW, Library

MANY = (512, 1024, 4096)  # rows, columns, inner
ONE, EIGHT = (1, 16384, 4096), (8, 16384, 4096)
ATTENTION = (8, 8, 512, 512, 128)  # heads, heads of keys, queries, keys, width


def milliseconds(runners: dict[str, Operation | None], repeats: int) -> dict[str, float]:
    """Return the median CPU time of each operation that is not None."""
    operations = {name: operation for name, operation in runners.items() if operation is not None}
    times: dict[str, list[float]] = {name: [] for name in operations}
    for _ in range(repeats):
        for name, operation in operations.items():
            start = time.thread_time()
            operation.run()
            times[name].append(1000 * (time.thread_time() - start))
    for operation in operations.values():
        operation.__exit__()
    return {name: median(values) for name, values in times.items()}


def products(ggml: Ggml, kind: str, shape: tuple[int, int, int], repeats: int) -> dict[str, float]:
    """Time products of random values with weights of one type."""
    rows, columns, inner = shape
    numbers = np.random.default_rng(0)
    block = ggml.quantize(kind, numbers.standard_normal((64, inner), np.float32))
    weights = Weights(kind, columns, inner, block * (columns // 64))
    x = numbers.standard_normal((rows, inner), np.float32)
    runners = {
        "mapped": ggml.mul_mat(weights, x, device=ggml.device(), threads=1),
        "repacked": ggml.mul_mat(weights, x, device=ggml.device(), threads=1, repacked=True),
        "ours": ggml.mul_mat(weights, x, device=ggml.device(DEVICE), threads=1),
    }
    return milliseconds(runners, repeats)


def main() -> None:
    """Print a line for each type and shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", default=list(TYPES), metavar="TYPE")
    parser.add_argument("--kernel", default="avx2")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    bindings.library()
    ggml, path = Ggml(), installed.folder() / installed.LIBRARY
    library = Library(path)
    supported = [(kind, arguments.kernel, 32) for kind in TYPES if library.select(arguments.kernel, kind)]
    library.configure(supported, [kind for kind in TYPES if library.select(FEW, kind)], attention=True)
    if not ggml.load_backend(path):
        parser.error(f"ggml does not accept {path}")
    for kind in arguments.types:
        found = products(ggml, kind, MANY, arguments.repeats)
        rates = (f"{name} {2e-6 * np.prod(MANY) / value:.1f}" for name, value in found.items())
        print(f"{kind}: {MANY[0]} rows, billion operations/s:", ", ".join(rates))
        for shape in (ONE, EIGHT):
            found = products(ggml, kind, shape, arguments.repeats)
            print(f"{kind}: rows {shape[0]}, ms:", ", ".join(f"{name} {value:.2f}" for name, value in found.items()))
    inputs = check.attention_inputs(*ATTENTION)
    cpu, ours = (ggml.flash_attention(*inputs, device=ggml.device(name), threads=1) for name in (None, DEVICE))
    found = milliseconds({"llama.cpp": cpu, "ours": ours}, arguments.repeats)
    print("attention, ms:", ", ".join(f"{name} {value:.1f}" for name, value in found.items()))


if __name__ == "__main__":
    main()
