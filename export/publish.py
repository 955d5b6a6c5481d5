"""A finished folder appears under its name in one step, or not at all.

Everything is written into `NAME.tmp-.../bundle` beside the target, flushed to disk, and put in place by rename. An
older bundle is exchanged with the new one (renameat2 on Linux, renamex_np on macOS), so that the name always
leads to a whole bundle. A process that is killed leaves at most its temporary folder, which the next one removes: it
knows it by a file in it that nobody holds a lock on. Only such folders, and bundles, are ever removed or replaced.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llava_edge.bundle import MANIFEST, MAX_MANIFEST_BYTES, PARTS
from llava_edge.errors import CannotCreateError

_MARK = ".llava-edge-export"  # locked by the export whose temporary folder it is in
_BUNDLE = "bundle"  # in there: what becomes the target
_OLD = "old"  # in there: what stood at the target, while a swap is under way


def check_target(out: Path, force: bool) -> None:
    """Raises `CannotCreateError` unless `out` is free, empty, or a bundle that `force` allows to replace."""
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        raise CannotCreateError(f"{out} exists and is not a folder; choose another name for the bundle.")
    names = {path.name for path in out.iterdir()}
    if not names:
        return
    if not _is_bundle(out):
        raise CannotCreateError(f"{out} is a folder with other content, not a bundle; choose another name.")
    foreign = sorted(names - {MANIFEST, *PARTS})
    if foreign:
        raise CannotCreateError(f"{out} also holds {', '.join(foreign[:5])}; move that away before it is replaced.")
    if not force:
        raise CannotCreateError(f"{out} already holds a bundle; use --force to replace it, or choose another name.")


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`; always gone afterwards. Dead processes' ones are removed first.

    Raises `CannotCreateError` if nothing can be created there.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_dead(out)
        folder, lock = _own_folder(out)
    except OSError as error:
        raise CannotCreateError(
            f"A temporary folder for {out} cannot be created: {error.strerror or error}."
        ) from error
    try:
        yield folder / _BUNDLE
    finally:
        _remove(folder, out)
        os.close(lock)


def publish(temp: Path, out: Path) -> None:
    """Flush everything in `temp` to disk and give it the name `out`; what was there is in `temp` afterwards."""
    for path in temp.iterdir():
        _sync(path)
    _sync(temp)
    if out.exists() and any(out.iterdir()):
        _exchange(temp, out)
    else:
        temp.rename(out)
    _sync(out.parent)


def _is_bundle(folder: Path) -> bool:
    """Of any format version: an old bundle may be replaced."""
    path = folder / MANIFEST
    try:
        if not path.is_file() or path.stat().st_size > MAX_MANIFEST_BYTES:
            return False
        raw = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(raw, dict) and "format_version" in raw


def _lock(file: int, kind: int) -> bool:
    """Whether the file is locked now. Raises `BlockingIOError` if it is somebody else's, by LOCK_NB."""
    try:
        fcntl.flock(file, kind)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP):  # a file system without locks
            return False
        raise
    return True


def _own_folder(out: Path) -> tuple[Path, int]:
    """A new folder with the mark in it, and the open file that holds the lock on that."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"{out.name}.tmp-", dir=out.parent))
        with suppress(FileNotFoundError):  # until it is marked, another export may take it for a dead one's
            lock = os.open(folder / _MARK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                _lock(lock, fcntl.LOCK_EX)
                (folder / _BUNDLE).mkdir()
            except OSError:
                os.close(lock)
                raise
            return folder, lock


def _remove_dead(out: Path) -> None:
    """Remove what killed exports left; bring back a bundle that a plain swap was interrupted over."""
    for path in sorted(out.parent.iterdir()):
        if not path.name.startswith(f"{out.name}.tmp-") or path.is_symlink() or not path.is_dir():
            continue
        if re.fullmatch(r"[a-z0-9_]{8}", path.name.removeprefix(f"{out.name}.tmp-")):  # mkdtemp's
            with suppress(OSError):  # it is not empty
                path.rmdir()
        with suppress(FileNotFoundError, PermissionError, BlockingIOError):  # not ours; its export is at work
            lock = os.open(path / _MARK, os.O_RDWR | os.O_CLOEXEC)
            try:
                if _lock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    _remove(path, out)
            finally:
                os.close(lock)


def _remove(folder: Path, out: Path) -> None:
    """But bring back what stood at `out` before a swap that was cut off. The mark goes at last: who is killed before
    leaves a folder that is known.
    """
    if (folder / _OLD).is_dir() and not os.path.lexists(out):
        try:
            (folder / _OLD).rename(out)
        except OSError:
            return
    for name in (_BUNDLE, _OLD):
        shutil.rmtree(folder / name, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(temp: Path, out: Path) -> None:
    """Swap two folders at once; where the system cannot, by two renames."""
    if _exchange_at_once(temp, out):
        return
    old = temp.with_name(_OLD)
    out.rename(old)
    try:
        temp.rename(out)
    except OSError:
        old.rename(out)
        raise
    old.rename(temp)


def _exchange_at_once(temp: Path, out: Path) -> bool:
    library = ctypes.CDLL(None, use_errno=True)
    first, second = os.fsencode(temp), os.fsencode(out)
    try:
        if sys.platform == "darwin":
            failed = library.renamex_np(first, second, 2)  # RENAME_SWAP
        else:
            failed = library.renameat2(-100, first, -100, second, 2)  # AT_FDCWD, RENAME_EXCHANGE
    except AttributeError:
        return False
    if not failed:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # a file system that cannot exchange
        return False
    raise OSError(code, os.strerror(code), str(out))
