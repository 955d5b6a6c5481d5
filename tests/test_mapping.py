"""Letting mapped pages go: they leave this process's memory, and read the same afterwards."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import resident

from llava_edge.runtimes.mapping import release_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def test_pages_go_and_come_back(tmp_path: Path) -> None:
    path = tmp_path / "with a space.bin"
    content = np.random.default_rng(0).integers(0, 256, 1 << 22, np.uint8).tobytes()
    path.write_bytes(content)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert bytes(mapped) == content
        assert resident(path) >= len(content)
        release_pages(path)
        assert resident(path) == 0
        assert bytes(mapped) == content


def test_other_files_and_written_pages_stay(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(bytes(1 << 20))
    other.write_bytes(bytes(1 << 20))
    with other.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as kept:
        assert not any(bytes(kept))
        before = resident(other)
        with one.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as changed:
            changed[:4] = b"mine"
            release_pages(one)
            assert changed[:4] == b"mine"
        assert resident(other) == before
