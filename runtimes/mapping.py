"""Memory that this process no longer needs, given back: pages of a mapped file, and what was freed.

llama.cpp copies weights out of the mapping where it repacks them, but both then count as this process's memory (2.4 GB
for a language model of 1.1 GB). What is read again later is mapped again. Files stay in the system's cache.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from pathlib import Path

_DONT_NEED = 4  # MADV_DONTNEED; of a mapped file nothing is lost


def let_go(path: Path) -> None:
    """Unmap the pages of a read-only mapping of `path`. Only Linux tells where it is; elsewhere nothing happens."""
    if sys.platform != "linux":
        return
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for start, end in _ranges(str(path.resolve())):
        advise(start, end - start, _DONT_NEED)


def trim() -> None:
    """Give back what was freed: glibc keeps pieces of it after every large piece of work."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def _ranges(name: str) -> list[tuple[int, int]]:
    """Addresses of the shared or read-only mappings of a file: dropping private, written pages would lose them."""
    found = []
    for line in Path("/proc/self/maps").read_text("utf-8", "surrogateescape").splitlines():
        span, rights, _, _, _, *mapped = line.split(maxsplit=5)
        if mapped == [name] and rights.startswith("r-"):
            start, end = (int(text, 16) for text in span.split("-"))
            found.append((start, end))
    return found
