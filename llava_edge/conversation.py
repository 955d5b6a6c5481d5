"""A conversation with a loaded model: its turns, its images, and one open answer at a time."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

from llava_edge.asynchronous import stream_in_thread
from llava_edge.errors import ContextOverflowError, UsageError
from llava_edge.image import ImageInput
from llava_edge.options import Chunk, Options
from llava_edge.prompt import Message
from llava_edge.question import AnyImage, Images, as_list, check_question, copy_buffer, system_messages
from llava_edge.runtimes.jobs import Stream
from llava_edge.runtimes.pictures import Picture, copy_image, snapshot_images
from llava_edge.runtimes.pipeline import Engine
from llava_edge.runtimes.requests import check_request, check_slots
from llava_edge.runtimes.worker import POLL_SECONDS

_RESET_HINT = "Start a new conversation with /reset, or Chat.reset() in Python."


class Chat:
    """A conversation. It keeps turns and images, and the model reuses what it has already read.

    messages: its finished turns, after a system message if it has one of its own.
    One answer is open at a time. Meanwhile `say` raises `UsageError`, and `asay` waits for earlier `asay`s to end.
    """

    def __init__(self, engine: Engine, system: str = "", options: Options | None = None) -> None:
        self._engine = engine
        self._system = system
        self._options = options
        self._queue_changed = threading.Condition()
        self._async_queue: list[object] = []  # one ticket per asay in the order they started; the first is running
        self.messages: list[Message] = []
        self.reset()

    def reset(self) -> None:
        """Forget all turns and images, including those of an open answer."""
        self._set_conversation(system_messages(self._system), [])

    def resume(self, messages: Sequence[Message], images: Images = ()) -> None:
        """Replace this conversation with one kept by the caller; images fill its image slots in order.

        Raises what `say` would, such as `ContextOverflowError`; this conversation is then unchanged.
        """
        check_request([messages])
        if messages and messages[-1].role == "user":
            raise UsageError("The conversation ends with a question; expected one that ends with an answer.")
        pictures = self._engine.prepare_all(as_list(images))
        check_slots(messages, pictures)
        if any(message.role != "system" for message in messages):
            self._engine.check_context([messages], pictures, self._options)
        self._set_conversation(list(messages), pictures)

    def _set_conversation(self, messages: list[Message], pictures: list[Picture]) -> None:
        """Use new lists and a new lock: an answer that is still open keeps those it started with."""
        self.messages, self._pictures, self._answer_lock = messages, pictures, threading.Lock()

    def say(self, text: str, images: Images = (), *, cancel: threading.Event | None = None) -> Stream:
        """Stream the answer to the next turn.

        The turn is kept when the stream ends or is closed, with the answer so far; after an error it is dropped.
        Raises `ContextOverflowError` when the conversation is too long for another turn; call `reset` then.
        """
        return self._stream_turn(text, snapshot_images(as_list(images), self._engine.bundle.manifest), cancel)

    def _stream_turn(self, text: str, images: Sequence[ImageInput | Picture], cancel: threading.Event | None) -> Stream:
        with _exclusive(self._answer_lock):
            messages, pictures = self.messages, self._pictures
            new_pictures = self._engine.prepare_all(images)
            all_pictures = [*pictures, *new_pictures]
            check_question(text, all_pictures)
            turn = Message("user", text, len(new_pictures))
            answer = ""
            failed = False
            try:
                prompt = [*messages, turn]
                with closing(self._engine.generate(prompt, all_pictures, self._options, cancel, reuse=True)) as chunks:
                    for chunk in chunks:
                        answer += chunk.text
                        yield chunk
            except Exception as error:
                failed = True
                if isinstance(error, ContextOverflowError) and len(messages) > 1:
                    raise ContextOverflowError(f"{error} {_RESET_HINT}") from error
                raise
            finally:  # also when closed or interrupted
                if not failed:
                    messages += [turn, Message("assistant", answer)]
                    pictures += new_pictures

    def asay(self, text: str, images: Images = ()) -> AsyncGenerator[Chunk, None]:
        """`say` for asyncio. Closing it, or cancelling the task, stops it; the turn is kept.

        After a `break` out of its loop it stops when Python closes the generator; `contextlib.aclosing` stops it at
        once.
        """
        sources = [copy_image(image) for image in as_list(images)]

        def say_in_turn(cancel: threading.Event) -> Stream:
            ticket = object()
            self._async_queue.append(ticket)
            try:
                with self._queue_changed:
                    while self._async_queue[0] is not ticket and not cancel.is_set():
                        self._queue_changed.wait(POLL_SECONDS)
                if not cancel.is_set():
                    yield from self.say(text, sources, cancel=cancel)
            finally:
                with self._queue_changed:
                    self._async_queue.remove(ticket)
                    self._queue_changed.notify_all()

        return stream_in_thread(say_in_turn, wait_for_end=True)

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("A Chat cannot be copied; start one with Llava.chat, and resume it with messages and images.")

    def prepare(self, image: AnyImage) -> Picture:
        """Decode and preprocess an image now, for a later `say`. Raises `ImageError` or `MissingError`."""
        return self._engine.prepare(copy_buffer(image))


@contextmanager
def _exclusive(lock: threading.Lock) -> Iterator[None]:
    if not lock.acquire(blocking=False):
        raise UsageError("The last answer of this conversation is still open; read it to the end or close it first.")
    try:
        yield
    finally:
        lock.release()
