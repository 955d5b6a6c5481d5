"""Publishes a finished folder under its name atomically.

Everything is written to `NAME.tmp-.../bundle` beside the target, flushed to disk, and renamed. An older bundle is
exchanged with the new one (renameat2 on Linux, renamex_np on macOS), so that the name always refers to a complete
bundle; where the file system cannot, the next export restores one whose exchange was interrupted. A killed process
leaves at most its temporary folder, which the next export recognises by an unlocked lock file and removes. Only such
folders, and bundles, are ever removed or replaced.
"""

from __future__ import annotations

import ctypes
import errno
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
from llava_edge.locks import lock_file
from llava_edge.outputs import flush_to_disk

_LOCK_FILE = ".llava-edge-export"  # lock file, locked by the export that uses the temporary folder
_BUNDLE = "bundle"  # subfolder: becomes the target
_OLD = "old"  # subfolder: the old target during a swap by two renames


def check_target(out: Path, force: bool) -> None:
    """Raise `CannotCreateError` unless `out` does not exist, is empty, or is a bundle and `force` is set."""
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
    """A temporary folder beside `out`, always removed afterwards. Removes those of killed processes first.

    Raises `CannotCreateError` if nothing can be created there.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(out)
        folder, lock = _create_locked_folder(out)
    except OSError as error:
        raise CannotCreateError(
            f"A temporary folder for {out} cannot be created: {error.strerror or error}."
        ) from error
    try:
        yield folder / _BUNDLE
    finally:
        _remove(folder, out)
        os.close(lock)


def publish(temp: Path, out: Path, *, force: bool) -> None:
    """Flush `temp` to disk and rename it to `out`; with `force`, an older bundle is moved to `temp`.

    Raises `OSError` without `force` if another process has just created a bundle there.
    """
    for path in temp.iterdir():
        flush_to_disk(path)
    flush_to_disk(temp)
    if force and out.exists() and any(out.iterdir()):
        _exchange(temp, out)
    else:
        temp.rename(out)
    with suppress(OSError):  # `out` has changed
        flush_to_disk(out.parent)


def _is_bundle(folder: Path) -> bool:
    """Whether it is a bundle, of any format version: old ones may be replaced."""
    path = folder / MANIFEST
    try:
        if not path.is_file() or path.stat().st_size > MAX_MANIFEST_BYTES:
            return False
        raw = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(raw, dict) and "format_version" in raw


def _create_locked_folder(out: Path) -> tuple[Path, int]:
    """A new temporary folder and the file descriptor that holds its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"{out.name}.tmp-", dir=out.parent))
        with suppress(FileNotFoundError):  # until it has a lock file, another export may remove it
            lock = os.open(folder / _LOCK_FILE, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                lock_file(lock, wait=True)
                (folder / _BUNDLE).mkdir()
            except OSError:
                os.close(lock)
                raise
            return folder, lock


def _remove_abandoned(out: Path) -> None:
    """Remove temporary folders of killed exports; restore a bundle whose swap was interrupted."""
    for path in sorted(out.parent.iterdir()):
        if not path.name.startswith(f"{out.name}.tmp-") or path.is_symlink() or not path.is_dir():
            continue
        if re.fullmatch(r"[a-z0-9_]{8}", path.name.removeprefix(f"{out.name}.tmp-")):  # mkdtemp's
            with suppress(OSError):  # it is not empty
                path.rmdir()
        with suppress(FileNotFoundError, PermissionError, BlockingIOError):  # not ours, or its export is running
            lock = os.open(path / _LOCK_FILE, os.O_RDWR | os.O_CLOEXEC)
            try:
                if lock_file(lock, wait=False):
                    _remove(path, out)
            finally:
                os.close(lock)


def _remove(folder: Path, out: Path) -> None:
    """Remove a temporary folder, after restoring `out` from an interrupted swap. The lock file goes last, so that a
    folder left by a kill is still recognised.
    """
    if (folder / _OLD).is_dir() and not os.path.lexists(out / MANIFEST):
        try:
            if out.is_dir() and not out.is_symlink():
                _remove_parts(out)
            (folder / _OLD).rename(out)
        except OSError:
            return
    for name in (_BUNDLE, _OLD):
        shutil.rmtree(folder / name, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)


def _remove_parts(out: Path) -> None:
    """Remove what is left of a bundle. Raises `OSError` if there is anything else."""
    if {path.name for path in out.iterdir()} <= set(PARTS):
        for path in out.iterdir():
            path.unlink()
    out.rmdir()


def _exchange(temp: Path, out: Path) -> None:
    """Swap two folders atomically; where the system cannot, by two renames; where it cannot rename `out` either, as an
    overlay with a folder of a lower layer (a container's image), by a copy.
    """
    if _exchange_atomically(temp, out):
        return
    old = temp.with_name(_OLD)
    try:
        out.rename(old)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.copytree(out, old)
        (out / MANIFEST).unlink(missing_ok=True)  # first: without it, `_remove` restores `old`
        shutil.rmtree(out)
    try:
        temp.rename(out)
    except OSError:
        old.rename(out)
        raise
    old.rename(temp)


def _exchange_atomically(temp: Path, out: Path) -> bool:
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
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EXDEV):  # a file system that cannot exchange
        return False
    raise OSError(code, os.strerror(code), str(out))
