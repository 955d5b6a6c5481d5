"""Python started once more, to run this very package. A frozen app cannot: its `sys.executable` is the app itself."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from llava_edge.errors import UnavailableError


def frozen() -> bool:
    """Whether this process is an app made by PyInstaller or its like."""
    return bool(getattr(sys, "frozen", False))


def refuse_frozen(doing: str) -> None:
    """Raises `UnavailableError` in a frozen app. `doing` begins the sentence."""
    if frozen():
        raise UnavailableError(
            f"{doing} starts Python anew, which a frozen app has not; do it with llava-edge in a virtual environment."
        )


def command(doing: str, *arguments: str) -> list[str]:
    """Of a Python that gets `arguments`. Raises `UnavailableError` as `refuse_frozen` does."""
    refuse_frozen(doing)
    return [sys.executable, *arguments]


def environment() -> dict[str, str]:
    """In which that Python finds this very package, however this process did."""
    paths = [path or str(Path.cwd()) for path in sys.path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
