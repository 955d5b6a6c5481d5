"""The kernel library's own functions, besides those that ggml calls (src/api.cpp)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from pathlib import Path

from llava_edge.runtimes.native.ggml import TYPES

DEVICE = "LLAVA_EDGE"  # its name in ggml
FEW = "few"  # name of the kernel for few rows, of which there is only one


class Library:
    """Opened from a file, after llama.cpp was loaded; otherwise a second copy of ggml would be."""

    def __init__(self, path: Path) -> None:
        self._functions = ctypes.CDLL(str(path))
        self._functions.llava_edge_native_kernels.restype = ctypes.c_char_p
        configure = self._functions.llava_edge_native_configure
        configure.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint64, ctypes.c_int, ctypes.c_int)
        self._functions.llava_edge_native_evict.argtypes = (ctypes.c_void_p, ctypes.c_size_t)

    def kernels(self) -> list[str]:
        """Names of the kernels that this processor can run, preferred ones first."""
        return str(self._functions.llava_edge_native_kernels().decode()).split()

    def configure(
        self,
        many_rows: Iterable[tuple[str, str, int]] = (),
        few_rows: Iterable[str] = (),
        attention: bool = False,
        few_attention: bool = False,
    ) -> None:
        """Set which operations the backend accepts from now on.

        many_rows: (weight type, kernel, minimum number of rows, 1 to 255) of products; few_rows: weight types for which
        products of fewer rows, 31 at most, are accepted. attention, few_attention: with 32 queries or more, and with
        fewer. Raises `ValueError` if a kernel does not exist or does not support a type; then nothing changes.
        """
        numbers = {name: number for number, name in enumerate(self.kernels())}
        kernel_of, min_rows = bytearray(b"\xff" * 64), bytearray(64)
        for kind, name, rows in many_rows:
            if name not in numbers:
                raise ValueError(f"there is no kernel {name}")
            kernel_of[TYPES[kind]], min_rows[TYPES[kind]] = numbers[name], rows
        mask = sum(1 << TYPES[kind] for kind in few_rows)
        arguments = (bytes(kernel_of), bytes(min_rows), mask, attention, few_attention)
        if not self._functions.llava_edge_native_configure(*arguments):
            kinds = {kind for kind, _, _ in many_rows} | set(few_rows)
            names = sorted(kinds) + ["attention"] * (attention or few_attention)
            raise ValueError(f"there is no kernel for one of {', '.join(names)}")

    def select(self, kernel: str, kind: str) -> bool:
        """Accept only products with weights of one type, computed by one kernel; False if it does not support them."""
        try:
            self.configure(few_rows=[kind]) if kernel == FEW else self.configure([(kind, kernel, 1)])
        except ValueError:
            return False
        return True

    def set_threads(self, count: int) -> None:
        """Set the threads of the backend's operations, whatever llama.cpp's own use; 0: as many as they."""
        self._functions.llava_edge_native_set_threads(count)

    def evict(self, address: int, size: int) -> None:
        """Evict memory from the processor's caches, where it has an instruction for that."""
        self._functions.llava_edge_native_evict(address, size)
