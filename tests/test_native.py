"""The native kernels against float64, and all that keeps a wrong one from being used.

One library is built for all tests. Where the processor has no AVX-512, plain C++ computes that (avx512.h); where it
refuses AVX-VNNI or the matrix unit, a signal handler does (missing_instructions.cpp). What kernels compute is tested on
every machine, not their speed.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import Run
from hypothesis import given
from hypothesis import strategies as st
from native_kernels import (
    EXTREME,
    INT16,
    OPERATORS,
    ROUNDED,
    TAKEN,
    UNITS,
    Kernels,
    extreme_blocks,
    fast,
    found_out,
    ggml_base,
    here,
    install,
    matrix,
    random_blocks,
    relink,
    takes,
    worst_error,
)
from processes import in_child

from llava_edge import cli, gguf
from llava_edge.cli import doctor
from llava_edge.errors import UnavailableError
from llava_edge.options import EngineOptions
from llava_edge.runtimes import bindings, machine, native, presets, probe
from llava_edge.runtimes.native import build, choice, installed
from llava_edge.runtimes.native.ggml import TYPES

pytestmark = here

# Relative, root of mean square.
RANDOM_ERROR = {"int8": 2e-2, "bf16": 5e-3, "avx2": 2e-3, "avxvnni": 2e-3, "avx512vnni": 2e-3}
BYTES = [(kernel, kind) for kernel, kinds in TAKEN.items() for kind in sorted(kinds)]


@pytest.fixture(scope="module")
def built(native_build: Path) -> Path:
    return Path(os.environ.get("LLAVA_EDGE_TEST_NATIVE", native_build / installed.LIBRARY))


@pytest.fixture(scope="module")
def kernels(built: Path) -> Kernels:
    return Kernels(built)


@pytest.fixture(scope="module")
def for_models(built: Path, native_build: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is loaded with a whole model: kernels that are as fast as this processor."""
    if "LLAVA_EDGE_TEST_NATIVE" in os.environ:
        return built
    return fast(native_build, tmp_path_factory.mktemp("fast") / installed.LIBRARY)


@pytest.fixture(scope="module", params=["avx512", "avx2"])
def few(
    request: pytest.FixtureRequest, kernels: Kernels, native_build: Path, tmp_path_factory: pytest.TempPathFactory
) -> Kernels:
    """With AVX-512's kernel for 16 columns, which is preferred, and with AVX2's."""
    if request.param == "avx512":
        return kernels
    path = tmp_path_factory.mktemp("few") / installed.LIBRARY
    return Kernels(relink(native_build, path, OPERATORS, ggml_base()))


def fewer(kernel: str, count: int, most: int) -> int:
    """At most `most` where every 32 products may take a signal."""
    return min(count, most) if kernel.startswith("avxvnni") else count


def rounded(kernel: str, kind: str) -> tuple[int, float, float]:
    """Like llama.cpp's, bytes have a scale for each block of 32 where the format has."""
    chunk, of_x, of_w = ROUNDED[kernel]
    own = kernel in TAKEN and kind in ("Q4_0", "Q4_1", "Q8_0")
    return (32 if own else chunk), of_x, of_w


def test_all_kernels_are_there(kernels: Kernels) -> None:
    assert kernels.names() == list(ROUNDED)


def test_what_others_told_the_matrix_unit_stays(kernels: Kernels) -> None:
    """ggml's own kernels configure it once in each thread, and die of an illegal instruction otherwise."""
    x, blocks = np.ones((40, 512), np.float32), np.zeros((70, 512 // 32 * 18), np.uint8)
    for kernel in ("amx-bf16", "amx-int8"):
        for palette in (1, 0):
            kernels.configure_tiles(palette)
            kernels.multiply(kernel, "Q4_0", blocks, x)
            assert kernels.tiles_are_configured(palette)
            assert not kernels.tiles_are_configured(1 - palette)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("kernel", ROUNDED)
def test_products_of_every_type_and_shape(kernels: Kernels, kernel: str, kind: str) -> None:
    if not takes(kernel, kind):
        with pytest.raises(AssertionError):
            kernels.multiply(kernel, kind, np.zeros((1, 1024), np.uint8), np.zeros((1, 256), np.float32))
        return
    numbers = np.random.default_rng(1)
    # one of everything; tails of tiles, panels and blocks; more than one block of columns
    for rows, columns, inner in ((1, 1, 256), (33, 1, 512), (6, 17, 768), (45, 70, fewer(kernel, 1280, 256))):
        rows = fewer(kernel, rows, 7)
        blocks = random_blocks(kind, columns, inner, numbers, np.array([0.01, -0.02, 0.005]))
        x = numbers.standard_normal((rows, inner), np.float32)
        w = matrix(kind, blocks)
        expected = x.astype(np.float64) @ w.T
        found = kernels.multiply(kernel, kind, blocks, x, threads=2)
        assert (np.abs(found - expected) <= worst_error(x, w, *rounded(kernel, kind))).all()
        if rows * columns > 100:
            error = np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean())
            assert 0 < error < RANDOM_ERROR[kernel.rpartition("-")[2]]


@pytest.mark.parametrize("kernel", ROUNDED)
def test_inner_dimensions_of_a_multiple_of_32(kernels: Kernels, kernel: str) -> None:
    numbers = np.random.default_rng(2)
    kind = "Q8_0" if takes(kernel, "Q8_0") else "Q4_1"
    for inner in (32, 96, 288, 576, 1056):
        blocks = random_blocks(kind, 5, inner, numbers, np.array([0.01]))
        x = numbers.standard_normal((fewer(kernel, 34, 7), inner), np.float32)
        w = matrix(kind, blocks)
        found = kernels.multiply(kernel, kind, blocks, x)
        assert (np.abs(found - x.astype(np.float64) @ w.T) <= worst_error(x, w, *rounded(kernel, kind))).all()


@pytest.mark.parametrize("kernel", ROUNDED)
def test_threads_share_a_product_of_many_columns(kernels: Kernels, kernel: str) -> None:
    """Several blocks of as many panels as a kernel takes at once, and what is left."""
    numbers = np.random.default_rng(8)
    blocks = random_blocks("Q4_0", fewer(kernel, 1250, 330), 256, numbers, np.array([0.01]))
    x = numbers.standard_normal((5, 256), np.float32)
    alone = kernels.multiply(kernel, "Q4_0", blocks, x)
    for threads in (2, 3):
        assert (kernels.multiply(kernel, "Q4_0", blocks, x, threads=threads) == alone).all()
    w = matrix("Q4_0", blocks)
    assert (np.abs(alone - x.astype(np.float64) @ w.T) <= worst_error(x, w, *rounded(kernel, "Q4_0"))).all()


def test_threads_have_memory_of_their_own(kernels: Kernels) -> None:
    """So much to do that all of them are at it at the same time, whatever else the machine does."""
    numbers = np.random.default_rng(9)
    blocks = random_blocks("Q4_0", 4096, 1024, numbers, np.array([0.01]))
    x = numbers.standard_normal((64, 1024), np.float32)
    alone = kernels.multiply("avx2", "Q4_0", blocks, x)
    for _ in range(3):
        assert (kernels.multiply("avx2", "Q4_0", blocks, x, threads=3) == alone).all()


def test_later_products_take_no_more_memory(kernels: Kernels) -> None:
    def taken() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")

    x, blocks = np.ones((5, 256), np.float32), np.zeros((4, 256 // 32 * 18), np.uint8)
    for kernel in ("avx2", "few"):
        kernels.multiply(kernel, "Q4_0", blocks, x)
        before = taken()
        for _ in range(30):
            kernels.multiply(kernel, "Q4_0", blocks, x)
        assert taken() < before + (30 << 20)  # of 2 MB at least, whenever it has to grow


@given(seed=st.integers(0, 1 << 32), kind=st.sampled_from(sorted(TYPES)), power=st.integers(-12, 12))
def test_any_block_and_any_activation(kernels: Kernels, seed: int, kind: str, power: int) -> None:
    """Random bytes, scales from nothing to the largest, activations with outliers: never further off than stated."""
    numbers = np.random.default_rng(seed)
    blocks = random_blocks(kind, 3, 256, numbers, EXTREME)
    x = numbers.standard_normal((2, 256), np.float32) * np.float32(10.0**power)
    x[:, numbers.integers(0, 256, 4)] *= 1000
    w = matrix(kind, blocks)
    expected = x.astype(np.float64) @ w.T
    for kernel in ROUNDED:
        if takes(kernel, kind):
            found = kernels.multiply(kernel, kind, blocks, x)
            assert (np.abs(found - expected) <= worst_error(x, w, *rounded(kernel, kind))).all(), kernel


@pytest.mark.parametrize("kernel", ROUNDED)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_hidden(kernels: Kernels, kernel: str, bad: float) -> None:
    numbers = np.random.default_rng(3)
    blocks = random_blocks("Q4_0", 20, 256, numbers, np.array([0.01]))
    x = numbers.standard_normal((7, 256), np.float32)
    x[2, 100] = bad
    found = kernels.multiply(kernel, "Q4_0", blocks, x)
    assert not np.isfinite(found[2]).any()
    assert np.isfinite(np.delete(found, 2, 0)).all()
    blocks[4, :2] = np.array([bad], np.float16).view(np.uint8)
    x[2, 100] = 1
    found = kernels.multiply(kernel, "Q4_0", blocks, x)
    assert not np.isfinite(found[:, 4]).any()
    assert np.isfinite(np.delete(found, 4, 1)).all()


@pytest.mark.parametrize(("kernel", "kind"), BYTES)
def test_the_extreme_values_of_bytes(kernels: Kernels, kernel: str, kind: str) -> None:
    """Whole numbers times +-127 are exact."""
    numbers = np.random.default_rng(6)
    blocks = extreme_blocks(kind, numbers)
    x = np.where(numbers.random((3, 512)) < 0.5, -1, 1).astype(np.float32)
    x[0], x[1] = 1, -1
    expected = x.astype(np.float64) @ matrix(kind, blocks).T
    np.testing.assert_allclose(kernels.multiply(kernel, kind, blocks, x), expected, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("kernel", [name for name, how in ROUNDED.items() if how == INT16])
@pytest.mark.parametrize("inner", [32, 64, 256, 512])
def test_sums_of_the_largest_whole_numbers_fit(kernels: Kernels, kernel: str, inner: int) -> None:
    """Weights are rounded to as many bits as leave room: to more where fewer of them are added up."""
    blocks = extreme_blocks("Q8_0", np.random.default_rng(6))[:, : inner // 32 * 34]
    x, w = np.array([[1], [-1]], np.float32).repeat(inner, 1), matrix("Q8_0", blocks)
    found = kernels.multiply(kernel, "Q8_0", blocks, x)
    assert (np.abs(found - x.astype(np.float64) @ w.T) <= worst_error(x, w, *INT16)).all()


@pytest.mark.parametrize(
    ("kind", "chunk", "inner"),
    [
        *(("F16", 1 << 20, inner) for inner in (8, 16, 576)),
        *((kind, 32, inner) for kind in ("Q4_0", "Q4_1", "Q8_0") for inner in (32, 96)),
        *((kind, 256, 256) for kind in ("Q4_K", "Q5_K", "Q6_K")),
    ],
)
def test_products_of_few_rows(few: Kernels, kind: str, chunk: int, inner: int) -> None:
    numbers, of_x = np.random.default_rng(4), 0.0 if kind == "F16" else 0.5 / 127
    shapes = ((1, 1, 1, EXTREME), (5, 7, 3, EXTREME), (11, 36, 2, EXTREME), (31, 70, 16, EXTREME[4:5]))
    for rows, columns, blocks_in_row, scales in shapes:
        blocks = random_blocks(kind, columns, inner * blocks_in_row, numbers, scales)
        x = numbers.standard_normal((rows, inner * blocks_in_row), np.float32)
        w = matrix(kind, blocks)
        found = few.multiply("few", kind, blocks, x, threads=2)
        assert (np.abs(found - x.astype(np.float64) @ w.T) <= worst_error(x, w, chunk, of_x, 0.0)).all()
        # Speculative decoding relies on the same bits for a row alone and among others.
        for row in range(rows):
            assert (few.multiply("few", kind, blocks, x[row : row + 1]) == found[row]).all()
    x[3, 5] = np.nan
    found = few.multiply("few", kind, blocks, x)
    assert np.isnan(found[3]).all()
    assert np.isfinite(np.delete(found, 3, 0)).all()


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_the_extreme_values_of_few_rows(few: Kernels, kind: str) -> None:
    """All the largest in magnitude, signs mixed: sums of 16 bits must not overflow."""
    numbers = np.random.default_rng(5)
    blocks = random_blocks(kind, 20, 256, numbers, np.array([1]))
    head = 4 if kind == "Q4_1" else 2
    parts = blocks.reshape(20, 8, -1)
    parts[:, :, head:] = np.tile(np.array([0xFF, 0x80, 0x7F, 0x01], np.uint8), 5)[:, None, None]
    x = np.where(numbers.random((3, 256)) < 0.5, -1, 1).astype(np.float32)
    x[0] = 1
    expected = x.astype(np.float64) @ matrix(kind, blocks).T
    np.testing.assert_allclose(few.multiply("few", kind, blocks, x), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
@pytest.mark.parametrize("scale", [0x7F, 0x80, 0xFF])
def test_the_largest_whole_numbers_of_few_rows(few: Kernels, kind: str, scale: int) -> None:
    """Every value and every scale at its end: what is added up before float32 has to have room."""
    numbers = np.random.default_rng(6)
    blocks = random_blocks(kind, 33, 512, numbers, np.array([1]))
    parts = blocks.reshape(33 * 2, -1)
    parts[:, slice(0, 208) if kind == "Q6_K" else slice(4, None)] = 0xFF
    parts[:, slice(192, 208) if kind == "Q6_K" else slice(4, 16)] = scale
    for rows in (1, 2, 3, 9):
        x = np.where(numbers.random((rows, 512)) < 0.5, -1, 1).astype(np.float32)
        x[0] = 1
        expected = x.astype(np.float64) @ matrix(kind, blocks).T
        found = few.multiply("few", kind, blocks, x)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(matrix(kind, blocks)).sum(1).max())
        for row in range(rows):
            assert (few.multiply("few", kind, blocks, x[row : row + 1]) == found[row]).all()


WHOLE = """
import json, sys, threading
from pathlib import Path
import numpy as np
from llava_edge.errors import BundleError
from llava_edge.runtimes import CancelledError, native
from llava_edge.runtimes.branches import Branches
from llava_edge.runtimes.language import LanguageModel

model = LanguageModel(Path(sys.argv[1]), context=512, threads=2, repack=False, kv=sys.argv[2])
never, stopped = threading.Event(), threading.Event()
tokens = [3 + i % 90 for i in range(70)]
model.evaluate_tokens(tokens, never)
first = model.logits().copy()
model.evaluate_tokens([5], never)
second = model.logits().copy()
model.truncate(0)
asked = []
class Late(threading.Event):
    def is_set(self):
        asked.append(1)
        return len(asked) > 20
try:
    model.evaluate_tokens(tokens, Late())
    stopped = False
except CancelledError:
    stopped = True
model.evaluate_tokens(tokens, never)
again = bool((model.logits() == first).all())
held = len(model.cached_keys)
model.truncate(0)
model.evaluate_embeddings(np.full((90, model.hidden_size), np.nan, np.float32), [("nan", i) for i in range(90)], never)
try:
    model.logits()
    refused = False
except BundleError:
    refused = not model.cached_keys
model.evaluate_tokens(tokens, never)
recovered = bool((model.logits() == first).all())
model.truncate(0)
model.evaluate_tokens((tokens * 5)[:300], never)
model.output_hidden_states(True)
alone = []
for token in tokens[:8]:
    alone.append([model.evaluate_all_logits([token], never)[0], model.hidden_state().copy()])
model.truncate(300)
numbers = []
for i, token in enumerate(tokens[:8]):
    model._threads._adaptive._supported, model._threads._adaptive.count = False, 1 + i % 2
    model.evaluate_tokens([token], never)
    numbers.append(bool((model.logits() == alone[i][0]).all()))
texts = []
for model._threads._adaptive.count in (1, 2):
    model.truncate(0)
    for length in (17, 33, 5, 31):
        model.evaluate_tokens((tokens * 2)[:length], never)
        texts.append(model.logits().tobytes())
    texts.append(bytes(model.save_state(86)))
model.truncate(0)
model.evaluate_tokens((tokens * 5)[:300], never)
rows = model.evaluate_all_logits(tokens[:8], never)
same = all((rows[i] == alone[i][0]).all() and (model.hidden_state(i) == alone[i][1]).all() for i in range(8))
model.output_hidden_states(False)
model.truncate(40)
apart, tails = [], [tokens[3:9], tokens[20:31], tokens[:40]]
for tail in tails:
    for part in (tail, [7]):
        model.evaluate_tokens(part, never)
    apart.append(model.logits().copy())
    model.truncate(40)
branches = Branches(model)
for tail in tails:
    model.truncate(40)
    model.evaluate_tokens(tail, never)
    branches.start(40 if tail is not tails[0] else 0)
branches.step([7, 7, 7], [1, 2, 3])
together = [bool((model.logits(row) == apart[row]).all()) for row in range(3)]
branches.end(1)  # its positions stay, so that the next prompt's come in order
model.truncate(0)
other = tokens[30:] + tokens
model.evaluate_tokens(other, never)
branches.start(0)
branches.step([7, 8], [1, 3])
joined = model.logits(0).copy()
model.truncate(0)
long, steps = (tokens * 4)[:270], []
model.evaluate_tokens(long, never, lambda: steps.append(branches.step([9], [3])))
in_parts = model.logits().copy()
branches.close()
model.truncate(0)
model.evaluate_tokens(other, never)
model.evaluate_tokens([7], never)
together.append(bool((model.logits() == joined).all()))
model.truncate(0)
model.evaluate_tokens(long, never)
together.append(len(steps) == 1 and bool((model.logits() == in_parts).all()))
print(json.dumps({"reason": model.native.reason, "used": model.native.used, "stopped": stopped, "again": again,
                  "held": held, "refused": refused, "recovered": recovered, "same": bool(same), "together": together,
                  "numbers": numbers, "invariant": model.batch_invariant, "texts": texts[:5] == texts[5:],
                  "logits": [first.tolist(), second.tolist()]}))
"""


def whole(model: Path, setting: str = "", kv: str = "f16") -> dict[str, Any]:
    """What a process of its own computes, since a backend stays in its process."""
    done = in_child(WHOLE, model, kv, environment={**os.environ, "LLAVA_EDGE_NATIVE": setting})
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def names(found: choice.Status) -> dict[str, str]:
    return {kind: kernel for kind, kernel, _ in found.many_rows}


def relative(a: list[float], b: list[float]) -> float:
    return float(np.linalg.norm(np.subtract(a, b)) / np.linalg.norm(b))


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """language.gguf in Q4_0 with fewer heads for keys than for queries."""
    from llava_edge.runtimes import probe

    path = tmp_path_factory.mktemp("grouped") / "language.gguf"
    probe.write_model(path, "Q4_0", kv_heads=2)
    return path


def test_a_model_computes_the_same_through_the_backend(for_models: Path, grouped: Path) -> None:
    races = {kind: race | {"one": {"plain": 3.0, "few": 1.0}} for kind, race in found_out()["types"].items()}
    install(for_models, types=races)
    stock = {kv: whole(grouped, "off", kv) for kv in ("f16", "q8_0")}
    for found in stock.values():
        assert "Turned off" in found["reason"]
        assert not found["used"]
        assert not found["invariant"]
    cases = (
        ("avx2", "f16", 1.5e-2),
        ("amx-bf16", "f16", 1.5e-2),
        ("avx2-int8", "f16", 5e-3),
        ("avx2-int8", "q8_0", 1e-2),
    )
    for kernel, kv, bound in cases:
        ours = whole(grouped, kernel, kv)
        assert kernel in ours["reason"]
        assert "few rows of" in ours["reason"]
        assert ours["used"]
        assert ours["invariant"]
        for found, expected in zip(ours["logits"], stock[kv]["logits"], strict=True):
            # llama.cpp rounds activations to 8 bits, as only the last does.
            assert 0 < relative(found, expected) < bound
        assert ours["stopped"]
        assert ours["again"]
        assert ours["held"] == 70
        assert ours["refused"]
        assert ours["same"]  # speculative decoding needs that
        assert ours["together"] == [True] * 5  # an answer among others, and a prompt with a token of another between
        assert ours["numbers"] == [True] * 8  # threads come and go with other programs
        assert ours["texts"]
        assert ours["recovered"]  # no NaN that was left in the KV cache counts
        assert ("Q4_0", kernel, 16) in choice.choose(found_out(), kernel).many_rows
    # Kept pictures are not another kernel's.
    assert choice.choose(found_out(), "avx2").identity != choice.choose(found_out(), "amx-bf16").identity


CLEARED = """
import ctypes, sys
from pathlib import Path
from llava_edge.runtimes import bindings
from llava_edge.runtimes.native.ggml import Ggml
bindings.library()
ggml = Ggml()
assert ggml.load_backend(Path(sys.argv[1]))
for size in (1000, 65536, 1000001, 5 << 20):
    kind = ggml.call_pointer("ggml_backend_cpu_buffer_type")
    buffer = ggml.call_pointer("ggml_backend_buft_alloc_buffer", kind, ctypes.c_size_t(size))
    memory = (ctypes.c_char * size).from_address(ggml.call_pointer("ggml_backend_buffer_get_base", buffer))
    for value in (0, 7, 0):
        memory[:] = bytes([9]) * size
        ggml.call_number("ggml_backend_buffer_clear", buffer, ctypes.c_uint8(value))
        assert memory[:] == bytes([value]) * size, (size, value)
    ggml.call_number("ggml_backend_buffer_free", buffer)
"""

TAKEN_BY_A_CONTEXT = """
import sys, threading
from pathlib import Path
from llava_edge import gguf
from llava_edge.runtimes import presets
from llava_edge.runtimes.language import LanguageModel
def private():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Anonymous"))
room = presets.memory_bytes(gguf.read(Path(sys.argv[1])), 65536, "f16")
LanguageModel(Path(sys.argv[1]), context=512, threads=1).close()
before = private()
model = LanguageModel(Path(sys.argv[1]), context=65536, threads=1)
loaded = private() - before
model.evaluate_tokens([5] * 1000, threading.Event())
print(loaded / room, (private() - before) / room)
"""


def test_memory_is_cleared(built: Path) -> None:
    in_child(CLEARED, built)


def test_a_context_takes_memory_as_it_is_filled(built: Path, grouped: Path) -> None:
    """Of 65,536 positions, after 1,000; llama.cpp alone takes all of it at once."""
    install(built)

    def taken(setting: str) -> list[float]:
        done = in_child(TAKEN_BY_A_CONTEXT, grouped, environment={**os.environ, "LLAVA_EDGE_NATIVE": setting})
        return [float(share) for share in done.stdout.split()]

    assert min(taken("off")) > 0.9
    assert max(taken("")) < 0.5


def test_what_has_changed_since_it_was_tried_is_not_used(built: Path, grouped: Path) -> None:
    folder = install(built, sha256="0" * 64)
    found = whole(grouped)
    assert not found["used"]
    assert found["reason"] == "Not used: their file has changed since it was tested."
    shutil.rmtree(folder)
    folder = install(built)
    (folder / "kernels.so").unlink()
    assert not whole(grouped)["used"]
    wrong = [json.dumps(found_out(types=[])), json.dumps(found_out(types={}))]
    for damaged in ('{"problems": 1}', '{"problems": []}', "[]", *wrong):
        (folder / "state.json").write_text(damaged, "utf-8")
        assert native.status().reason == "Not used: their cached test results are damaged."


def test_doctor_loads_them(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of tests do not tell that their file has changed, or where it is now."""
    folder = install(built)
    llama = probe.check("llama_cpp")
    assert doctor._native_kernels(llama) == doctor.Finding("native kernels", "ok", native.status().reason)
    with (folder / "kernels.so").open("ab") as file:
        file.write(b"changed")
    llama = probe.check("llama_cpp")
    found = doctor._native_kernels(llama)
    assert (found.level, found.fix) == ("note", choice.COMMAND)
    assert found.text == "Not used: their file has changed since it was tested."
    flags = os.statvfs(folder).f_flag | os.ST_NOEXEC
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=flags))
    found = doctor._native_kernels(llama)
    assert "mounted noexec" in found.text
    assert "LLAVA_EDGE_HOME" in found.fix


def test_what_was_loaded_first_is_used_to_the_end(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By two models that are loaded at the same time, and by later ones, since the backend is the process's."""
    install(built)
    bindings.library()
    monkeypatch.setattr(native, "_process", native._Process())
    times: list[float] = []

    def load(*_: object) -> None:
        time.sleep(0.05)
        times.append(time.monotonic())

    monkeypatch.setattr(native, "_load_backend", load)
    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(lambda _: native.activate(), range(4))
    assert len(times) == 1
    assert first.used
    assert others == [first] * 3
    monkeypatch.setenv("LLAVA_EDGE_NATIVE", "off")
    assert native.activate() == first


def test_what_is_refused_half_loaded_is_not_tried_again(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(built)
    bindings.library()
    monkeypatch.setattr(native, "_process", native._Process())
    tried: list[Path] = []

    def load(path: Path, *_: object) -> None:
        tried.append(path)
        raise UnavailableError("ggml does not accept them.")

    monkeypatch.setattr(native, "_load_backend", load)
    for _ in range(2):
        assert native.activate() == choice.Status("Not used: ggml does not accept them.", choice.COMMAND)
    assert len(tried) == 1


def test_another_version_is_not_used(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(built)
    bindings.library()
    monkeypatch.setattr(native, "_process", native._Process())  # another test may have loaded them
    monkeypatch.setattr(native, "ACCEPTED", {("0.3.36", "0.25.2")})
    found = native.activate()
    assert not found.used
    assert found.reason == "Not used: they do not support llama-cpp-python 0.3.36 with ggml 0.25.3."


def test_a_failed_self_test_is_not_used() -> None:
    one = choice.choose(found_out(problems={"avx2": "avx2 is off by 3.0e-01 on Q4_K."}))
    assert names(one) == {kind: "avx2-int8" if takes("avx2-int8", kind) else "avx512vnni" for kind in TYPES}
    assert "avx2 is off by 3.0e-01 on Q4_K." in one.reason
    problems = {name: f"{name} is off." for name in ("avx2", *ROUNDED, "attention", "few attention")}
    every = choice.choose(found_out(problems=problems))
    assert not every.used
    assert every.reason.startswith("Not used: avx2 is off.")
    misspelt = choice.choose(found_out(), "avx3")
    assert not misspelt.used
    assert misspelt.reason.startswith("Not used: LLAVA_EDGE_NATIVE is 'avx3'; expected one of off, amx-bf16, ")
    killed = choice.choose({"failed": "their check was killed by signal 4"})
    assert killed.reason == "Not used: their check was killed by signal 4."


SELF_TEST = """
import sys
from pathlib import Path
import numpy as np
from llava_edge.runtimes import bindings
from llava_edge.runtimes.native import check
from llava_edge.runtimes.native.ggml import Ggml, Operation, Weights
from llava_edge.runtimes.native.library import Library
bindings.library()
ggml, library = Ggml(), Library(Path(sys.argv[1]))
library.configure()
assert ggml.load_backend(Path(sys.argv[1]))
names = [name for name in library.kernels() if not name.startswith("avxvnni")]  # slow where signals compute them
print([check.check_products(ggml, library, name) for name in [*names, "few"]])
print([check.check_attention(ggml, library, queries) for queries in (9, 45)])
weights = Weights("Q4_0", 64, 256, ggml.quantize("Q4_0", np.ones((64, 256))))
library.configure([("Q4_0", "avx2", 128)])
taken = []
for rows in (1, 31, 32, 127, 128, 8193):
    made = ggml.mul_mat(weights, np.ones((rows, 256), np.float32), device=ggml.device("LLAVA_EDGE"), threads=1)
    taken.append(made is not None)
    if made:
        made.__exit__()
print(taken)
values = Operation.values
Operation.values = lambda self: values(self) * (1.1 if self._device != ggml.device() else 1)
print(check.check_products(ggml, library, "avx2"))
print(check.check_attention(ggml, library, 9))
"""


def test_the_self_test_passes_right_kernels_and_finds_wrong_ones(built: Path) -> None:
    """In a process of its own; the wrong ones give everything 10 % too large."""
    done = in_child(SELF_TEST, built)
    products, attention, taken, wrong_product, wrong_attention = done.stdout.splitlines()
    assert products == str([""] * (len(ROUNDED) - 2 + 1))
    assert attention == str([""] * 2)
    assert taken == str([False, False, False, False, True, False])
    assert wrong_product.startswith("avx2 is off by 1.0e-01")
    assert wrong_attention.startswith("Attention of 9 queries in heads of 64 with 16 bits is off by 1.0e-01")


def test_a_race_beside_other_programs_is_said_to_be_one() -> None:
    slow = {race: {"plain": 1.0} for race in ("many", "some", "sixteen", "eight", "one")}
    changes = {"types": dict.fromkeys(TYPES, slow), "attention": slow}
    for none_pays in (changes, {}):
        quiet, crowded = (choice.choose(found_out(crowded=busy, **none_pays)) for busy in (False, True))
        assert quiet.used == crowded.used == (not none_pays)
        assert crowded.reason == f"{quiet.reason} {choice.BUSY_WARNING}"
        assert not crowded.fix  # it is no failure of set-up


def test_what_is_not_faster_is_not_used() -> None:
    types = found_out()["types"]
    types["Q4_0"] |= {"many": types["Q4_0"]["many"] | {"repacked": 2.0}, "one": {"plain": 2.0, "repacked": 1.0}}
    types["Q4_K"] |= {"many": types["Q4_K"]["many"] | {"repacked": 2.0}, "one": {"plain": 1.0, "repacked": 1.0}}
    types["Q4_K"]["some"] = {"plain": 1.0, "avx2": 1.0}
    types["Q5_K"]["sixteen"] = {"plain": 2.0, "avx2": 1.0, "few": 0.9}
    types["Q8_0"] |= {"many": {"plain": 0.9, **dict.fromkeys(ROUNDED, 1.0)}, "one": {"plain": 1.0}}
    slow_attention = {race: {"plain": 1.0, "ours": 1.0} for race in ("many", "eight", "one")}
    found = choice.choose(found_out(types=types, attention=slow_attention))
    # int8 of the matrix unit would be faster, and has to be asked for
    assert names(found) == dict.fromkeys([kind for kind in TYPES if kind != "Q8_0"], "avx2")
    rows = {kind: least for kind, _, least in found.many_rows}
    assert (rows["Q4_0"], rows["Q5_K"], rows["Q4_K"]) == (16, 32, 128)  # from where unpacking pays
    assert not found.attention
    assert not found.few_attention
    more = slow_attention | {"eight": {"plain": 2.0, "ours": 1.0}}
    assert choice.choose(found_out(attention=more)).few_attention
    assert names(choice.choose(found_out(), "amx-int8")) == dict.fromkeys(TYPES, "amx-int8")
    # Decoding Q4_0 would suffer without llama.cpp's repacking; other types need no copy.
    assert choice.should_repack(found, {"F32", "Q4_0"})
    assert not choice.should_repack(found, {"F32", "Q4_K", "Q6_K"})
    assert choice.should_repack(found, {"F32", "Q4_K", "IQ4_NL"})
    types["Q4_0"]["one"]["few"] = 1.0
    assert not choice.should_repack(choice.choose(found_out(types=types)), {"F32", "Q4_0"})
    # What a picture's prompt wins outweighs what an answer loses, or not.
    for won, repacks in (2.0, True), (40.0, False):
        types["Q4_0"] = types["Q4_0"] | {"many": {"plain": won, "avx2": won / 2, "repacked": won}}
        types["Q4_0"]["one"] = {"plain": 2.0, "few": 1.2, "repacked": 1.0}
        assert choice.should_repack(choice.choose(found_out(types=types)), {"Q4_0"}) == repacks
    types["Q6_K"] |= {"one": {"plain": 1.0, "few": 1.0}, "eight": {"plain": 9.0, "few": 3.0}}
    types["Q5_K"] |= {"one": {"plain": 1.0, "few": 1.2}, "eight": {"plain": 9.0, "few": 3.0}}  # decoding would suffer
    assert choice.choose(found_out(types=types)).few_rows == ("Q4_0", "Q6_K")
    equal = dict.fromkeys(("plain", *ROUNDED), 1.0)
    race = {"many": equal, "some": equal, "sixteen": equal, "eight": {"plain": 1.0}, "one": {"plain": 1.0}}
    slow = dict.fromkeys(TYPES, race)
    nothing = choice.choose(found_out(types=slow, attention=slow_attention))
    assert not nothing.used
    assert nothing.reason == "Not used: llama.cpp's own kernels are as fast here."
    assert choice.should_repack(nothing, {"Q4_K"})


def aged(folder: Path, days: float, *files: str) -> Path:
    """A folder with these files, all as if last touched so long ago."""
    folder.mkdir(parents=True)
    then = time.time() - days * installed.DAY
    for path in (*(folder / name for name in files), folder):
        if path != folder:
            path.touch()
        os.utime(path, (then, then))
    return folder


def test_what_was_not_used_for_long_goes_when_something_is_built(isolated_home: Path, tmp_path: Path) -> None:
    top = isolated_home / "native"
    build = ("kernels.so", "state.json")
    gone = [aged(top / ("a" * 32), 61, *build), aged(top / ("b" * 32), 61), aged(top / "build-killed", 1.1)]
    others = ("d" * 31, "D" * 32, "somebody's", "e" * 32)
    stays = [
        aged(top / ("c" * 32), 59, *build),
        aged(top / "build-now", 0.9, *build),
        *(aged(top / name, 61, *build) for name in others),
    ]
    elsewhere = aged(tmp_path / "elsewhere", 61, *build)
    (top / ("f" * 32)).symlink_to(elsewhere)
    work = aged(tmp_path / "work", 61, *build)
    installed.publish(work, stays[-1])
    assert [path.exists() for path in gone] == [False, False, False]
    assert all((path / "state.json").exists() for path in (*stays, elsewhere))


def test_kernels_that_won_against_another_llama_cpp_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a build with other flags, which changes libggml-cpu and not libggml-base."""
    folders = []
    for number, kernels in enumerate((b"AVX2", b"AVX2", b"AVX-512")):
        package = tmp_path / str(number) / "llama_cpp"
        (package / "lib").mkdir(parents=True)
        for name in ("libggml-base.so", "libggml-base.so.0", "libggml-cpu.so", "libggml-cpu.so.0"):
            (package / "lib" / name).write_bytes(kernels if "cpu" in name else b"base")
        monkeypatch.setattr("llava_edge.runtimes.native.build.package", lambda package=package: package)
        folders.append(installed.folder())
    assert folders[0] == folders[1] != folders[2]


def test_use_is_noted_once_a_day(isolated_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = installed.folder()
    state = aged(folder, 61, "kernels.so", "state.json") / "state.json"
    state.write_text(json.dumps(found_out(operator="0")))
    for ask in (native.status, native.operator_library):
        for days, noted in ((61, True), (0.5, False)):
            before = time.time() - days * installed.DAY
            os.utime(state, (before, before))
            ask()
            assert (state.stat().st_mtime > before + 1) == noted

    def read_only(path: Path) -> None:
        raise PermissionError(path)

    os.utime(state, (0, 0))
    monkeypatch.setattr(os, "utime", read_only)
    assert native.status().used


def test_no_compiler_and_unusable_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert native.prepare().reason.startswith("There is no C++ compiler")
    monkeypatch.setenv("CXX", "false")
    assert "does not compile" in native.prepare().reason
    clang = tmp_path / "clang"
    clang.write_text("#!/bin/sh\necho clang version 16", "utf-8")
    clang.chmod(0o755)
    monkeypatch.setenv("CXX", str(clang))
    assert "set CXX=g++" in native.prepare().reason
    assert not native.status().used


def test_a_limit_on_processes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    found = native.prepare()
    assert "ulimit -u" in found.reason
    assert found.fix == choice.COMMAND


@pytest.mark.parametrize("command", ["run", "chat"])
def test_a_person_is_told_once_that_kernels_can_be_built(
    command: str, micro_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a terminal, and only where the command that is named would help."""
    arguments = [command, "--model", str(micro_bundle), "--device", "cpu", "--threads", "1", "--max-tokens", "2"]
    arguments += ["--prompt", "hi"] if command == "run" else []

    def told() -> int:
        monkeypatch.setattr("sys.stdin", io.StringIO())
        assert cli.execute(arguments) == 0
        return capsys.readouterr().err.count(f"to build them, run: {choice.COMMAND})")

    assert told() == 0
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert told() == 1
    for name, value in (("LLAVA_EDGE_NATIVE", "off"), ("CXX", "no-such-compiler")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert told() == 0


@pytest.mark.parametrize(
    ("state", "kernel", "told"),
    [
        ({"failed": "their check crashed"}, "", f"Not used: their check crashed. Run: {choice.COMMAND}"),
        (found_out(), "nope", "Not used: LLAVA_EDGE_NATIVE is 'nope'; expected one of off, "),
        (found_out(), "off", ""),
    ],
    ids=["failed", "misspelt", "off"],
)
def test_a_person_is_told_why_kernels_are_not_used(
    state: dict[str, Any], kernel: str, told: str, micro_bundle: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed.folder().mkdir(parents=True)
    (installed.folder() / installed.STATE).write_text(json.dumps(state), "utf-8")
    monkeypatch.setenv("LLAVA_EDGE_NATIVE", kernel)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    few = ("--threads", "1", "--max-tokens", "2")
    code, _, err = run("run", "--model", micro_bundle, "--device", "cpu", *few, "--prompt", "hi")
    assert code == 0
    assert f"(native kernels: {told}" in err if told else "kernels" not in err


def test_kernels_that_were_tried_are_not_asked_for(built: Path) -> None:
    assert native.needs_build()
    install(built)
    assert not native.needs_build()


def test_every_feature_that_kernels_ask_for_is_known() -> None:
    """Or tests take the processor for one without it, and try the code for others alone."""
    asked = set[str]()
    for source in build.SOURCES.iterdir():
        asked |= set(re.findall(r'__builtin_cpu_supports\("(\w+)"\)', source.read_text("utf-8")))
    assert {"avx2", "avx512bw", "avx512vnni"} <= asked <= {name.replace("_", "") for name in machine.FEATURES}


def test_without_avx2_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "processor", lambda: ("old", ["avx"]))
    assert native.status().reason == "This processor lacks AVX2, FMA or F16C."
    assert not native.activate().used


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    """The tests of the kernels above, in a process with the address and undefined-behaviour sanitizers."""
    path, tool = tmp_path / "kernels.so", build.compiler()
    assert tool
    flags = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    assert not build.build(path, tmp_path / installed.OPERATOR, units=UNITS, flags=flags)
    libraries = [
        subprocess.run([tool, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",
        "LLAVA_EDGE_TEST_NATIVE": str(path),
    }
    names = "(products or inner or any_block or finite or attention) and not (self_test or sanitizers or aarch64)"
    files = [str(Path(__file__).with_name(f"test_{name}.py")) for name in ("native", "native_attention", "operator")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", names, *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "passed" in done.stdout
    short = "k.multiply('avx2', 'Q4_0', random_blocks('Q4_0', 2, 256, n, np.ones(1))[:, :126], np.ones((1, 256)))"
    script = f"from native_kernels import *; n = np.random.default_rng(0); k = Kernels(Path({str(path)!r})); {short}"
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert "heap-buffer-overflow" in found.stderr  # they would find something


@pytest.mark.slow
def test_set_up_builds_tries_and_uses_them(grouped: Path) -> None:
    said: list[str] = []
    found = native.prepare(said.append)
    assert len(said) == 2
    assert found == native.status()
    state = json.loads((installed.folder() / "state.json").read_text("utf-8"))
    assert state["problems"] == {}
    assert whole(grouped)["used"] == found.used


def test_a_preset_counts_no_copies_that_are_not_made(
    grouped: Path, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where mapped weights are as fast, little memory is no reason for anything else."""
    header = gguf.read(grouped)
    weights = sum(tensor.size for tensor in header.tensors.values())
    monkeypatch.setattr(machine, "available_memory", lambda: presets.memory_bytes(header, 64, "f16") * 2 + weights // 2)
    assert presets.choose(EngineOptions(context=64), header, 4096).name == "memory"
    install(built)
    assert presets.choose(EngineOptions(context=64), header, 4096).name == "latency"
