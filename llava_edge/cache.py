"""What was computed once, kept on disk for the next time: entries found by a key that is a hash of all they depend on.

An entry is a file of this user alone, named by its key:

    8 bytes   format
    4, 8      lengths of what follows, little-endian
    32        HMAC-SHA256 of key, description and payload, under a secret in the same folder
    ...       description (JSON, for `cache ls`), payload

Nothing unverified is ever returned: payloads go into C code that trusts them. A crash leaves whole entries or files
that fail the check, so nothing is flushed to the device. The cache never raises; what cannot be kept is not kept.
Knows nothing about pictures or engines.
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
from typing import BinaryIO

from llava_edge import store
from llava_edge.errors import UsageError
from llava_edge.outputs import unwritable

LIMIT = 4 << 30  # bytes in all, unless $LLAVA_EDGE_CACHE_MIB says otherwise; the least recently used goes first
FREE_FLOOR = 2 << 30  # bytes that are left free on the disk
UNSEEN = 64  # of so many parts of the limit one is written between two looks at all entries, each of which takes time
_FORMAT = b"LLEDGE\x00\x01"
_HEADER = struct.Struct("<8sIQ32s")
_MAX_ABOUT = 1 << 12
_SECRET = "secret"
_KEY_LENGTH = 64  # hexadecimal digits of SHA-256
_PART = 1 << 24  # bytes that are read at a time
_ABANDONED = 3600.0  # seconds after which a file that was never finished is nobody's


@dataclass(frozen=True)
class Entry:
    """One file. about: what its writer said of it; size: bytes on disk; used: seconds since the epoch."""

    path: Path
    about: dict[str, str]
    size: int
    used: float


class Cache:
    """A folder of entries, shared by any number of processes.

    limit: bytes; entries are removed, least recently used first, so that no more is kept, but for a part of `UNSEEN`
        by each process that others do not see yet.
    """

    def __init__(self, folder: Path, limit: int = LIMIT, floor: int = FREE_FLOOR) -> None:
        self.folder = folder
        self.limit = limit
        self._floor = floor
        self._room = 0  # bytes that may be kept before the next look at what others keep

    def get(self, key: str) -> bytes | memoryview | None:
        """The payload kept under `key`, verified; None if there is none. A damaged entry is removed."""
        path = self.folder / key
        try:
            if not _is_private(self.folder):
                return None
            payload = _read(path, key, self._secret())
            if payload is None:
                path.unlink()
            else:
                with contextlib.suppress(OSError):  # on a file system that can only be read
                    os.utime(path)
        except (OSError, MemoryError):
            return None
        return payload

    def put(self, key: str, about: dict[str, str], payload: bytes | memoryview) -> bool:
        """Keep a payload; whether that worked."""
        description = json.dumps(about).encode()[:_MAX_ABOUT]
        size = _HEADER.size + len(description) + memoryview(payload).nbytes
        waiting = self.folder / f".{key[:16]}.{os.getpid()}.{time.monotonic_ns()}.tmp"
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _is_private(self.folder) or not self._make_room(size):
                return False
            code = _begun(self._secret(), key, description)
            code.update(payload)
            try:
                with _create(waiting) as file:
                    file.write(_HEADER.pack(_FORMAT, len(description), memoryview(payload).nbytes, code.digest()))
                    file.write(description)
                    file.write(payload)
                waiting.replace(self.folder / key)
            finally:
                waiting.unlink(missing_ok=True)
        except (OSError, MemoryError):
            return False
        return True

    def entries(self) -> list[Entry]:
        """All entries, the most recently used first. Their payloads are not checked."""
        found = []
        for item, info in self._files():
            path = Path(item.path)
            about = _about(path) if len(path.name) == _KEY_LENGTH else {"kind": "unfinished"}
            found.append(Entry(path, about, info.st_size, info.st_mtime))
        return sorted(found, key=lambda entry: entry.used, reverse=True)

    def obstacle(self) -> str:
        """Why nothing more is kept, as a sentence; empty if something may be."""
        if not self.limit:
            return "nothing is kept: its limit is 0."
        if problem := unwritable(self.folder):
            return f"nothing is kept: {self.folder} cannot be written to ({problem})."
        if self.folder.exists() and not _is_private(self.folder):
            return f"nothing is kept: {self.folder} belongs to another user, or is for all of them; move it away."
        there = next(path for path in (self.folder, *self.folder.absolute().parents) if path.is_dir())
        free = shutil.disk_usage(there).free
        if free + sum(info.st_size for _, info in self._files()) >= self._floor:
            return ""
        least = f"{self._floor / 2**30:.0f} must stay free"
        return f"nothing is kept: {free / 2**30:.1f} GiB of the disk are free, and {least}."

    def clear(self) -> tuple[int, int]:
        """Remove every entry; how many that were, and their bytes. Raises `OSError`."""
        entries = self.entries()
        for entry in entries:
            entry.path.unlink(missing_ok=True)
        return len(entries), sum(entry.size for entry in entries)

    def _files(self) -> Iterator[tuple[os.DirEntry[str], os.stat_result]]:
        """Entries, and what others have not finished. Not as paths: making thousands takes longer than all else."""
        try:
            with os.scandir(self.folder) as found:
                for item in found:
                    if len(item.name) == _KEY_LENGTH or (item.name[0] == "." and item.name.endswith(".tmp")):
                        try:
                            info = item.stat(follow_symlinks=False)
                        except FileNotFoundError:  # removed or finished by another process since it was listed
                            continue
                        yield item, info
        except OSError:
            return

    def _make_room(self, size: int) -> bool:
        """Remove what was not used for longest until `size` more bytes may be kept; whether they may."""
        free = shutil.disk_usage(self.folder).free
        if size <= self._room and free - size >= self._floor:
            self._room -= size
            return True
        files = sorted(self._files(), key=lambda file: file[1].st_mtime)
        kept = sum(info.st_size for _, info in files)
        unseen = self.limit // UNSEEN
        most = self.limit if kept + size <= self.limit else self.limit - unseen
        if size > self.limit or free + kept - size < self._floor:
            return False  # not even without all others
        now = time.time()
        for item, info in files:
            unfinished = item.name.endswith(".tmp")
            if unfinished and now - info.st_mtime < _ABANDONED:
                continue
            if unfinished or kept + size > most or free - size < self._floor:
                Path(item.path).unlink(missing_ok=True)
                kept -= info.st_size
                free += info.st_size
        self._room = min(max(self.limit - kept - size, 0), unseen)
        return kept + size <= self.limit and free - size >= self._floor

    def _secret(self) -> bytes:
        """32 random bytes, made once. Two processes that make it at once may disagree: then they miss, no more."""
        path = self.folder / _SECRET
        try:
            with _open(path) as file:
                secret = file.read(33)
            if len(secret) == 32:
                return secret
        except FileNotFoundError:
            pass
        waiting = self.folder / f".{_SECRET}.{os.getpid()}.{time.monotonic_ns()}.tmp"
        with _create(waiting) as file:
            file.write(os.urandom(32))
        waiting.replace(path)
        return path.read_bytes()


def user_cache(folder: Path | None = None) -> Cache:
    """The cache of this user, in the usual place or in `folder`.

    Raises `UsageError` if $LLAVA_EDGE_CACHE_MIB is not a number of mebibytes.
    """
    text = os.environ.get("LLAVA_EDGE_CACHE_MIB", "")
    if text and not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UsageError(f"LLAVA_EDGE_CACHE_MIB is {text[:40]!r}; a whole number of mebibytes was expected.")
    return Cache(folder or store.home() / "cache", int(text) << 20 if text else LIMIT)


def _read(path: Path, key: str, secret: bytes) -> bytes | memoryview | None:
    """The verified payload, or None if the file is not what `put` wrote under this key. Raises `OSError`."""
    with _open(path) as file:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            return None
        form, about_size, size, code = _HEADER.unpack(header)
        whole = _HEADER.size + about_size + size
        if form != _FORMAT or about_size > _MAX_ABOUT or os.fstat(file.fileno()).st_size != whole:
            return None
        found = _begun(secret, key, file.read(about_size))
        payload = _hashed(file, size, found)
    return payload if payload is not None and hmac.compare_digest(code, found.digest()) else None


def _hashed(file: BufferedReader, size: int, code: hmac.HMAC) -> memoryview | None:
    """What follows in the file, while a second thread adds each part to `code`; None if there is less."""
    import numpy as np  # takes 0.1 s, and `cache ls` can do without

    payload = np.empty(size, np.uint8).data  # numpy asks for huge pages, which come faster
    with ThreadPoolExecutor(1) as second:
        alone = size <= _PART or not _starts(second)
        for start in range(0, size, _PART):
            part = payload[start : start + _PART]
            if file.readinto(part) != len(part):
                return None
            if alone:
                code.update(part)
            else:
                second.submit(code.update, part)
    return payload.toreadonly()


def _starts(pool: ThreadPoolExecutor) -> bool:
    """Whether the system gives one more thread."""
    try:
        pool.submit(bool)
    except RuntimeError:
        return False
    return True


def _begun(secret: bytes, key: str, about: bytes) -> hmac.HMAC:
    """The code of an entry, before its payload is added."""
    code = hmac.new(secret, digestmod="sha256")
    for part in (key.encode(), struct.pack("<I", len(about)), about):
        code.update(part)
    return code


def _about(path: Path) -> dict[str, str]:
    """What an entry says of itself; empty if it does not."""
    try:
        with _open(path) as file:
            size = _HEADER.unpack(file.read(_HEADER.size))[1]
            about = json.loads(file.read(min(size, _MAX_ABOUT)))
        return {str(name): str(value) for name, value in about.items()}
    except (OSError, ValueError, struct.error, AttributeError, RecursionError):
        return {}


def _open(path: Path) -> BufferedReader:
    """A plain file of this user. Raises `OSError` for anything else; a pipe in its place does not block."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    info = os.fstat(descriptor)
    if not stat.S_ISREG(info.st_mode) or info.st_uid != os.getuid():
        os.close(descriptor)
        raise PermissionError(f"{path} is not a plain file of this user")
    return os.fdopen(descriptor, "rb")


def _create(path: Path) -> BinaryIO:
    """A new file that only this user can read. Raises `OSError`."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb")


def _is_private(folder: Path) -> bool:
    """Whether a folder is this user's and closed to others; closes it if it is. Raises `OSError` if it is not there.

    A link that this user made counts as the folder it leads to, say on a larger disk. One with the sticky bit is for
    all users: root's /tmp shall not be closed.
    """
    info = folder.lstat()
    if stat.S_ISLNK(info.st_mode) and info.st_uid == os.getuid():
        info = folder.stat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & stat.S_ISVTX:
        return False
    if stat.S_IMODE(info.st_mode) & 0o077:
        folder.chmod(0o700)
    return True
