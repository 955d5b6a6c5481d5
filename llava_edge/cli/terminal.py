"""Showing things in a terminal: a progress line that vanishes, and text that cannot steer the terminal."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import click

# Control characters but tab and newline: an answer must not move the cursor or change colours.
_CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])
_WIDTH = 24


def show(text: str) -> None:
    """Write a piece of an answer to stdout at once; without control characters if that is a terminal."""
    click.echo(text.translate(_CONTROLS) if sys.stdout.isatty() else text, nl=False)


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
        self._live = sys.stderr.isatty()
        self._lock = threading.Lock()  # nothing is drawn behind `clear`

    def __call__(self, fraction: float | None) -> None:
        """Draw the line anew."""
        if not self._live:
            return
        bar = ""
        if fraction is not None:
            full = int(_WIDTH * min(max(fraction, 0.0), 1.0))
            bar = f" [{'#' * full}{'-' * (_WIDTH - full)}] {fraction:4.0%}"
        self._write(f"\r\x1b[K{self._label}{bar}")

    def step(self, label: str, fraction: float | None) -> None:
        """The same with another label, for work in several steps."""
        self._label = label
        self(fraction)

    def clear(self) -> None:
        """Wipe the line and show nothing more."""
        self._write("\r\x1b[K", last=True)

    def _write(self, text: str, last: bool = False) -> None:
        with self._lock:
            if self._live:
                sys.stderr.write(text)
                sys.stderr.flush()
            self._live &= not last
