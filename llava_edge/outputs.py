"""Where results go: what cannot be written is refused before hours of work, not after them; what fails all the same is
said in a sentence."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llava_edge.errors import CannotCreateError, StorageError

HEADROOM = 1.1  # free space asked for, relative to the estimate


def check_output(path: Path, *, apart: Iterable[Path] = (), bundles: Iterable[Path] = ()) -> None:
    """Refuse a file that cannot be written, is one of those `apart`, or would be in a bundle: `CannotCreateError`."""
    place = _place(path)
    if place in map(_place, apart):
        raise CannotCreateError(f"{path} is named for something else, too; choose another name.")
    for bundle in bundles:
        if _place(bundle) in place.parents:
            raise CannotCreateError(f"{path} would be in the bundle {bundle}; choose a place outside of it.")
    if place.is_dir() or not place.parent.is_dir():
        raise CannotCreateError(f"{path} cannot be written: it is a folder, or its folder does not exist.")
    # /dev/stdout exists, though what it leads to may have no place; a link to itself has a place, but does not exist.
    if not os.access(path, os.W_OK) if path.exists() else os.path.lexists(place) or unwritable(place.parent):
        raise CannotCreateError(f"{path} cannot be written to; choose another place.")


def unwritable(folder: Path) -> str:
    """What keeps files from being made in a folder, which may not exist yet; empty if nothing does."""
    import tempfile  # 5 ms

    try:
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
        with tempfile.TemporaryFile(dir=there):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def check_space(folder: Path, estimate: int, what: str) -> None:
    """Raises `StorageError` when the disk has not `HEADROOM` x `estimate` bytes free. `what` begins the sentence."""
    import shutil  # 3 ms

    free, needed = shutil.disk_usage(folder).free, int(estimate * HEADROOM)
    if free < needed:
        raise StorageError(
            f"{what} needs about {needed / 1e9:.2f} GB in {folder}, but only {free / 1e9:.2f} GB are free."
        )


@contextmanager
def writing(path: Path, *kinds: type[Exception]) -> Iterator[None]:
    """Raises `StorageError` for a write that fails; libraries say so by exceptions of their own kinds, too."""
    try:
        yield
    except (OSError, *kinds) as error:  # type: ignore[misc]
        reason = (isinstance(error, OSError) and error.strerror) or f"{error}, as when the disk is full"
        raise StorageError(f"{path} could not be written: {reason}.") from error


def _place(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises at a link that leads to itself
