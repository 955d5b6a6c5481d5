"""Showing things in a terminal: a progress line that vanishes, and text that cannot steer the terminal."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import click

# Control characters but tab and newline: an answer must not move the cursor or change colours.
_CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])
_WIDTH = 24


def show(text: str) -> None:
    """Write a piece of an answer to stdout at once; without control characters if that is a terminal."""
    text = text.translate(_CONTROLS) if sys.stdout.isatty() else text
    click.echo(text, nl=False, color=True)  # or click would cut escapes out of what goes into a file


def one_line(text: str) -> str:
    """What a file says of itself, without ends of lines and control characters."""
    return "".join(mark for mark in text if mark.isprintable())


def advise(device: str) -> None:
    """Tell a person at a terminal that native kernels can be built, as after an update that changed them."""
    from llava_edge.runtimes import native
    from llava_edge.runtimes.native.choice import COMMAND

    if sys.stderr.isatty() and device.startswith("cpu") and native.needs_build():
        click.echo(f"(the native kernels are not built for this version; to build them, run: {COMMAND})", err=True)


def takes_a_line(stream: TextIO) -> bool:
    """Whether writing would not wait: for who reads a pipe, as an app that started us may not, or for Ctrl-Q."""
    try:
        return bool(select.select([], [stream], [], 0)[1])
    except (OSError, ValueError):  # it is no file
        return True


@contextmanager
def ended_cleanly() -> Iterator[None]:
    """A request to end, or a closed terminal, stops the work as Ctrl-C does, so that nothing is left behind."""
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGHUP)}
    heard = [kind for kind, handler in before.items() if handler is not signal.SIG_IGN]  # nohup ignores one
    for kind in heard:
        signal.signal(kind, signal.default_int_handler)
    try:
        yield
    finally:
        for kind in heard:
            signal.signal(kind, before[kind])


@contextmanager
def status_line(label: str) -> Iterator[Status]:
    """A line on stderr that shows progress and vanishes at the end; nothing unless stderr is a terminal."""
    status = Status(label)
    try:
        yield status
    finally:
        status.clear()


class Status:
    """Call it with a fraction (0 to 1) or None for an unknown one. Any thread may."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"  # which knows no escapes
        self._shown = ""
        self._lock = threading.Lock()  # nothing is drawn behind `clear`

    def __call__(self, fraction: float | None) -> None:
        """Draw the line anew if it looks different now."""
        bar = ""
        if fraction is not None:
            full = int(_WIDTH * min(max(fraction, 0.0), 1.0))
            bar = f" [{'#' * full}{'-' * (_WIDTH - full)}] {fraction:4.0%}"
        with self._lock:
            if self._live:
                self._draw(f"{self._label}{bar}")

    def step(self, label: str, fraction: float | None) -> None:
        """The same with another label, for work in several steps."""
        self._label = label
        self(fraction)

    def clear(self) -> None:
        """Wipe the line and show nothing more."""
        with self._lock:
            if self._live:
                self._draw("")
            self._live = False

    def _draw(self, text: str) -> None:
        text = text[: _columns() - 1]  # a wrapped line could not be wiped
        if text != self._shown:
            self._shown = text
            sys.stderr.write(f"\r\x1b[K{text}")
            sys.stderr.flush()


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):
        return 80
