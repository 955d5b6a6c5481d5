"""A conversation in a file: what `/save` in `llava-edge chat` writes and `/load` reads.

JSON with `images`, the names of the picture files in their order, and `messages`, each with its role, its text and how
many of the images were shown with it.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_edge.errors import DataError, MissingError
from llava_edge.prompt import Message
from llava_edge.typed import build

MAX_BYTES = 1 << 26  # a file that is longer is no conversation


@dataclass(frozen=True)
class Conversation:
    """Turns, and the names of their images; further images wait for the next question."""

    messages: tuple[Message, ...]
    images: tuple[str, ...]

    @property
    def shown(self) -> int:
        """How many of the images belong to the messages."""
        return sum(message.images for message in self.messages)


def write(path: Path, conversation: Conversation) -> None:
    """All of it, or the file of that name stays as it is. Raises `OSError`."""
    turns = [{"role": turn.role, "text": turn.text, "images": turn.images} for turn in conversation.messages]
    content = json.dumps({"images": conversation.images, "messages": turns}, indent=2, ensure_ascii=False) + "\n"
    _replace(path, content.encode("utf-8", "replace"))


def read(path: Path) -> Conversation:
    """What `write` wrote. Raises `MissingError` or `DataError`."""
    try:
        raw = _raw(path)
    except OSError as error:
        raise MissingError(f"{path} cannot be read: {error.strerror}.") from error
    with suppress(ValueError):  # it is JSON of another kind
        found = build(Conversation, raw)
        if _is_right(found):
            return found
    raise DataError(f"{path} is no conversation that /save wrote.")


def may_be_replaced(path: Path) -> bool:
    """Nothing, or what `write` wrote before."""
    try:
        return not os.path.lexists(path) or bool(_raw(path))
    except OSError:
        return False


def _raw(path: Path) -> dict[str, Any]:
    """The fields, or none if it is something else. Never reads from a pipe or device, nor much. Raises `OSError`."""
    info = path.stat()
    if not stat.S_ISREG(info.st_mode) or info.st_size > MAX_BYTES:
        return {}
    try:
        raw = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return {}
    return raw if isinstance(raw, dict) and set(raw) == {"images", "messages"} else {}


def _is_right(found: Conversation) -> bool:
    """Whether questions and answers take turns, a system text before them or none, and images belong to questions."""
    system = bool(found.messages) and found.messages[0].role == "system"
    turns = found.messages[system:]
    return (
        [turn.role for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        and all(turn.images >= 0 if turn.role == "user" else turn.images == 0 for turn in found.messages)
        and found.shown <= len(found.images)
    )


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or, on a full disk say, leave the one of that name as it is. Raises `OSError`."""
    path = path.resolve()  # what a link leads to is replaced, not the link
    waiting = path.with_name(f".llava-edge.{os.getpid()}.tmp")
    try:
        with waiting.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, waiting)
        waiting.replace(path)
    finally:
        waiting.unlink(missing_ok=True)
