"""Checks of a request's arguments, before anything is queued."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from llava_edge import prompt
from llava_edge.errors import UsageError
from llava_edge.options import Options


def check_request(
    conversations: Sequence[Sequence[prompt.Message]],
    options: Options | None = None,
    cancel: threading.Event | None = None,
) -> None:
    """Raise `UsageError` for arguments of a wrong type, which would otherwise fail later and look like a bug of ours.

    Also for a question without text and picture, for which a model would make something up.
    """
    for value, kind in ((options, Options), (cancel, threading.Event)):
        if value is not None and not isinstance(value, kind):
            raise UsageError(f"Expected an object of {kind.__name__}, not {value!r:.60}.")
    for messages in conversations:
        if isinstance(messages, str) or not isinstance(messages, Sequence):
            raise UsageError(f"Expected a list of Message, not {messages!r:.60}.")
        for message in messages:
            if not isinstance(message, prompt.Message):
                raise UsageError(f"Expected a Message, not {message!r:.60}.")
            if not isinstance(message.text, str):
                raise UsageError(f"Expected a text for a message, not {message.text!r:.60}.")
            if not isinstance(message.images, int) or message.images < 0:
                raise UsageError(f"Expected a number of images for a message, not {message.images!r:.60}.")
        if messages and messages[-1].role == "user" and not (messages[-1].text.strip() or messages[-1].images):
            raise UsageError("The question is empty; expected a text, a picture or both.")


def check_slots(messages: Sequence[prompt.Message], images: Sequence[object]) -> None:
    """Raise `UsageError` unless there is an image for each slot of the messages."""
    slots = sum(message.images for message in messages)
    if slots != len(images):
        raise UsageError(f"The messages have slots for {slots} images, but {len(images)} were given.")
