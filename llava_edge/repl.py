"""The interactive loop of `llava-edge chat`: lines in, streamed answers out. Knows nothing about engines or options.

Only answers go to stdout, so that a session can be piped; prompts and notes go to stderr.
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
    from llava_edge.conversation import Chat
    from llava_edge.runtimes.pictures import Picture

HELP = """/image FILE   show an image with the next question
/reset        forget the conversation and its images
/save FILE    save the conversation as JSON
/load FILE    replace this conversation with a saved one
/help         show this list
/quit         quit (or Ctrl-D); Ctrl-C stops an answer"""

BusyIndicator = Callable[[str], AbstractContextManager[Callable[[], object]]]


class Repl:
    """Reads questions and commands, and prints answers.

    write: writes a piece of an answer to stdout. busy: shows what is being done until the function it yields is called.
    """

    def __init__(
        self,
        chat: Chat,
        write: Callable[[str], object],
        busy: BusyIndicator = lambda activity: contextlib.nullcontext(lambda: None),
    ) -> None:
        self._chat = chat
        self._write = write
        self._busy = busy
        self._pending: list[Picture] = []
        self._names: list[str] = []  # of all images so far, pending ones included
        self._commands: dict[str, Callable[[str], None]] = {
            "/image": self._image,
            "/reset": self._reset,
            "/save": self._save,
            "/load": self._load,
            "/help": lambda _: _print_note(HELP),
        }

    def add(self, pictures: list[Picture], names: list[str]) -> None:
        """Add images to the next question."""
        self._pending += pictures
        self._names += [str(Path(expand_path(name)).absolute()) for name in names]  # valid in other folders, too

    def run(self) -> None:
        """Run until /quit or the end of input. Ctrl-C stops an answer; at a terminal's prompt it says how to quit.

        Raises `KeyboardInterrupt` for a second Ctrl-C in a row at the prompt, or the first if input is not a terminal.
        """
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - line editing and history for input()
        if isinstance(sys.stdin, io.TextIOWrapper):  # do not fail on a line in another encoding
            sys.stdin.reconfigure(errors="surrogateescape")
        while (line := self._next_line()) is not None:
            name, _, argument = line.strip().partition(" ")
            if name in ("/quit", "/exit") or line.strip() in ("quit", "exit"):
                return
            if not name:
                continue
            try:
                self._handle(name, argument.strip(), line.strip())
            except KeyboardInterrupt:
                _print_note("(stopped)")
            except LlavaEdgeError as error:
                _print_note(f"llava-edge: {error}")

    def _next_line(self) -> str | None:
        """The next line, or None at the end of input."""
        for interrupted in (False, True):
            try:
                return _read_line()
            except KeyboardInterrupt:
                if interrupted or sys.stdin is None or not sys.stdin.isatty():
                    raise
                _print_note("\n(to quit: /quit, Ctrl-D, or Ctrl-C again)")
        raise AssertionError("the second interruption was raised")

    def _handle(self, name: str, argument: str, line: str) -> None:
        if name in self._commands:
            self._commands[name](argument)
        elif name.startswith("/") and "/" not in name[1:]:
            _print_note(f"There is no command {name}; /help lists all commands.")
        else:
            self._say(line)

    def _say(self, text: str) -> None:
        pictures, self._pending = self._pending, []
        activity = "Looking at the image" if pictures else "Reading"
        message_count, has_output = len(self._chat.messages), False
        try:
            with self._busy(activity) as hide_busy, contextlib.closing(self._chat.say(text, pictures)) as answer:
                for chunk in answer:
                    hide_busy()
                    has_output = True
                    self._write(chunk.text)
                    if chunk.finish_reason == "length":
                        _print_note("\n(cut off: --max-tokens reached, or the context is full)")
        finally:
            if len(self._chat.messages) == message_count:
                self._pending = pictures  # the question can be asked again
            if has_output:
                click.echo()

    def _image(self, name: str) -> None:
        path = expand_path(name)
        if not path.strip():
            _print_note("/image needs a file name.")
            return
        self.add([self._chat.prepare(path)], [name])
        _print_note(f"{name} will be shown with your next question.")

    def _reset(self, _: str) -> None:
        self._chat.reset()
        self._pending, self._names = [], []
        _print_note("Conversation cleared.")

    def _save(self, name: str) -> None:
        path = _file_argument("/save", name)
        if path is None:
            return
        if not transcript.is_replaceable(path):
            _print_note(f"{path} exists and is not a saved conversation; choose another name.")
            return
        messages = self._chat.messages
        try:
            transcript.write(path, transcript.Conversation(tuple(messages), tuple(self._names)))
        except OSError as error:
            _print_note(f"{path} cannot be written: {error.strerror}.")
            return
        _print_note(f"Saved {len(messages)} messages to {path}.")

    def _load(self, name: str) -> None:
        path = _file_argument("/load", name)
        if path is None:
            return
        try:
            conversation = transcript.read(path)
            pictures = [self._chat.prepare(expand_path(image)) for image in conversation.images]
            self._chat.resume(conversation.messages, pictures[: conversation.message_images])
        except LlavaEdgeError as error:
            _print_note(f"Not loaded: {error}")
            return
        self._pending, self._names = [], []
        self.add(pictures[conversation.message_images :], list(conversation.images))
        _print_note(f"Loaded {len(conversation.messages)} messages from {path}.")
        if self._pending:
            _print_note(f"Images to be shown with your next question: {len(self._pending)}.")


def _file_argument(command: str, name: str) -> Path | None:
    """The file that a command names; None, with a note, if the name is empty or invalid."""
    path = Path(expand_path(name))
    if path.name and "\0" not in name:
        return path
    _print_note(f"{command} needs a file name.")
    return None


def _read_line() -> str | None:
    """Read one line, or None at the end of input. A prompt appears only on a terminal."""
    if sys.stdin is None:
        return None
    if sys.stdin.isatty() and sys.stdout.isatty():
        try:
            return input("> ")
        except EOFError:
            click.echo(err=True)
            return None
    return sys.stdin.readline().removeprefix("\ufeff") or None  # a byte order mark


def _print_note(text: str) -> None:
    click.echo(text, err=True)
