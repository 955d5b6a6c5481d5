"""What pictures became, found again by content: embeddings, and the language model's memory of what a picture ends.

In this process what fits into `RECENT` bytes, the rest on disk. A key is a hash of everything that a result depends
on, so that nothing has to be invalidated. Knows nothing about how results are computed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import weakref
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from llava_edge import __version__
from llava_edge.bundle import Bundle
from llava_edge.cache import Cache

RECENT = 64 << 20  # bytes in memory: seven pictures of LLaVA-1.5-7B, hundreds of the default model
SOON = 256 << 20  # bytes that may wait until nothing is asked; with more, or an eighth of the limit, writing begins
WAITING = 1 << 30  # bytes that may wait at all; what comes on top is not kept

Payload = bytes | memoryview


def digest(*parts: object) -> str:
    """SHA-256 (hex) of values that JSON can hold, and of what computes beside the engines: this program and numpy."""
    return hashlib.sha256(json.dumps([__version__, np.__version__, *parts], sort_keys=True).encode()).hexdigest()


def identity(bundle: Bundle, *names: str) -> list[object]:
    """What the named files of a bundle are. With time and size: their hashes are compared by `verify` only."""
    found: list[object] = []
    for name in names:
        info = bundle.part(name).stat()
        found.append([name, bundle.manifest.files[name].sha256, info.st_size, info.st_mtime_ns])
    return found


class PictureCache:
    """disk: where results outlive the process, if anywhere. recent: bytes in memory. Any thread may use it."""

    def __init__(self, disk: Cache | None, recent: int = RECENT) -> None:
        self._disk = disk
        self._room = recent
        self._recent: OrderedDict[str, Payload] = OrderedDict()
        self._lock = threading.Lock()
        self._waiting = _Waiting(disk)
        self._writer = ThreadPoolExecutor(1, "llava-edge cache")
        self._last = weakref.finalize(self, self._waiting.write)  # also when Python ends, closed or not

    def get(self, key: str) -> Payload | None:
        """What was put under `key`, here or in another process."""
        with self._lock:
            if key in self._recent:
                self._recent.move_to_end(key)
            found = self._recent.get(key, self._waiting.get(key))
        if found is None and self._disk is not None:
            found = self._disk.get(key)
            if found is not None:
                self._remember(key, found)
        return found

    def put(self, key: str, about: dict[str, str], payload: Payload) -> None:
        """Keep a payload, which must not change afterwards. It is written by `write`, `close`, or when much waits."""
        self._remember(key, payload)
        if self._disk is not None and self._waiting.add(key, about, payload) > min(SOON, self._disk.limit // 8):
            self.write()

    def write(self) -> None:
        """Write what waits, in the background: a question that comes meanwhile would share the processor with it."""
        if self._disk is not None:
            with contextlib.suppress(RuntimeError):  # Python is ending, which writes it, too
                self._writer.submit(self._waiting.write)

    def close(self) -> None:
        """Wait until all is written. Harmless when repeated."""
        self._writer.shutdown()
        self._last()

    def _remember(self, key: str, payload: Payload) -> None:
        if len(payload) > self._room:
            return
        with self._lock:
            self._recent[key] = payload
            self._recent.move_to_end(key)
            size = sum(map(len, self._recent.values()))
            while size > self._room:
                size -= len(self._recent.popitem(last=False)[1])


class _Waiting:
    """Entries that are not written yet. Any thread may use it."""

    def __init__(self, disk: Cache | None) -> None:
        self._disk = disk
        self._process = os.getpid()
        self._entries: dict[str, tuple[dict[str, str], Payload]] = {}
        self._lock = threading.Lock()

    def get(self, key: str) -> Payload | None:
        return self._entries.get(key, ({}, None))[1]

    def add(self, key: str, about: dict[str, str], payload: Payload) -> int:
        """Bytes that wait now."""
        with self._lock:
            size = sum(len(waiting) for _, waiting in self._entries.values())
            if size + len(payload) > WAITING:
                return size
            self._entries[key] = about, payload
            return size + len(payload)

    def write(self) -> None:
        """All of them, each found by `get` until it is on disk. A forked process leaves them to the other one."""
        while os.getpid() == self._process:
            with self._lock:
                key, (about, payload) = next(iter(self._entries.items()), ("", ({}, b"")))
            if self._disk is None or not key:
                return
            try:
                self._disk.put(key, about, payload)
            finally:
                with self._lock:
                    self._entries.pop(key, None)
