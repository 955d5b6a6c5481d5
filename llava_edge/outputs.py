"""Output files: check that they can be written before hours of work, replace them whole, report failed writes."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llava_edge.errors import CannotCreateError, StorageError
from llava_edge.paths import denied

HEADROOM = 1.1  # free space required, relative to the estimate


def check_output(
    path: Path, *, distinct_from: Iterable[Path] = (), bundles: Iterable[Path] = (), appended: bool = False
) -> None:
    """Raise `CannotCreateError` for "-" or a file that cannot be written, is one of `distinct_from` or in a bundle.

    appended: an old file is added to; otherwise it is replaced, for which its folder has to take files.
    """
    if str(path) == "-":
        raise CannotCreateError("- does not stand for standard output here; give the name of a file.")
    target = _real_path(path)
    if target in map(_real_path, distinct_from):
        raise CannotCreateError(f"{path} is also given for something else; choose another name.")
    for bundle in bundles:
        if _real_path(bundle) in target.parents:
            raise CannotCreateError(f"{path} would be inside the bundle {bundle}; choose a path outside it.")
    if denied(target):
        raise CannotCreateError(f"{path} cannot be written to: Permission denied. Choose another path.")
    if target.is_dir() or not target.parent.is_dir():
        raise CannotCreateError(f"{path} cannot be written: it is a folder, or its folder does not exist.")
    # /dev/stdout exists although its target may have no path; a link to itself has a path but does not exist.
    refused = not os.access(path, os.W_OK) if path.exists() else os.path.lexists(target)
    in_place = _is_special(path) or (appended and path.exists())
    if refused or (not in_place and write_problem(target.parent)):
        raise CannotCreateError(f"{path} cannot be written to; choose another path.")


def write_problem(folder: Path) -> str:
    """Why no file can be created in a folder, which may not exist yet; empty if one can."""
    import tempfile  # 5 ms

    try:
        existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        with tempfile.TemporaryFile(dir=existing):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def check_space(folder: Path, estimate: int, what: str) -> None:
    """Raise `StorageError` if the disk has less than `HEADROOM` x `estimate` bytes free. `what` begins the sentence."""
    import shutil  # 3 ms

    free, needed = shutil.disk_usage(folder).free, int(estimate * HEADROOM)
    if free < needed:
        raise StorageError(
            f"{what} needs about {needed / 1e9:.3g} GB in {folder}, but only {free / 1e9:.3g} GB are free."
        )


def flush_to_disk(path: Path) -> None:
    """Write a file or a folder's names to the device, where its file system can. Raises `OSError` if that fails."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        # On some network and FUSE mounts, most often for folders.
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path`; the file written there takes its place at the end, unless there is an error.

    The target of a link is replaced, not the link. A file that is replaced keeps its mode. A device or a pipe is
    yielded itself. Raises `OSError`.
    """
    import shutil  # 3 ms

    if _is_special(path):
        yield path
        return
    path = _real_path(path)
    temporary = path.with_name(f".llava-edge.{os.getpid()}.{time.monotonic_ns()}.tmp")
    try:
        yield temporary
        flush_to_disk(temporary)
        if path.exists() and path.stat().st_mode != temporary.stat().st_mode:  # vfat refuses even to keep it
            shutil.copymode(path, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_left_over(folder: Path) -> None:
    """Remove what `replacing` left in a folder of ours whose process was killed."""
    for path in folder.glob(".llava-edge.*.tmp"):
        path.unlink(missing_ok=True)


@contextmanager
def storage_errors(path: Path, *exceptions: type[Exception]) -> Iterator[None]:
    """Turn a failed write into `StorageError`. exceptions: types that a library raises for one besides `OSError`."""
    failures: tuple[type[Exception], ...] = (OSError, *exceptions)
    try:
        yield
    except failures as error:
        reason = (isinstance(error, OSError) and error.strerror) or f"{error}, as when the disk is full"
        raise StorageError(f"{path} could not be written: {reason}.") from error


def _is_special(path: Path) -> bool:
    """Whether it is a device or a pipe, in whose place no file may be put."""
    return path.exists() and not path.is_file()


def _real_path(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises for a link to itself
