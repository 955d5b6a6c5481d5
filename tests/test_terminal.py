"""The progress line in a terminal: no wider than it, drawn when it changes, wiped at the end."""

from __future__ import annotations

import fcntl
import os
import struct
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from llava_edge.cli.terminal import show, status_line


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch, kind: str = "xterm") -> Iterator[Callable[[], str]]:
    """Standard error is one of 40 columns; call what this gives for all that arrived there since."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    os.set_blocking(ours, False)

    def read() -> str:
        try:
            return os.read(ours, 1 << 16).decode()
        except BlockingIOError:
            return ""

    with os.fdopen(theirs, "w") as stderr, monkeypatch.context() as patch:
        patch.setattr("sys.stderr", stderr)
        patch.setenv("TERM", kind)
        yield read
    os.close(ours)


def test_a_line_is_drawn_when_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as written:
        with status_line("x") as status:
            status(0.5)
            assert "50%" in written()
            status(0.501)
            assert written() == ""
            status(0.6)
            assert "60%" in written()
        assert written() == "\r\x1b[K"
        status(0.7)
        assert written() == ""


def test_a_line_is_never_wider_than_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as written, status_line("Loading a model with a very, very long name") as status:
        status(0.5)
        assert written().removeprefix("\r\x1b[K") == "Loading a model with a very, very long "


def test_a_terminal_without_escapes_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch, "dumb") as written:
        with status_line("Loading") as status:
            status(0.5)
        assert written() == ""


def test_an_answer_cannot_steer_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """ESC and, of one character, CSI and OSC; into a pipe goes what the model said."""
    said = "a\tb\n\x1b[2Jc\x9b2Jd\x9d0;e\x07\x7f\r"
    show(said)
    assert capsys.readouterr().out == said
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    show(said)
    assert capsys.readouterr().out == "a\tb\n[2Jc2Jd0;e"
