"""Conversations saved to files: what `/save` in `llava-edge chat` writes and `/load` reads.

JSON with `images`, the names of the image files in order, and `messages`, each with its role, its text and the number
of images shown with it.
"""

from __future__ import annotations

import json
import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_edge.errors import DataError, MissingError
from llava_edge.outputs import replacing
from llava_edge.prompt import Message
from llava_edge.typed import build

MAX_BYTES = 1 << 26  # a longer file is not a saved conversation


@dataclass(frozen=True)
class Conversation:
    """Messages and the names of their images. Images beyond those are pending: they go with the next question."""

    messages: tuple[Message, ...]
    images: tuple[str, ...]

    @property
    def message_images(self) -> int:
        """How many of the images belong to the messages."""
        return sum(message.images for message in self.messages)


def write(path: Path, conversation: Conversation) -> None:
    """Write a conversation atomically. Raises `OSError`; an existing file is then unchanged."""
    turns = [{"role": turn.role, "text": turn.text, "images": turn.images} for turn in conversation.messages]
    content = json.dumps({"images": conversation.images, "messages": turns}, indent=2, ensure_ascii=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode("utf-8", "backslashreplace"))  # JSON's escape, for names not in UTF-8


def read(path: Path) -> Conversation:
    """Read what `write` wrote. Raises `MissingError` or `DataError`."""
    try:
        fields = _read_fields(path)
    except OSError as error:
        raise MissingError(f"{path} cannot be read: {error.strerror}.") from error
    with suppress(ValueError):  # some other JSON
        conversation = build(Conversation, fields)
        if _is_valid(conversation):
            return conversation
    raise DataError(f"{path} is not a conversation written by /save.")


def is_replaceable(path: Path) -> bool:
    """Whether there is no such file, or one that `write` wrote."""
    try:
        return not os.path.lexists(path) or bool(_read_fields(path))
    except OSError:
        return False


def _read_fields(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty for anything else, pipes, devices and large files included. Raises `OSError`."""
    info = path.stat()
    if not stat.S_ISREG(info.st_mode) or info.st_size > MAX_BYTES:
        return {}
    try:
        raw = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return {}
    return raw if isinstance(raw, dict) and set(raw) == {"images", "messages"} else {}


def _is_valid(conversation: Conversation) -> bool:
    """Whether user and assistant alternate after an optional system message, and only users' messages have images."""
    messages = conversation.messages
    system = bool(messages) and messages[0].role == "system"
    turns = messages[system:]
    return (
        [turn.role for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        and all(turn.images >= 0 if turn.role == "user" else turn.images == 0 for turn in messages)
        and conversation.message_images <= len(conversation.images)
    )
