"""The shared library's own functions, beside those that ggml calls."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from pathlib import Path

from llava_edge.runtimes.native.ggml import TYPES

DEVICE = "LLAVA_EDGE"  # as ggml lists it
FEW = "few"  # the kernel for products of few rows, which needs no choice


class Library:
    """Opened from a file; llama.cpp must be loaded already, or a second ggml would be."""

    def __init__(self, path: Path) -> None:
        self._functions = ctypes.CDLL(str(path))
        self._functions.llava_edge_native_kernels.restype = ctypes.c_char_p
        self._functions.llava_edge_native_use.argtypes = (
            *(ctypes.c_char_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int, ctypes.c_int),
        )

    def kernels(self) -> list[str]:
        """Names of those that this processor can run, preferred ones first."""
        return str(self._functions.llava_edge_native_kernels().decode()).split()

    def use(
        self,
        kernel: str,
        many: Iterable[str] = (),
        some: Iterable[str] = (),
        few: Iterable[str] = (),
        attention: bool = False,
        few_attention: bool = False,
    ) -> bool:
        """From now on take products with weights of these types, and attention. many, some: of 128 rows or more, and of
        32 or more, by `kernel`; few: of fewer. Attention likewise: of 32 queries or more, and of fewer."""
        types = (_bits(kinds) for kinds in (many, some, few))
        return bool(self._functions.llava_edge_native_use(kernel.encode(), *types, attention, few_attention))


def _bits(types: Iterable[str]) -> int:
    return sum(1 << TYPES[kind] for kind in types)
