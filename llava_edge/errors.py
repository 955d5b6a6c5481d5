"""The errors a user can fix. Each is one sentence: what happened, what was expected, what to run.

The command line prints the sentence and exits with `exit_code` (sysexits numbers where they fit).
Anything else that is raised is a bug and keeps its traceback.
"""

from __future__ import annotations

import errno
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def install_hint(extra: str) -> str:
    """How to install one of our extras: from the clone, because the package is not on PyPI."""
    return f"Run in the clone of llava-edge: pip install '.[{extra}]'"


def import_problem(error: ImportError, extra: str) -> str:
    """Why a package of an extra cannot be used, to be put behind its name."""
    if isinstance(error, ModuleNotFoundError):
        return f"is not installed. {install_hint(extra)}"
    return f"cannot be loaded: {error}."  # as libraries for which there is too little memory


class LlavaEdgeError(Exception):
    """Base of all errors whose message is meant for the user."""

    exit_code = 70


class UsageError(LlavaEdgeError):
    """The request is invalid: a bad option value or combination."""

    exit_code = 2


class OptionError(UsageError):
    """An option has a value that is not possible. `field` is its name in `llava_edge.options`, with which the message
    starts; `problem` is the rest. The command line and the server put their own names of it in its place."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(field, problem)
        self.field, self.problem = field, problem

    def __str__(self) -> str:
        return f"{self.field} {self.problem}"


class DataError(LlavaEdgeError):
    """A file or text was found but its content cannot be used."""

    exit_code = 65


class ImageError(DataError):
    """An image cannot be decoded or is outside the accepted limits."""


class BundleError(DataError):
    """A bundle is damaged, incomplete, mixed up with another or of another format version."""


VERIFY_HINT = "Run 'llava-edge verify' on the bundle."


def not_finite(part: Path) -> BundleError:
    """The error for a part of a bundle that computed NaN or infinity."""
    return BundleError(f"{part} produced values that are not finite. {VERIFY_HINT}")


class CheckpointError(DataError):
    """A checkpoint cannot be recognised or converted."""


class ContextOverflowError(DataError):
    """Prompt plus answer exceed the context length; the message has the numbers."""

    exit_code = UsageError.exit_code


class MissingError(LlavaEdgeError):
    """A named file, folder or model does not exist."""

    exit_code = 66


class UnavailableError(LlavaEdgeError):
    """A device, an extra package or a download is not available here."""

    exit_code = 69


def lacking_dependency(error: ModuleNotFoundError) -> UnavailableError | None:
    """The error to show if what is missing comes with llava-edge, as in a Python that it is not installed for, or
    that was set up for an older version.

    The engines report themselves (runtimes/bindings.py), the extras where they are needed.
    """
    if (name := (error.name or "").partition(".")[0]) not in ("click", "llguidance", "numpy", "PIL"):
        return None
    return UnavailableError(
        f"{name} is not installed for {sys.executable}. Use the Python that llava-edge was installed for, such as "
        ".venv/bin/python in the clone, or install it as the README says."
    )


class MemoryLimitError(LlavaEdgeError):
    """The machine has too little memory."""

    exit_code = 71


PYTHONS_NO_THREAD = "can't start new thread"  # of a RuntimeError, which has no type of its own
NO_THREAD = (
    "No more threads can be started; raise the limit on processes (ulimit -u, or a container's) or on address space "
    "(ulimit -v)."
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is Python's, numpy's, the system's or torch's error for too little memory; torch's has no type."""
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or "DefaultCPUAllocator: can't allocate memory" in str(error)
    )


class CannotCreateError(LlavaEdgeError):
    """An output file or folder cannot be created."""

    exit_code = 73


class StorageError(LlavaEdgeError):
    """Reading or writing failed: disk full, I/O error."""

    exit_code = 74
