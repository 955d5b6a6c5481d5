"""Returns memory to the operating system: pages of a memory-mapped file, and freed heap memory.

Where llama.cpp repacks weights, it copies them out of the mapping, and both count as this process's memory (2.4 GB for
a language model of 1.1 GB). Released pages are mapped again when they are read; the file stays in the page cache.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from pathlib import Path

_MADV_DONTNEED = 4  # loses nothing of a mapped file


def release_pages(path: Path) -> None:
    """Release the pages of read-only mappings of `path`. Does nothing except on Linux with /proc, which lists them."""
    if sys.platform != "linux":
        return
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for start, end in _ranges(str(path.resolve())):
        advise(start, end - start, _MADV_DONTNEED)


def trim_heap() -> None:
    """Return freed heap memory, some of which glibc otherwise keeps."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def _ranges(name: str) -> list[tuple[int, int]]:
    """Return the address ranges of a file's mappings that are not writable: releasing written pages would lose data."""
    ranges = []
    try:
        maps = Path("/proc/self/maps").read_text("utf-8", "surrogateescape")
    except OSError:  # as in a chroot
        return []
    for line in maps.splitlines():
        span, rights, _, _, _, *mapped = line.split(maxsplit=5)
        if mapped == [name] and rights.startswith("r-"):
            start, end = (int(text, 16) for text in span.split("-"))
            ranges.append((start, end))
    return ranges
