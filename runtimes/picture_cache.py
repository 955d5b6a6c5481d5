"""What pictures became, found again by content: embeddings, and the language model's memory of what a picture ends.

In this process what fits into `RECENT` bytes, the rest on disk. A key is a hash of everything that a result depends
on, so that nothing has to be invalidated. Knows nothing about how results are computed.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict

import numpy as np

from llava_edge import __version__
from llava_edge.bundle import Bundle
from llava_edge.cache import Cache
from llava_edge.runtimes.jobs import Worker

RECENT = 64 << 20  # bytes in memory: seven pictures of LLaVA-1.5-7B, hundreds of the default model
WAITING = 1 << 30  # bytes that may wait to be written; what comes on top is not kept

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
        self._waiting: dict[str, Payload] = {}
        self._lock = threading.Lock()
        self._writer = Worker("llava-edge cache")

    @property
    def room(self) -> int:
        """Bytes of the largest payload that would be kept now; a larger one need not be made."""
        with self._lock:
            waiting = sum(map(len, self._waiting.values()))
        return max(self._room, WAITING - waiting if self._disk is not None else 0)

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
        """Keep a payload, which must not change afterwards. It is written in the background."""
        self._remember(key, payload)
        if self._disk is None:
            return
        with self._lock:
            if len(payload) + sum(map(len, self._waiting.values())) > WAITING:
                return
            self._waiting[key] = payload
        self._writer.submit(self._write, key, about, payload)

    def close(self) -> None:
        """Wait until all is written. Harmless when repeated."""
        self._writer.shutdown()

    def _write(self, key: str, about: dict[str, str], payload: Payload) -> None:
        assert self._disk is not None
        try:
            self._disk.put(key, about, payload)
        finally:
            with self._lock:
                self._waiting.pop(key, None)

    def _remember(self, key: str, payload: Payload) -> None:
        if len(payload) > self._room:
            return
        with self._lock:
            self._recent[key] = payload
            self._recent.move_to_end(key)
            size = sum(map(len, self._recent.values()))
            while size > self._room:
                size -= len(self._recent.popitem(last=False)[1])
