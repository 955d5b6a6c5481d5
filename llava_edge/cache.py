"""A persistent cache of computed results: entries on disk, keyed by a hash of everything they depend on.

An entry is a private file of this user, named by its key:

    8 bytes   format
    4, 8      lengths of what follows, little-endian
    32        HMAC-SHA256 of key, description and payload, keyed with a secret in the same folder
    ...       description (JSON, for `cache ls`), payload

Only verified payloads are returned, because they go into C code that trusts them. A crash leaves complete entries or
files that fail verification, so nothing is flushed to the device. Reading and writing never raise: a failure is a miss.
Knows nothing about images or engines.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import shutil
import stat
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from llava_edge import store
from llava_edge.errors import UsageError
from llava_edge.outputs import write_problem

DEFAULT_LIMIT = 4 << 30  # bytes in total, unless $LLAVA_EDGE_CACHE_MIB is set; LRU eviction
MIN_FREE_BYTES = 2 << 30  # left free on the disk
SCAN_SHARE = 64  # a process writes 1/64 of the limit between two scans of the folder, which take time
_MAGIC = b"LLEDGE\x00\x01"
_HEADER = struct.Struct("<8sIQ32s")
_MAX_DESCRIPTION_BYTES = 1 << 12
_SECRET = "secret"
_KEY_LENGTH = 64  # hexadecimal digits of SHA-256
_READ_BYTES = 1 << 24  # read at a time
_STALE_SECONDS = 3600.0  # age at which a temporary file counts as abandoned


@dataclass(frozen=True)
class Entry:
    """One file. about: its writer's description; size: bytes on disk; used: last use, seconds since the epoch."""

    path: Path
    about: dict[str, str]
    size: int
    used: float


class Cache:
    """A folder of entries, shared by any number of processes.

    limit: bytes; beyond it the least recently used entries are removed. Processes may exceed it together by what each
        wrote since its last scan (`SCAN_SHARE`).
    """

    def __init__(self, folder: Path, limit: int = DEFAULT_LIMIT, min_free: int = MIN_FREE_BYTES) -> None:
        self.folder = folder
        self.limit = limit
        self._min_free = min_free
        self._bytes_until_scan = 0

    def get(self, key: str) -> bytes | memoryview | None:
        """The verified payload of `key`, or None. A damaged entry is removed."""
        path = self.folder / key
        try:
            if not _is_private(self.folder):
                return None
            payload = _read(path, key, self._secret())
            if payload is None:
                path.unlink()
            else:
                with contextlib.suppress(OSError):  # a read-only file system
                    os.utime(path)
        except (OSError, MemoryError):
            return None
        return payload

    def put(self, key: str, about: dict[str, str], payload: bytes | memoryview) -> bool:
        """Store a payload; returns whether that worked."""
        description = json.dumps(about).encode()[:_MAX_DESCRIPTION_BYTES]
        size = _HEADER.size + len(description) + memoryview(payload).nbytes
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _is_private(self.folder) or not self._make_room(size):
                return False
            mac = _start_hmac(self._secret(), key, description)
            mac.update(payload)
            header = _HEADER.pack(_MAGIC, len(description), memoryview(payload).nbytes, mac.digest())
            _write(self.folder / key, header, description, payload)
        except (OSError, MemoryError):
            return False
        return True

    def entries(self) -> list[Entry]:
        """All entries, the most recently used first. Their payloads are not checked. Raises `OSError`."""
        entries = []
        for item, info in self._scan():
            path = Path(item.path)
            about = _read_description(path) if len(path.name) == _KEY_LENGTH else {"kind": "unfinished"}
            entries.append(Entry(path, about, info.st_size, info.st_mtime))
        return sorted(entries, key=lambda entry: entry.used, reverse=True)

    def disabled_reason(self) -> str:
        """Why nothing can be cached, as a sentence; empty if it can. Raises `OSError`."""
        if not self.limit:
            return "nothing is cached: the limit is 0."
        if problem := write_problem(self.folder):
            return f"nothing is cached: {self.folder} cannot be written to ({problem})."
        if self.folder.exists() and not _is_private(self.folder):
            whose = "belongs to another user, is shared by all users, or is on a disk without permissions"
            return f"nothing is cached: {self.folder} {whose}; move it away, or set LLAVA_EDGE_HOME."
        existing = next(path for path in (self.folder, *self.folder.absolute().parents) if path.is_dir())
        free = shutil.disk_usage(existing).free
        if free + sum(info.st_size for _, info in self._scan()) >= self._min_free:
            return ""
        required = f"{self._min_free / 2**30:.0f} must stay free"
        return f"nothing is cached: {free / 2**30:.1f} GiB of the disk are free, and {required}."

    def clear(self) -> tuple[int, int]:
        """Remove every entry; returns their number and bytes. Raises `OSError`."""
        entries = self.entries()
        for entry in entries:
            entry.path.unlink(missing_ok=True)
        return len(entries), sum(entry.size for entry in entries)

    def _scan(self) -> Iterator[tuple[os.DirEntry[str], os.stat_result]]:
        """Entries and temporary files, not as `Path`: creating thousands of those would take most of the time.

        Raises `OSError` if the folder cannot be read, not if there is none.
        """
        try:
            with os.scandir(self.folder) as items:
                for item in items:
                    if len(item.name) == _KEY_LENGTH or (item.name[0] == "." and item.name.endswith(".tmp")):
                        try:
                            info = item.stat(follow_symlinks=False)
                        except OSError:  # removed or renamed by another process since it was listed, or damaged
                            continue
                        if not stat.S_ISDIR(info.st_mode):
                            yield item, info
        except (FileNotFoundError, NotADirectoryError):
            return

    def _make_room(self, size: int) -> bool:
        """Evict least recently used entries until `size` more bytes fit; returns whether they do."""
        free = shutil.disk_usage(self.folder).free
        if size <= self._bytes_until_scan and free - size >= self._min_free:
            self._bytes_until_scan -= size
            return True
        now = time.time()
        latest = now + _STALE_SECONDS  # what seems to be used later is from when the clock was wrong, and goes first
        files = sorted(self._scan(), key=lambda file: (file[1].st_mtime <= latest, file[1].st_mtime))
        kept = sum(info.st_size for _, info in files)
        scan_interval = self.limit // SCAN_SHARE
        target = self.limit if kept + size <= self.limit else self.limit - scan_interval
        if size > self.limit or free + kept - size < self._min_free:
            return False  # not even in an empty cache
        for item, info in files:
            unfinished = item.name.endswith(".tmp")
            if unfinished and abs(now - info.st_mtime) < _STALE_SECONDS:
                continue
            if unfinished or kept + size > target or free - size < self._min_free:
                Path(item.path).unlink(missing_ok=True)
                kept -= info.st_size
                free += info.st_size
        self._bytes_until_scan = min(max(self.limit - kept - size, 0), scan_interval)
        return kept + size <= self.limit and free - size >= self._min_free

    def _secret(self) -> bytes:
        """32 random bytes, created once. Two processes creating it at once may disagree, which only causes misses."""
        path = self.folder / _SECRET
        try:
            with _open(path) as file:
                secret = file.read(33)
            if len(secret) == 32:
                return secret
        except FileNotFoundError:
            pass
        _write(path, os.urandom(32))
        return path.read_bytes()


def user_cache(folder: Path | None = None) -> Cache:
    """Open this user's cache, in the default place or in `folder`.

    Raises `UsageError` if $LLAVA_EDGE_CACHE_MIB is not a number of mebibytes.
    """
    text = os.environ.get("LLAVA_EDGE_CACHE_MIB", "")
    if text and not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UsageError(f"LLAVA_EDGE_CACHE_MIB is {text[:40]!r}; expected a whole number of mebibytes, 0 or more.")
    return Cache(folder or store.home() / "cache", int(text) << 20 if text else DEFAULT_LIMIT)


def _read(path: Path, key: str, secret: bytes) -> bytes | memoryview | None:
    """The verified payload, or None if the file is not what `put` wrote under this key. Raises `OSError`."""
    with _open(path) as file:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            return None
        magic, about_size, size, mac = _HEADER.unpack(header)
        file_size = _HEADER.size + about_size + size
        if magic != _MAGIC or os.fstat(file.fileno()).st_size != file_size:
            return None
        actual = _start_hmac(secret, key, file.read(about_size))
        payload = _read_payload(file, size, actual)
    return payload if payload is not None and hmac.compare_digest(mac, actual.digest()) else None


def _read_payload(file: BufferedReader, size: int, mac: hmac.HMAC) -> memoryview | None:
    """Read the next `size` bytes while a second thread adds them to `mac`; None if the file is shorter."""
    import numpy as np  # 0.1 s, not needed by `cache ls`

    payload = np.empty(size, np.uint8).data  # numpy requests huge pages, which fault in faster
    with ThreadPoolExecutor(1) as hasher:
        single_threaded = size <= _READ_BYTES or not _can_start_thread(hasher)
        for start in range(0, size, _READ_BYTES):
            part = payload[start : start + _READ_BYTES]
            if file.readinto(part) != len(part):
                return None
            if single_threaded:
                mac.update(part)
            else:
                hasher.submit(mac.update, part)
    return payload.toreadonly()


def _can_start_thread(pool: ThreadPoolExecutor) -> bool:
    """Whether the system allows one more thread."""
    try:
        pool.submit(bool)
    except RuntimeError:
        return False
    return True


def _start_hmac(secret: bytes, key: str, about: bytes) -> hmac.HMAC:
    """The HMAC of an entry up to its description; the payload is still to be added."""
    return hmac.new(secret, key.encode() + struct.pack("<I", len(about)) + about, "sha256")


def _read_description(path: Path) -> dict[str, str]:
    """An entry's description; empty if it cannot be read."""
    try:
        with _open(path) as file:
            size = _HEADER.unpack(file.read(_HEADER.size))[1]
            about = json.loads(file.read(min(size, _MAX_DESCRIPTION_BYTES)))
        return {str(name): str(value) for name, value in about.items()}
    except (OSError, ValueError, struct.error, AttributeError, RecursionError):
        return {}


def _open(path: Path) -> BufferedReader:
    """Open a regular file of this user. Raises `OSError` for anything else; a pipe in its place does not block."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode) or info.st_uid != os.getuid():
            raise PermissionError(f"{path} is not a regular file of this user")
        return os.fdopen(descriptor, "rb")
    except OSError:
        os.close(descriptor)
        raise


def _write(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file that only this user can read, whole or not at all. Raises `OSError`."""
    temporary = path.with_name(f".{path.name[:16]}.{os.getpid()}.{time.monotonic_ns()}.tmp")
    try:
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            for part in parts:
                file.write(part)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _is_private(folder: Path) -> bool:
    """Whether a folder belongs to this user; if so, remove others' permissions. Raises `OSError` if it does not exist.

    A symbolic link of this user counts as its target, which may be on a larger disk. A folder with the sticky bit is
    shared by all users: root's /tmp must keep its permissions.
    """
    info = folder.lstat()
    if stat.S_ISLNK(info.st_mode) and info.st_uid == os.getuid():
        info = folder.stat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & stat.S_ISVTX:
        return False
    if stat.S_IMODE(info.st_mode) & 0o077:
        try:
            folder.chmod(0o700)
        except PermissionError:  # as on vfat, where the mount decides who may do what
            return False
    return True
