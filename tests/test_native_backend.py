"""Which of ggml's operations our backend takes, and that it finds their numbers where ggml put them.

What it should not take it would compute wrongly: llama.cpp offers it every operation, of other models, too.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from native_kernels import here
from processes import in_child

from llava_edge.runtimes.native import installed

pytestmark = here


@pytest.fixture(scope="module")
def built(native_build: Path) -> Path:
    return Path(os.environ.get("LLAVA_EDGE_TEST_NATIVE", native_build / installed.LIBRARY))


START = """
import sys
from ctypes import c_float, c_int64, c_size_t
from pathlib import Path
import numpy as np
from llava_edge.runtimes import bindings
from llava_edge.runtimes.native.ggml import Ggml, Operation, Weights
from llava_edge.runtimes.native.library import Library
bindings.library()
ggml, library = Ggml(), Library(Path(sys.argv[1]))
library.configure()
assert ggml.load_backend(Path(sys.argv[1]))
library.configure([(kind, "avx2", 32) for kind in ("F16", "Q4_0")], ["F16", "Q4_0"], True, True)
cpu, ours = ggml.device(), ggml.device("LLAVA_EDGE")
F32, F16, Q4_0, Q8_0 = 0, 1, 2, 8
"""

OFFERED = """
def tensor(kind, *shape):
    return Operation.tensor(operation, kind, *shape, data=b"")

def taken(name, *inputs, after=None, **numbers):
    made = ggml.call_pointer(name, operation._context, *inputs, *(c_float(number) for number in numbers.values()))
    if after:
        after(made)
    return bool(ggml.call_number("ggml_backend_dev_supports_op", ours, made) & 0xFF)

def product(w, x):
    return taken("ggml_mul_mat", w, x)

def attention(q, k, v, mask, after=None, scale=0.1, most_bias=0.0, cap=0.0):
    return taken("ggml_flash_attn_ext", q, k, v, mask, after=after, scale=scale, most_bias=most_bias, cap=cap)

def sink(made):
    ggml.call_number("ggml_flash_attn_ext_add_sinks", made, tensor(F32, 4))

operation = Operation(ggml, ours, 1)
w, half, x = tensor(Q4_0, 64, 9), tensor(F16, 16, 9), tensor(F32, 64, 40)
transposed = ggml.call_pointer("ggml_transpose", operation._context, tensor(F32, 40, 64))
weights, ones = Weights("Q4_0", 64, 64, bytes(64 * 36)), np.ones((40, 64))
repacked = ggml.mul_mat(weights, ones, device=cpu, threads=1, repacked=True)
assert repacked is not None
found = {
    "a product": product(w, x),
    "of few rows of float16": product(half, tensor(F32, 16, 5)),
    "of more whose width is no multiple of 32": product(half, tensor(F32, 16, 40)),
    "of a matrix with several": product(w, tensor(F32, 64, 40, 2)),
    "of several with several": product(tensor(Q4_0, 64, 9, 2), tensor(F32, 64, 40, 2)),
    "of float16 activations": product(w, tensor(F16, 64, 40)),
    "of columns": product(w, transposed),
    "of another type": product(tensor(Q8_0, 64, 9), x),
    "of repacked weights": bool(ggml.call_number("ggml_backend_dev_supports_op", ours, repacked._node) & 0xFF),
}
for queries in (5, 40):
    q, k, mask = tensor(F32, 64, queries, 4), tensor(F16, 64, 96, 2), tensor(F16, 96, queries)
    narrow_q, narrow_k = tensor(F32, 24, queries, 4), tensor(F16, 24, 96, 2)
    bytes_k = tensor(Q8_0, 64, 96, 2)
    pictures = tensor(F32, 64, queries, 4, 2), tensor(F16, 64, 96, 2, 2), tensor(F16, 64, 96, 2, 2)
    found |= {
        f"attention of {queries}": attention(q, k, k, mask) and attention(q, bytes_k, bytes_k, mask),
        f"{queries} with a bias": attention(q, k, k, mask, most_bias=8.0),
        f"{queries} with a cap": attention(q, k, k, mask, cap=30.0),
        f"{queries} with sinks": attention(q, k, k, mask, after=sink),
        f"{queries} without a mask": attention(q, k, k, 0),
        f"{queries} with a mask for each head": attention(q, k, k, tensor(F16, 96, queries, 4)),
        f"{queries} of several prompts": attention(*pictures, mask),
        f"{queries} of another width": attention(narrow_q, narrow_k, narrow_k, mask),
        f"{queries} with narrow values": attention(q, k, tensor(F16, 32, 96, 2), mask),
        f"{queries} in two types": attention(q, k, bytes_k, mask) or attention(q, bytes_k, k, mask),
        f"{queries} over a cache in 4 bits": attention(q, *[tensor(Q4_0, 64, 96, 2)] * 2, mask),
    }
print([name for name, taken in found.items() if taken])
"""


def test_only_what_the_kernels_compute_is_taken(built: Path) -> None:
    taken = in_child(START + OFFERED, built).stdout.strip()
    assert taken == str(["a product", "of few rows of float16", "attention of 5", "attention of 40"])


VIEWED = """
numbers = np.random.default_rng(0)

def computed(device, name, *parts):
    # Tensors of a kind, parts (shape, bytes from row to row, offset) of larger ones.
    made, views = Operation(ggml, device, 2), []
    for kind, whole, data, shape, row, start in parts:
        inside = made.tensor(kind, *whole, data=data)
        sizes = (*map(c_int64, shape), *map(c_size_t, row), c_size_t(start))
        views.append(ggml.call_pointer(f"ggml_view_{len(shape)}d", made._context, inside, *sizes))
    settings = [c_float(0.3), c_float(0), c_float(0)] if name == "ggml_flash_attn_ext" else []
    assert made.build(name, *views, *settings)
    with made:
        return made.values()

def floats(*shape):
    return numbers.standard_normal(shape, np.float32)

for rows in (5, 40):
    w = ggml.quantize("Q4_0", floats(70, 128))
    x = floats(rows, 80)
    parts = (Q4_0, (128, 70), w, (64, 70), (72,), 36), (F32, (80, rows), x.tobytes(), (64, rows), (320,), 64)
    q, k, v = floats(2, rows, 80), floats(1, 96, 80).astype(np.float16), floats(1, 96, 80).astype(np.float16)
    mask = np.where(np.arange(128) > np.arange(rows)[:, None] + 50, -np.inf, 0).astype(np.float16)  # of more keys
    looked = [(F32, (80, rows, 2), q.tobytes(), (64, rows, 2), (320, 320 * rows), 64)]
    looked += [(F16, (80, 96, 1), each.tobytes(), (64, 96, 1), (160, 160 * 96), 32) for each in (k, v)]
    looked += [(F16, (128, rows), mask.tobytes(), (128, rows), (256,), 0)]
    for name, tensors in (("ggml_mul_mat", parts), ("ggml_flash_attn_ext", looked)):
        found, expected = (computed(device, name, *tensors) for device in (ours, cpu))
        print(name, rows, float(np.linalg.norm(found - expected) / np.linalg.norm(expected)))
"""


def test_parts_of_larger_tensors_are_found(built: Path) -> None:
    """Beside llama.cpp's own operations, which round activations to 8 bits; with another scale of scores than usual."""
    lines = in_child(START + VIEWED, built).stdout.splitlines()
    assert len(lines) == 4
    for line in lines:
        name, _, off = line.split()
        assert float(off) < (1e-2 if name == "ggml_mul_mat" else 2e-3), line
