"""The products of the native kernels for ARM against float64, in an emulator: what they compute, not how fast.

And a library without operators for ONNX Runtime, as it is there, built for the machine that runs the tests.
"""

from __future__ import annotations

import json
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from emulator import PLAIN, Emulated, compiled, emulated, run
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from native_kernels import (
    EXTREME,
    OPERATORS,
    SCALES,
    Array,
    extreme_blocks,
    ggml_base,
    here,
    matrix,
    random_blocks,
    relink,
    worst_error,
)
from processes import in_child

from llava_edge.runtimes import machine, native
from llava_edge.runtimes.native import build, check, installed
from llava_edge.runtimes.native.ggml import TYPES

TAKEN = sorted(set(TYPES) - {"F16"})
KERNELS = {"i8mm-int8": "max", "dotprod-int8": "cortex-a76"}
PROCESSORS = KERNELS | {"few": "cortex-a76"}  # each with one that has no more than it needs
SANITIZED = ("-O1", "-fsanitize=undefined", "-fno-sanitize-recover=all")


@dataclass(frozen=True)
class Product:
    """x (rows, inner) times weights of a type: blocks (columns, bytes of a row)."""

    kind: str
    blocks: Array
    x: Array
    threads: int = 1

    def exact(self) -> Array:
        expected: Array = self.x.astype(np.float64) @ matrix(self.kind, self.blocks).T
        return expected

    def is_right(self, found: Array | None) -> bool:
        """No further off than rounding explains, and rounded to the nearest: what is left is float32's."""
        chunk, w = 32 if self.kind in ("Q4_0", "Q4_1", "Q8_0") else 256, matrix(self.kind, self.blocks)
        rounded = nearest(self.x, chunk)
        return (
            found is not None
            and bool((np.abs(found - self.exact()) <= worst_error(self.x, w, chunk, 0.5 / 127, 0.0)).all())
            and bool((np.abs(found - rounded @ w.T) <= worst_error(rounded, w, chunk, 0.0, 0.0)).all())
        )


def nearest(x: Array, chunk: int) -> Array:
    """Multiples of a 127th of the largest magnitude in each chunk of inner values, ties to even, in float32."""
    parts = x.reshape(len(x), -1, chunk)
    most = np.abs(parts).max(2, keepdims=True)
    whole = np.rint(parts * (np.float32(127) / most)).astype(np.float64)
    found: Array = (whole * (most / np.float32(127))).reshape(x.shape)
    return found


def multiplied(arm_program: Path, products: Sequence[Product], kernel: str, processor: str = "") -> list[Array | None]:
    """(rows, columns) of each, in one process; None: not taken. processor: another one than the kernel's."""
    given = b""
    for product in products:
        (rows, inner), (columns, size) = product.x.shape, product.blocks.shape
        head = np.array([TYPES[product.kind], rows, columns, inner, size, product.threads], np.int32)
        given += head.tobytes() + product.blocks.tobytes() + product.x.astype(np.float32).tobytes()
    said = run(arm_program, kernel, processor=processor or PROCESSORS[kernel], given=given)
    found, at = list[Array | None](), 0
    for product in products:
        shape = (len(product.x), len(product.blocks))
        taken = np.frombuffer(said, np.int32, 1, at)[0]
        values = np.frombuffer(said, np.float32, shape[0] * shape[1], at + 4).reshape(shape)
        found.append(values if taken else None)
        at += 4 + values.nbytes
    assert at == len(said)
    return found


def every_shape() -> list[Product]:
    """One of everything; tails of tiles, panels and blocks; more than one block of columns."""
    numbers, products = np.random.default_rng(1), []
    for kind in TAKEN:
        inners = (32, 96, 288) if GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0] == 32 else ()
        shapes = ((1, 1, 256), (33, 1, 512), (7, 17, 768), (45, 70, 1280), *((34, 5, inner) for inner in inners))
        for rows, columns, inner in shapes:
            blocks = random_blocks(kind, columns, inner, numbers, np.array([0.01, -0.02, 0.005]))
            products.append(Product(kind, blocks, numbers.standard_normal((rows, inner), np.float32), threads=2))
    return products


def any_block() -> list[Product]:
    """Random bytes, scales from nothing to the largest, activations of any size with outliers."""
    numbers, products = np.random.default_rng(2), []
    for kind in TAKEN:
        for power in range(-12, 13, 2):
            x = numbers.standard_normal((9, 512), np.float32) * np.float32(10.0**power)
            x[:, numbers.integers(0, 512, 4)] *= 1000
            products.append(Product(kind, random_blocks(kind, 19, 512, numbers, EXTREME), x))
    return products


def extreme_bytes() -> list[Product]:
    """Whole numbers times +-127 are exact."""
    numbers, products = np.random.default_rng(3), []
    x = np.where(numbers.random((3, 512)) < 0.5, -1, 1).astype(np.float32)
    x[0], x[1] = 1, -1
    for kind in TAKEN:
        products.append(Product(kind, extreme_blocks(kind, numbers), x))
    return products


def are_right(products: Sequence[Product], found: Sequence[Array | None]) -> list[bool]:
    return [product.is_right(values) for product, values in zip(products, found, strict=True)]


def taken_by(kernel: str, products: Sequence[Product]) -> list[Product]:
    """With no more rows than it takes."""
    return [replace(product, x=product.x[:31]) for product in products] if kernel == "few" else list(products)


@emulated
@pytest.mark.parametrize("kernel", PROCESSORS)
@pytest.mark.parametrize("some", [every_shape, any_block, extreme_bytes])
def test_products_are_what_rounding_explains(arm_program: Path, some: Callable[[], list[Product]], kernel: str) -> None:
    products = taken_by(kernel, some())
    found = multiplied(arm_program, products, kernel)
    assert are_right(products, found) == [True] * len(products)
    for product, values in zip(products, found, strict=True):
        assert values is not None
        if some is every_shape and values.size > 100:
            error = np.sqrt(((values - product.exact()) ** 2).mean() / (product.exact() ** 2).mean())
            assert 0 < error < 2e-2
        if some is extreme_bytes:
            np.testing.assert_allclose(values, product.exact(), rtol=1e-5, atol=1e-2)


@emulated
@pytest.mark.parametrize("kernel", PROCESSORS)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_wrong_product_is_seen(arm_program: Path, axis: int, kernel: str) -> None:
    """Rows or columns that have changed places, or inner values that meet the next group's."""
    products = taken_by(kernel, [product for product in every_shape() if product.x.shape == (45, 1280)])
    asked = [replace(product, x=np.roll(product.x, 32, 1)) if axis == 2 else product for product in products]
    found = [
        values if values is None or axis == 2 else np.roll(values, 1, axis)
        for values in multiplied(arm_program, asked, kernel)
    ]
    assert are_right(products, found) == [False] * len(products)


@emulated
@pytest.mark.parametrize("kernel", PROCESSORS)
def test_what_is_not_finite_is_not_hidden(arm_program: Path, kernel: str) -> None:
    numbers = np.random.default_rng(3)
    for kind in TAKEN:
        good = Product(
            kind,
            random_blocks(kind, 20, 256, numbers, np.array([0.01])),
            numbers.standard_normal((11, 256), np.float32),
        )
        products = []
        for bad in (np.nan, np.inf, -np.inf):
            x, blocks = good.x.copy(), good.blocks.copy()
            x[2, 100] = bad
            blocks[4, SCALES[kind][0] :][:2] = np.array([bad], np.float16).view(np.uint8)
            products += [Product(kind, good.blocks, x), Product(kind, blocks, good.x)]
        for number, found in enumerate(multiplied(arm_program, products, kernel)):
            assert found is not None
            at, axis = ((2, 0), (4, 1))[number % 2]
            assert not np.isfinite(found.take(at, axis)).any()
            assert np.isfinite(np.delete(found, at, axis)).all()


@emulated
def test_a_row_gets_the_same_bits_alone_and_among_others(arm_program: Path) -> None:
    numbers = np.random.default_rng(4)
    for kind in [*TAKEN, "F16"]:
        blocks = random_blocks(kind, 33, 768, numbers, np.array([0.01, -0.02, 0.005]))
        x = numbers.standard_normal((9, 768), np.float32)
        alone = [Product(kind, blocks, x[row : row + 1]) for row in range(9)]
        together, *single = multiplied(arm_program, [Product(kind, blocks, x, threads=2), *alone], "few")
        assert together is not None
        for row, found in enumerate(single):
            assert found is not None
            assert (found[0] == together[row]).all()


@emulated
@pytest.mark.parametrize(("columns", "inner"), [(64, 8), (5, 64), (33, 520)])
def test_halves_as_of_an_adapter(arm_program: Path, columns: int, inner: int) -> None:
    """In float32: nothing is rounded."""
    numbers = np.random.default_rng(5)
    product = Product(
        "F16",
        random_blocks("F16", columns, inner, numbers, np.array([0.01])),
        numbers.standard_normal((7, inner), np.float32),
    )
    (found,) = multiplied(arm_program, [product], "few")
    assert found is not None
    np.testing.assert_allclose(found, product.exact(), rtol=0, atol=1e-6)


@emulated
def test_what_there_is_not_is_not_taken(arm_program: Path) -> None:
    """Many rows of float16: left to llama.cpp. Without the instructions nothing works, and nothing crashes."""
    x = np.ones((2, 256), np.float32)
    halves, bytes_ = Product("F16", np.zeros((3, 512), np.uint8), x), Product("Q8_0", np.zeros((3, 272), np.uint8), x)
    assert multiplied(arm_program, [bytes_, halves], "few", PLAIN) == [None, None]
    for kernel, processor in KERNELS.items():
        assert multiplied(arm_program, [halves], kernel) == [None]
        assert multiplied(arm_program, [bytes_], kernel, PLAIN) == [None]
        assert run(arm_program, processor=processor).decode().split()[0] == kernel
    assert run(arm_program).decode().split() == list(KERNELS)
    assert run(arm_program, processor=PLAIN).split() == []


@emulated
@pytest.mark.slow
def test_the_sanitizer_finds_nothing(tmp_path: Path) -> None:
    products = [*every_shape(), *any_block(), *extreme_bytes()]
    compiled(tmp_path, *SANITIZED)
    program = tmp_path / "program"
    for kernel in PROCESSORS:
        some = taken_by(kernel, products)
        assert all(are_right(some, multiplied(program, some, kernel)))
    with closing(Emulated(program)) as emulator:
        for way, queries in (("few", 9), ("neon", 45)):
            inputs = check.attention_inputs(4, 2, queries, 523, 80)
            found = emulator.attend(way, *inputs, threads=2)
            np.testing.assert_allclose(found, check.exact_attention(*inputs), rtol=0, atol=3e-6)
            q, k, v, mask = check.attention_inputs(4, 2, queries, 523, 64)
            (k, k_blocks), (v, v_blocks) = map(check.in_eight_bits, (k, v))
            found = emulator.attend(way, q, k_blocks, v_blocks, mask, threads=2)
            np.testing.assert_allclose(found, check.exact_attention(q, k, v, mask), rtol=0, atol=3e-6)


@pytest.mark.parametrize(
    ("architecture", "features", "reason"),
    [
        ("aarch64", ["asimd", "asimddp"], "Not built for this machine."),
        ("aarch64", ["asimd"], "This processor lacks the instructions of FEAT_DotProd."),
        ("riscv64", [], "Native kernels exist only for Linux on x86-64 and aarch64."),
    ],
)
def test_machines_that_have_kernels(
    monkeypatch: pytest.MonkeyPatch, architecture: str, features: list[str], reason: str
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "machine", lambda: architecture)
    monkeypatch.setattr(machine, "processor", lambda: ("processor", features))
    assert native.status().reason == reason


CHECK = """
import sys
from llava_edge.runtimes.native import check
check.REPEATS = check.SECONDS = 0
check.MANY_ROWS = check.SOME_ROWS = check.SIXTEEN_ROWS = check.ONE_ROW = check.EIGHT_ROWS = (8, 64, 256)
check.ADAPTER = (64, 64)
check.main(sys.argv[1])
"""


@here
def test_operators_that_are_not_there_are_neither_tried_nor_used(
    native_build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, isolated_home: Path
) -> None:
    units = [build.Unit("product.cpp"), build.Unit("no_such_file.cpp", kernel="AMX")]
    left_out = build.build(tmp_path / "products.so", tmp_path / installed.OPERATOR, units=units)
    assert left_out.keys() == {"AMX"}
    assert "no_such_file.cpp does not compile" in left_out["AMX"]
    assert not (tmp_path / installed.OPERATOR).exists()
    relink(native_build, tmp_path / installed.LIBRARY, OPERATORS, ggml_base())
    facts = json.loads(in_child(CHECK, tmp_path / installed.LIBRARY).stdout.splitlines()[-1])
    assert facts["problems"] == {}
    assert "projector" not in facts
    for races in facts["types"].values():
        races["many"]["plain"] = 1e9

    def copy_library(target: Path, operator: Path) -> dict[str, str]:
        shutil.copy(tmp_path / installed.LIBRARY, target)
        return left_out

    monkeypatch.setattr(build, "build", copy_library)
    monkeypatch.setattr(native, "_run_check", lambda library: facts)
    messages: list[str] = []
    found = native.prepare(messages.append)
    assert messages[1].startswith("AMX kernels are left out: no_such_file.cpp does not compile: ")
    assert {kind for kind, _, _ in found.many_rows} == set(TYPES)
    assert native.operator_library() is None
    assert native.projector_library() is None
