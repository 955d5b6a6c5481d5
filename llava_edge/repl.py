"""The loop behind `llava-edge chat`: lines in, streamed answers out. Knows nothing about engines or options.

stdout gets the answers only, so that a session can be piped; prompts and remarks go to stderr.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llava_edge import transcript
from llava_edge.errors import LlavaEdgeError
from llava_edge.paths import expand_path

if TYPE_CHECKING:
    from llava_edge.api import Chat
    from llava_edge.runtimes.pictures import Picture

HELP = """/image FILE   show an image with the next question
/reset        forget the conversation and its images
/save FILE    save the conversation as JSON
/load FILE    replace this conversation with a saved one
/help         show this list
/quit         quit (or Ctrl-D); Ctrl-C stops an answer"""

Waiting = Callable[[str], AbstractContextManager[Callable[[], object]]]


class Repl:
    """Reads lines until /quit or the end of input.

    show: writes a piece of an answer to stdout. waiting: says what is being done until what it gave is called.
    """

    def __init__(
        self,
        chat: Chat,
        show: Callable[[str], object],
        waiting: Waiting = lambda doing: contextlib.nullcontext(lambda: None),
    ) -> None:
        self._chat = chat
        self._show = show
        self._waiting = waiting
        self._pending: list[Picture] = []
        self._names: list[str] = []  # of all images so far, those that wait included
        self._commands: dict[str, Callable[[str], None]] = {
            "/image": self._image,
            "/reset": self._reset,
            "/save": self._save,
            "/load": self._load,
            "/help": lambda _: _remark(HELP),
        }

    def add(self, pictures: list[Picture], names: list[str]) -> None:
        """Show these images with the next question."""
        self._pending += pictures
        self._names += [
            str(Path(expand_path(name)).absolute()) for name in names
        ]  # to be found from other folders, too

    def run(self) -> None:
        """Until /quit or the end of input. Ctrl-C stops what is done; at the prompt of a terminal it says how to leave.

        Raises `KeyboardInterrupt` for a second one in a row there, and for the first where input is no terminal.
        """
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - line editing and history for input()
        if isinstance(sys.stdin, io.TextIOWrapper):  # a line in another encoding ends nothing
            sys.stdin.reconfigure(errors="surrogateescape")
        while (line := self._line()) is not None:
            name, _, rest = line.strip().partition(" ")
            if name in ("/quit", "/exit") or line.strip() in ("quit", "exit"):
                return
            if not name:
                continue
            try:
                self._handle(name, rest.strip(), line.strip())
            except KeyboardInterrupt:
                _remark("(stopped)")
            except LlavaEdgeError as error:
                _remark(f"llava-edge: {error}")

    def _line(self) -> str | None:
        """The next line, or None at the end of input."""
        for already in (False, True):
            try:
                return _read_line()
            except KeyboardInterrupt:
                if already or sys.stdin is None or not sys.stdin.isatty():
                    raise
                _remark("\n(to quit: /quit, Ctrl-D, or Ctrl-C again)")
        raise AssertionError("the second interruption was raised")

    def _handle(self, name: str, rest: str, line: str) -> None:
        if name in self._commands:
            self._commands[name](rest)
        elif name.startswith("/") and "/" not in name[1:]:
            _remark(f"There is no command {name}; /help lists all commands.")
        else:
            self._say(line)

    def _say(self, text: str) -> None:
        pictures, self._pending = self._pending, []
        doing = "Looking at the image" if pictures else "Reading"
        before, shown = len(self._chat.messages), False
        try:
            with self._waiting(doing) as begun, contextlib.closing(self._chat.say(text, pictures)) as answer:
                for chunk in answer:
                    begun()
                    shown = True
                    self._show(chunk.text)
                    if chunk.finish_reason == "length":
                        _remark("\n(cut off: --max-tokens reached, or the context is full)")
        finally:
            if len(self._chat.messages) == before:
                self._pending = pictures  # the question can be asked again
            if shown:
                click.echo()

    def _image(self, name: str) -> None:
        path = expand_path(name)
        if not path.strip():
            _remark("/image needs a file name.")
            return
        self.add([self._chat.prepare(path)], [name])
        _remark(f"{name} will be shown with your next question.")

    def _reset(self, _: str) -> None:
        self._chat.reset()
        self._pending, self._names = [], []
        _remark("Conversation cleared.")

    def _save(self, name: str) -> None:
        path = _named("/save", name)
        if path is None:
            return
        if not transcript.is_replaceable(path):
            _remark(f"{path} exists and is not a saved conversation; choose another name.")
            return
        messages = self._chat.messages
        try:
            transcript.write(path, transcript.Conversation(tuple(messages), tuple(self._names)))
        except OSError as error:
            _remark(f"{path} cannot be written: {error.strerror}.")
            return
        _remark(f"Saved {len(messages)} messages to {path}.")

    def _load(self, name: str) -> None:
        path = _named("/load", name)
        if path is None:
            return
        try:
            found = transcript.read(path)
            pictures = [self._chat.prepare(expand_path(image)) for image in found.images]
            self._chat.resume(found.messages, pictures[: found.message_images])
        except LlavaEdgeError as error:
            _remark(f"Not loaded: {error}")
            return
        self._pending, self._names = [], []
        self.add(pictures[found.message_images :], list(found.images))
        _remark(f"Loaded {len(found.messages)} messages from {path}.")
        if self._pending:
            _remark(f"Images to be shown with your next question: {len(self._pending)}.")


def _named(command: str, name: str) -> Path | None:
    """The file that a command is about; if no file can have that name, it says so."""
    path = Path(expand_path(name))
    if path.name and "\0" not in name:
        return path
    _remark(f"{command} needs a file name.")
    return None


def _read_line() -> str | None:
    """One line, or None at the end of input. The prompt sign appears only in a terminal."""
    if sys.stdin is None:
        return None
    if sys.stdin.isatty() and sys.stdout.isatty():
        try:
            return input("> ")
        except EOFError:
            click.echo(err=True)
            return None
    return sys.stdin.readline().removeprefix("\ufeff") or None  # a byte order mark is no text


def _remark(text: str) -> None:
    click.echo(text, err=True)
