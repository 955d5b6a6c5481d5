"""Terminal output: answers without control characters, and a status line that is cleared at the end."""

from __future__ import annotations

import json
import os
import select
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import click

# Control characters except tab and newline: an answer must not move the cursor or change colours.
_CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])
_WIDTH = 24


def show(text: str) -> None:
    """Write a piece of an answer to stdout and flush; on a terminal, without control characters."""
    text = text.translate(_CONTROLS) if sys.stdout.isatty() else text
    click.echo(text, nl=False, color=True)  # otherwise click strips escapes from output to a file


def show_json(record: dict[str, Any]) -> None:
    """Write a record to stdout as a line of JSON, which is UTF-8 by its standard, whatever stdout's encoding is."""
    click.echo(json_line(record) if sys.stdout.encoding in ("utf-8", "UTF-8") else json.dumps(record))


def json_line(record: dict[str, Any]) -> str:
    """A record as JSON, without a line break; escaped if a file name in it is not UTF-8."""
    text = json.dumps(record, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(record)
    return text


def printable(text: str) -> str:
    """Remove line breaks and control characters from text that a file contains."""
    return "".join(mark for mark in text if mark.isprintable())


def report_unused_kernels(device: str) -> None:
    """On a terminal, say why the native kernels do not compute a loaded model, if something can be done about it."""
    from llava_edge.runtimes import native

    if sys.stderr.isatty() and device.startswith("cpu") and (advice := native.advice()):
        click.echo(f"({advice})", err=True)


def is_writable(stream: TextIO) -> bool:
    """Whether writing would not block, on a pipe that nobody reads or a terminal stopped by Ctrl-S."""
    try:
        return bool(select.select([], [stream], [], 0)[1])
    except (OSError, ValueError):  # not a file
        return True


@contextmanager
def status_line(label: str) -> Iterator[Status]:
    """Show a progress line on stderr and clear it at the end; nothing unless stderr is a terminal."""
    status = Status(label)
    try:
        yield status
    finally:
        status.clear()


class Status:
    """A progress line. Call it with a fraction (0 to 1), or None if unknown, from any thread."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._enabled = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"  # no escape sequences there
        self._current_text = ""
        self._lock = threading.Lock()  # nothing is drawn after `clear`

    def __call__(self, fraction: float | None) -> None:
        """Redraw the line if it changed."""
        bar = ""
        if fraction is not None:
            filled = int(_WIDTH * min(max(fraction, 0.0), 1.0))
            bar = f" [{'#' * filled}{'-' * (_WIDTH - filled)}] {fraction:4.0%}"
        with self._lock:
            if self._enabled:
                self._draw(f"{self._label}{bar}")

    def step(self, label: str, fraction: float | None) -> None:
        """Set the label and the fraction, for work in several steps."""
        self._label = label
        self(fraction)

    def clear(self) -> None:
        """Clear the line and show nothing more."""
        with self._lock:
            if self._enabled:
                self._draw("")
            self._enabled = False

    def _draw(self, text: str) -> None:
        text = text[: _columns() - 1]  # a wrapped line could not be cleared
        if text != self._current_text:
            self._current_text = text
            sys.stderr.write(f"\r\x1b[K{text}")
            sys.stderr.flush()


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):
        return 80
