"""The native kernels called directly, and how far they may be off."""

from __future__ import annotations

import ctypes
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from llava_edge.bundle import sha256_of
from llava_edge.runtimes import bindings, machine
from llava_edge.runtimes.native import build, installed
from llava_edge.runtimes.native.ggml import TYPES

Array = np.ndarray[Any, Any]


# gcc 12 warns of its own header, which makes numbers undefined that it then does not use.
_QUIET = ("-Wno-uninitialized", "-Wno-maybe-uninitialized")


_FOUND = set(machine.processor()[1])
_WIDE = {"avx512bw", "avx512dq", "avx512vl"} <= _FOUND
HAS_VNNI512 = _WIDE and "avx512_vnni" in _FOUND

here = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64" or "f16c" not in _FOUND or build.compiler() is None,
    reason="needs Linux on x86-64 with AVX2, and a C++ compiler",
)


def _testable(unit: build.Unit) -> build.Unit:
    """Every kernel on every machine. Where the processor lacks AVX-512, plain C++ computes it, or AVX2 for AMX's
    kernels; what it refuses of AMX and AVX-VNNI, something else computes."""
    if unit.kernel == "AVX512VNNI" and HAS_VNNI512:
        return replace(unit, flags=(*unit.flags, *_QUIET))
    flags = unit.flags
    if unit.kernel == "AVX512VNNI":
        flags = (*build.AVX2, "-include", str(Path(__file__).with_name("avx512.h")))
        if unit.source == "few_wide_avx512.cpp":
            flags += ("-Og",)  # -O1 would take four times as long to compile
    elif unit.kernel == "AMX" and not (_WIDE and "avx512_bf16" in _FOUND):
        flags = build.AVX2
    return replace(unit, flags=(*flags, *_QUIET, "-DNATIVE_REFUSED_COMPUTED"))


UNITS = (*map(_testable, build.X86_64), build.Unit(str(Path(__file__).with_name("missing_instructions.cpp"))))

EXTREME = np.array([0, 6e-8, -6e-8, 1e-3, -0.5, 1, 300, -2000, 60000], np.float16)  # of scales

# Offsets of float16 in a block.
SCALES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


OPERATORS = ("operators", "linear", "vision_attention")  # sources of ONNX Runtime's library alone


def ggml_base() -> Path:
    """The library of llama.cpp that the backend needs."""
    return next((build.package() / "lib").glob("libggml-base.so*"))


def relink(native_build: Path, path: Path, without: Sequence[str], *libraries: Path, known: Sequence[str] = ()) -> Path:
    """The objects that tests build, but for some sources, linked as if the compiler knew only AVX2 and `known`."""
    objects = [item for item in native_build.glob("*.o") if item.stem.partition("-")[2] not in without]
    listed = build.SOURCES / "kernels.cpp"
    defines = [f"-DNATIVE_HAS_{name}" for name in known]
    command = [build.compiler(), *build.FLAGS, *defines, "-shared", *objects, listed, *libraries, "-o", path]
    subprocess.run([str(part) for part in command], check=True)
    return path


def fast(native_build: Path, path: Path) -> Path:
    """llama.cpp's library for whole models: without what plain C++ or a signal handler computes, 15 times as slowly."""
    known = ["AMX", *(["AVX512VNNI"] if HAS_VNNI512 else [])]
    return relink(native_build, path, OPERATORS, ggml_base(), known=known)


# What is rounded how: inner values with one scale, and the largest error relative to the largest of them.
INT16 = (256, 0.5 / 8191, 0.5 / 1023)
ROUNDED = {
    "amx-bf16": (1 << 20, 2**-8, 2**-8),
    "amx-int8": (256, 0.5 / 127, 0.5 / 127),
    "avx512vnni-int8": (256, 0.5 / 127, 0.0),
    "avx512vnni": INT16,
    "avxvnni-int8": (256, 0.5 / 127, 0.0),
    "avxvnni": INT16,
    "avx2-int8": (256, 0.5 / 127, 0.0),
    "avx2": INT16,
}
TAKEN = {
    "avx2-int8": set(TYPES) - {"F16", "Q8_0"},
    "avxvnni-int8": set(TYPES) - {"F16"},
    "avx512vnni-int8": set(TYPES) - {"F16"},
}  # others: all types


class Attention(ctypes.Structure):
    """`struct Attention` of runtimes/native/src/kernels.h."""

    _fields_ = (
        *((f"{name}{part}", ctypes.c_void_p if not part else ctypes.c_size_t)
          for name in ("q", "k", "v") for part in ("", "_row", "_head")),
        *(("mask", ctypes.c_void_p), ("mask_row", ctypes.c_size_t)),
        *(("out", ctypes.c_void_p), ("out_row", ctypes.c_size_t), ("out_head", ctypes.c_size_t)),
        *((name, ctypes.c_int) for name in ("queries", "keys", "heads", "shared_heads", "width")),
        *(("scale", ctypes.c_float), ("eight_bits", ctypes.c_int)),
    )  # fmt: skip


class Kernels:
    """A built library, without ggml between."""

    def __init__(self, path: Path) -> None:
        bindings.library()  # the library finds the ggml that llama.cpp loaded
        self._library = ctypes.CDLL(str(path))
        self._library.llava_edge_native_kernels.restype = ctypes.c_char_p

    def names(self) -> list[str]:
        return str(self._library.llava_edge_native_kernels().decode()).split()

    def configure_tiles(self, palette: int) -> None:
        """Tell the matrix unit something; 0: nothing."""
        self._library.test_configure_tiles(palette)

    def tiles_are_configured(self, palette: int) -> bool:
        """Whether it still holds what `configure_tiles` told it in this thread."""
        return bool(self._library.test_tiles_are_configured(palette))

    def multiply(self, kernel: str, kind: str, blocks: Array, x: Array, threads: int = 1) -> Array:
        """blocks: (columns, bytes of a row). (rows, columns)."""
        # Copies that end where the data ends, so that a sanitizer sees what is read behind them.
        blocks, x = blocks.copy(), np.ascontiguousarray(x, np.float32).copy()
        y = np.full((len(x), len(blocks)), 7, np.float32)
        done = self._library.llava_edge_native_multiply(
            *(kernel.encode(), TYPES[kind], _at(blocks), _at(x), _at(y), len(x), len(blocks), x.shape[1]),
            *(ctypes.c_size_t(blocks.shape[1]), threads),
        )
        assert done
        return y

    def attend(self, way: str, q: Array, k: Array, v: Array, mask: Array, threads: int = 1) -> Array:
        """Of q (heads, queries, width), k and v (shared heads, keys, width), or of Q8_0 (shared heads, keys, bytes):
        (queries, heads, width). way: "few" or the instructions for many queries; those of AVX-512 take widths that are
        multiples of 32."""
        q, k, v, mask = (np.ascontiguousarray(values).copy() for values in (q, k, v, mask))
        out = np.full((q.shape[1], q.shape[0], q.shape[2]), 7, np.float32)
        a = Attention(
            *(number for each in (q, k, v) for number in (_at(each), each.strides[1], each.strides[0])),
            *(_at(mask), mask.strides[0], _at(out), out.strides[0], out.strides[1]),
            *(q.shape[1], k.shape[1], q.shape[0], k.shape[0], q.shape[2], q.shape[2] ** -0.5),
            k.dtype == np.uint8,
        )
        assert self._library.llava_edge_native_attend(way.encode(), ctypes.byref(a), threads)
        return out


def _at(values: Array) -> ctypes.c_void_p:
    return values.ctypes.data_as(ctypes.c_void_p)


def random_blocks(kind: str, columns: int, inner: int, numbers: np.random.Generator, scales: Array) -> Array:
    """Any bytes for quants; scales drawn from `scales` (float16). (columns, bytes of a row) uint8."""
    values, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    if kind == "F16":
        drawn = numbers.choice(scales, (columns, inner)) * numbers.uniform(-1, 1, (columns, inner))
        return drawn.astype(np.float16).view(np.uint8)
    blocks = numbers.integers(0, 256, (columns, inner // values, size), np.uint8)
    for offset in SCALES[kind]:
        drawn = numbers.choice(scales, blocks.shape[:2]).astype(np.float16)
        blocks[:, :, offset : offset + 2] = drawn[..., None].view(np.uint8)
    return blocks.reshape(columns, -1)


def extreme_blocks(kind: str, numbers: np.random.Generator) -> Array:
    """(4, bytes of 512 values) uint8: all quants the largest in magnitude, for which sums of 16 bits may overflow."""
    blocks = random_blocks(kind, 4, 512, numbers, np.array([1]))
    parts = blocks.reshape(4, -1, GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1])
    kept = {at: parts[:, :, at : at + 2].copy() for at in SCALES[kind]}
    parts[:] = np.array([0xFF, 0x80, 0x7F, 0x01], np.uint8)[:, None, None]
    for at, scale in kept.items():
        parts[:, :, at : at + 2] = scale
    return blocks


def matrix(kind: str, blocks: Array) -> Array:
    """What blocks mean, by the package gguf: (columns, inner) float64."""
    if kind == "F16":
        return blocks.view(np.float16).astype(np.float64)
    found: Array = quants.dequantize(blocks, GGMLQuantizationType[kind]).astype(np.float64)
    return found


def worst_error(x: Array, w: Array, chunk: int, of_x: float, of_w: float) -> Array:
    """How far a product may be off, (rows, columns): if each value of x is off by at most `of_x` of the largest
    magnitude in its `chunk` of inner values, each of w by `of_w`, and sums are in float32."""
    total = np.zeros((len(x), len(w)))
    for k in range(0, x.shape[1], chunk):
        a, b = np.abs(x[:, k : k + chunk]), np.abs(w[:, k : k + chunk])
        most_a, most_b = a.max(1)[:, None], b.max(1)[None]
        total += of_x * most_a * b.sum(1)[None] + of_w * most_b * a.sum(1)[:, None]
        total += a.shape[1] * of_x * of_w * most_a * most_b
    return total + 1e-5 * (np.abs(x) @ np.abs(w).T) + 1e-30


def takes(kernel: str, kind: str) -> bool:
    return kind in TAKEN.get(kernel, TYPES)


def found_out(**changes: Any) -> dict[str, Any]:
    """As if `check` had found that every kernel is right and pays."""
    many = {"plain": 3.0, "avx2": 1.0, "avx512vnni": 2.0, "amx-bf16": 2.0, "amx-int8": 0.5}
    bytes_too = many | {"avx2-int8": 1.5}
    state = {
        "sha256": "0",
        "kernels": list(ROUNDED),
        "problems": {},
        "types": {
            kind: {**dict.fromkeys(("many", "some", "sixteen"), race), "eight": {"plain": 9.0}, "one": {"plain": 3.0}}
            for kind in TYPES
            for race in [bytes_too if takes("avx2-int8", kind) else many]
        },
        "attention": {race: {"plain": 3.0, "ours": 1.0} for race in ("many", "eight", "one")},
        "crowded": False,
    }
    return state | changes


def install(built: Path, **changes: Any) -> Path:
    """What `native.prepare` leaves behind, for the home that is set."""
    folder = installed.folder()
    folder.mkdir(parents=True)
    shutil.copy(built, folder / "kernels.so")
    (folder / "state.json").write_text(json.dumps(found_out(sha256=sha256_of(built)) | changes), "utf-8")
    return folder
