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
            *(ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint64, ctypes.c_int, ctypes.c_int),
        )
        self._functions.llava_edge_native_forget.argtypes = (ctypes.c_void_p, ctypes.c_size_t)

    def kernels(self) -> list[str]:
        """Names of those that this processor can run, preferred ones first."""
        return str(self._functions.llava_edge_native_kernels().decode()).split()

    def use(
        self,
        many: Iterable[tuple[str, str, int]] = (),
        few: Iterable[str] = (),
        attention: bool = False,
        few_attention: bool = False,
    ) -> None:
        """From now on take products with weights of these types, and attention. many: type, kernel, and from how many
        rows on (1 to 255); few: of fewer, 31 at most. Attention: of 32 queries or more, and of fewer.

        Raises `ValueError` if one is not there or does not take a type; then nothing has changed.
        """
        numbers = {name: number for number, name in enumerate(self.kernels())}
        kernel_of, least = bytearray(b"\xff" * 64), bytearray(64)
        for kind, name, rows in many:
            if name not in numbers:
                raise ValueError(f"there is no kernel {name}")
            kernel_of[TYPES[kind]], least[TYPES[kind]] = numbers[name], rows
        mask = sum(1 << TYPES[kind] for kind in few)
        if not self._functions.llava_edge_native_use(bytes(kernel_of), bytes(least), mask, attention, few_attention):
            asked = sorted({kind for kind, _, _ in many} | set(few)) + ["attention"] * (attention or few_attention)
            raise ValueError(f"there is no kernel for one of {', '.join(asked)}")

    def take(self, kernel: str, kind: str) -> bool:
        """From now on take products with weights of that type alone, by that kernel; False if it does not take them."""
        try:
            self.use(few=[kind]) if kernel == FEW else self.use([(kind, kernel, 1)])
        except ValueError:
            return False
        return True

    def forget(self, address: int, size: int) -> None:
        """Take memory out of the processor's caches, where it knows how to."""
        self._functions.llava_edge_native_forget(address, size)
