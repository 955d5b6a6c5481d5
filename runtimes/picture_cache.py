"""Caches the results of pictures: embeddings, and KV cache states of prompt prefixes that end in a picture.

Recent results are kept in memory, up to a number of bytes, the others on disk. A key is a hash of everything that a
result depends on, so that nothing has to be invalidated. Knows nothing about how results are computed.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from functools import cache
from pathlib import Path

import numpy as np

import llava_edge
from llava_edge.bundle import Bundle
from llava_edge.cache import Cache
from llava_edge.runtimes.worker import Worker

MEMORY_BYTES = 64 << 20  # kept in memory: seven pictures of LLaVA-1.5-7B, hundreds of the default model
MAX_QUEUED_BYTES = 1 << 30  # waiting to be written; what exceeds this is not written

Payload = bytes | memoryview


def digest(*parts: object) -> str:
    """Return the SHA-256 (hex) of JSON values, of numpy's version and of our own code, which compute too."""
    return hashlib.sha256(json.dumps([_our_code(), np.__version__, *parts], sort_keys=True).encode()).hexdigest()


@cache
def _our_code() -> str:
    """Hash the version and the source of what turns pixels and tokens into results.

    Not the version alone: who updates a clone gets other code under the same one. Apps made by PyInstaller have the
    source that our hook adds (llava_edge/pyinstaller), others none.
    """
    package = Path(llava_edge.__file__).parent
    digest = hashlib.sha256(llava_edge.__version__.encode())
    for path in (package / "anyres.py", package / "token_budget.py", *sorted(package.glob("runtimes/*.py"))):
        if path.exists():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def file_identity(bundle: Bundle, *names: str) -> list[object]:
    """Identify files of a bundle by hash, size and time: only `llava-edge verify` checks hashes against the files."""
    files = [(name, bundle.manifest.files[name].sha256, bundle.part(name).stat()) for name in names]
    return [[name, sha256, info.st_size, info.st_mtime_ns] for name, sha256, info in files]


class PictureCache:
    """An LRU cache in memory in front of one on `disk`, if any, which outlives the process. Thread-safe."""

    def __init__(self, disk: Cache | None, memory_bytes: int = MEMORY_BYTES) -> None:
        self._disk = disk
        self._memory_bytes = memory_bytes
        self._memory: OrderedDict[str, Payload] = OrderedDict()
        self._queued: dict[str, Payload] = {}  # to be written
        self._lock = threading.Lock()
        self._writer = Worker("llava-edge cache")

    @property
    def max_payload(self) -> int:
        """Size of the largest payload in bytes that would be kept now; a larger one need not be made."""
        with self._lock:
            queued = sum(map(len, self._queued.values()))
        return max(self._memory_bytes, MAX_QUEUED_BYTES - queued if self._disk is not None else 0)

    def get(self, key: str) -> Payload | None:
        """Return the payload stored under `key`, by this process or another one."""
        with self._lock:
            if key in self._memory:
                self._memory.move_to_end(key)
            payload = self._memory.get(key, self._queued.get(key))
        if payload is None and self._disk is not None:
            payload = self._disk.get(key)
            if payload is not None:
                self._put_in_memory(key, payload)
        return payload

    def put(self, key: str, about: dict[str, str], payload: Payload) -> None:
        """Store a payload, which must not change afterwards. It is written to disk in the background."""
        self._put_in_memory(key, payload)
        if self._disk is None:
            return
        with self._lock:
            if len(payload) + sum(map(len, self._queued.values())) > MAX_QUEUED_BYTES:
                return
            self._queued[key] = payload
        self._writer.submit(self._write, key, about, payload)

    def close(self) -> None:
        """Wait until everything is written. Harmless when repeated."""
        self._writer.shutdown()

    def _write(self, key: str, about: dict[str, str], payload: Payload) -> None:
        assert self._disk is not None
        try:
            self._disk.put(key, about, payload)
        finally:  # whatever happened: it counts towards `MAX_QUEUED_BYTES`
            with self._lock:
                self._queued.pop(key, None)

    def _put_in_memory(self, key: str, payload: Payload) -> None:
        if len(payload) > self._memory_bytes:
            return
        with self._lock:
            self._memory[key] = payload
            size = sum(map(len, self._memory.values()))
            while size > self._memory_bytes:
                size -= len(self._memory.popitem(last=False)[1])
