"""The library: load a model, ask it about images, stream the answer, hold a conversation; from threads or asyncio.

Everything else (command line, chat) is written on top of this file. Knows no engine by name.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llava_edge.bundle import Bundle
from llava_edge.errors import ContextOverflowError, UsageError
from llava_edge.image import ImageInput
from llava_edge.options import DEFAULT_PROMPT, Chunk, Device, EngineOptions, Options, Result, result_of
from llava_edge.prompt import Message
from llava_edge.runtimes.jobs import POLL_SECONDS, Stream
from llava_edge.runtimes.pictures import Picture, copied, taken
from llava_edge.runtimes.pipeline import Engine, check_request, check_slots
from llava_edge.store import DEFAULT_MODEL, resolve

Shown = ImageInput | bytearray | memoryview | Picture
Images = Shown | Sequence[Shown] | None

_BEGIN_ANEW = "A new conversation begins with /reset, in Python Chat.reset()."


class Llava:
    """A loaded model. Use it in a `with` block, or call `close`; calls from several threads are served in turn."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @classmethod
    def load(
        cls,
        model: str | Path = DEFAULT_MODEL,
        options: EngineOptions | None = None,
        *,
        device: Device | None = None,
        pictures: Sequence[Callable[[], Picture]] = (),
        on_load: Callable[[float], None] = lambda fraction: None,
    ) -> Llava:
        """Open a bundle folder, or a model pulled before, by name.

        on_load: gets the loaded fraction, 0 to 1, in another thread. What it raises stops loading and is raised here:
            the way to cancel it.
        pictures: each prepares one that will be asked about first; they are read and encoded while the model loads.
        device: short for `EngineOptions(device=...)`. Weights are mapped: what two processes or two `Llava` load of the
        same bundle is in memory once, except for what the preset "latency" copies (`EngineOptions.preset`).
        Raises `MissingError`, `BundleError`, `UnavailableError`, `MemoryLimitError`, `UsageError`, or what
        one of `pictures` raises.
        """
        if device is not None:
            options = replace(options or EngineOptions(), device=device)
        return cls(Engine.open(Bundle.open(resolve(model)), options, pictures=pictures, on_load=on_load))

    def ask(
        self, prompt: str = DEFAULT_PROMPT, images: Images = (), options: Options | None = None, *, system: str = ""
    ) -> Result:
        """Answer one question about any number of images (path, bytes, PIL image or RGB array each).

        system: text in place of the model's own before the question; empty leaves that.
        """
        return result_of(self.stream(prompt, images, options, system=system))

    def stream(
        self,
        prompt: str = DEFAULT_PROMPT,
        images: Images = (),
        options: Options | None = None,
        *,
        system: str = "",
        cancel: threading.Event | None = None,
        started: float | None = None,
    ) -> Stream:
        """Like `ask`, but a generator of `Chunk`s; the last one has the `Result`. Leaving or closing it stops the work.

        Nothing is computed before the first chunk is asked for; from then on the answer goes on ahead of its reader.
        PIL images and arrays are read now, so that they may be changed or filled anew; files when the stream is read.
        cancel: set it from another thread to stop. started: the instant (time.monotonic) that times count from.
        """
        shown = _as_list(images)
        _check_question(prompt, shown)
        return self._engine.generate(_asked(system, prompt, shown), shown, options, cancel, started=started)

    def ask_many(
        self,
        prompts: Sequence[str],
        images: Images = (),
        options: Options | None = None,
        *,
        system: str = "",
        cancel: threading.Event | None = None,
        started: float | None = None,
    ) -> Iterator[Stream]:
        """Several questions about the same images: one stream for each, as of `stream`. Leaving one early stops all.

        The images are encoded and read once, and the answers grow together: each pass over the weights gives a token of
        every answer, which with the native kernels is the one that `ask` gives. Without them a pass for several rounds
        otherwise than one for a single token, so that where two tokens are as good as equally likely, an answer may go
        on otherwise. Raises `ContextOverflowError` with the number of the question before anything is computed.
        """
        if isinstance(prompts, str):
            raise UsageError("ask_many wants a list of questions; for one there is ask.")
        sources = taken(_as_list(images), self.bundle.manifest)
        return self._answers(tuple(prompts), sources, options, system, cancel, started)

    def _answers(
        self,
        prompts: Sequence[str],
        sources: Sequence[ImageInput | Picture],
        options: Options | None,
        system: str,
        cancel: threading.Event | None,
        started: float | None,
    ) -> Iterator[Stream]:
        pictures = self._engine.prepare_all(sources)
        for text in prompts:
            _check_question(text, pictures)
        conversations = [_asked(system, text, pictures) for text in prompts]
        self._engine.require_room(conversations, pictures, options)
        streams = self._engine.generate_together(conversations, pictures, options, cancel, started=started)
        try:
            yield from streams
        except GeneratorExit:
            for stream in streams:
                stream.close()
            raise

    def answer(
        self,
        messages: Sequence[Message],
        images: Images = (),
        options: Options | None = None,
        *,
        cancel: threading.Event | None = None,
    ) -> Stream:
        """Stream the answer to a conversation kept elsewhere, or, if it ends with an answer, the rest of that.

        Images fill its slots.
        """
        return self._engine.generate(messages, _as_list(images), options, cancel)

    def aask(
        self, prompt: str = DEFAULT_PROMPT, images: Images = (), options: Options | None = None, *, system: str = ""
    ) -> Coroutine[Any, Any, Result]:
        """`ask` without blocking the event loop. Cancelling the task stops the work."""
        return _alast(self.astream(prompt, images, options, system=system))

    def astream(
        self, prompt: str = DEFAULT_PROMPT, images: Images = (), options: Options | None = None, *, system: str = ""
    ) -> AsyncGenerator[Chunk, None]:
        """`stream` without blocking the event loop. Closing it, or cancelling the task, stops the work."""
        shown = [copied(image) for image in _as_list(images)]
        return _awaited(lambda cancel: self.stream(prompt, shown, options, system=system, cancel=cancel))

    def embed_image(self, image: Shown) -> np.ndarray[Any, Any]:
        """What the language model sees of a picture: (positions, hidden size) float32, CLIP and projector applied.

        Raises `ImageError`, `MissingError` or `BundleError`.
        """
        return self._engine.embed(_as_bytes(image))

    def aembed_image(self, image: Shown) -> Coroutine[Any, Any, np.ndarray[Any, Any]]:
        """`embed_image` without blocking the event loop."""
        import asyncio

        return asyncio.to_thread(self.embed_image, copied(_as_bytes(image)))

    def chat(self, system: str = "", options: Options | None = None) -> Chat:
        """Begin a conversation. An empty `system` leaves the model's own system text."""
        return Chat(self._engine, system, options)

    @property
    def bundle(self) -> Bundle:
        """The opened bundle."""
        return self._engine.bundle

    @property
    def device(self) -> str:
        """Device in use and why, e.g. "cpu (asked for)"."""
        return f"{self._engine.choice.name} ({self._engine.choice.reason})"

    @property
    def preset(self) -> str:
        """Preset in use and why, e.g. "memory (asked for)"."""
        return f"{self._engine.preset.name} ({self._engine.preset.reason})"

    @property
    def context(self) -> int:
        """Positions that prompt and answer share."""
        return self._engine.context_size

    @property
    def load_ms(self) -> float:
        """What loading took, in milliseconds."""
        return self._engine.load_ms

    def close(self) -> None:
        """Free the engines. An answer in work ends as cancelled, calls that wait raise. Harmless when repeated."""
        self._engine.close()

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("A Llava can be neither copied nor sent; load another one, which shares the mapped weights.")

    def __enter__(self) -> Llava:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Chat:
    """A conversation. Turns and images are kept here; what the model already read is not computed again.

    One answer is open at a time. While it is, `say` raises `UsageError`, and `asay` waits for an awaited one to end.
    """

    def __init__(self, engine: Engine, system: str = "", options: Options | None = None) -> None:
        self._engine = engine
        self._system = system
        self._options = options
        self._turns = threading.Condition()
        self._waiting: list[object] = []  # awaited turns in the order of their beginning; the first is open
        self.messages: list[Message] = []
        self.reset()

    def reset(self) -> None:
        """Forget all turns and images, an open answer's too."""
        self._begin(_before(self._system), [])

    def resume(self, messages: Sequence[Message], images: Images = ()) -> None:
        """Go on with a conversation kept elsewhere in place of this one; images fill its slots.

        Raises what `say` would, `ContextOverflowError` among others; this conversation is then as it was.
        """
        check_request([messages])
        if messages and messages[-1].role == "user":
            raise UsageError("The conversation ends with a question; one that ends with an answer was expected.")
        shown = self._engine.prepare_all(_as_list(images))
        check_slots(messages, shown)
        if any(message.role != "system" for message in messages):
            self._engine.require_room([messages], shown, self._options)
        self._begin(list(messages), shown)

    def _begin(self, messages: list[Message], pictures: list[Picture]) -> None:
        """An answer that is still open goes on with the lists that it began with."""
        self.messages, self._pictures, self._open = messages, pictures, threading.Lock()

    def say(self, text: str, images: Images = (), *, cancel: threading.Event | None = None) -> Stream:
        """Stream the answer to the next turn.

        The turn is kept once the stream ends or is closed, with what was answered until then; after an error it is not.
        Raises `ContextOverflowError` when the conversation is too long for another turn; `reset` is the way out.
        """
        return self._turn(text, taken(_as_list(images), self._engine.bundle.manifest), cancel)

    def _turn(self, text: str, images: Sequence[ImageInput | Picture], cancel: threading.Event | None) -> Stream:
        with _alone(self._open):
            messages, pictures = self.messages, self._pictures
            new = self._engine.prepare_all(images)
            shown = [*pictures, *new]
            _check_question(text, shown)
            turn = Message("user", text, len(new))
            answer = ""
            failed = False
            try:
                prompt = [*messages, turn]
                with closing(self._engine.generate(prompt, shown, self._options, cancel, reuse=True)) as chunks:
                    for chunk in chunks:
                        answer += chunk.text
                        yield chunk
            except Exception as error:
                failed = True
                if isinstance(error, ContextOverflowError) and len(messages) > 1:
                    raise ContextOverflowError(f"{error} {_BEGIN_ANEW}") from error
                raise
            finally:  # also when closed or interrupted
                if not failed:
                    messages += [turn, Message("assistant", answer)]
                    pictures += new

    def asay(self, text: str, images: Images = ()) -> AsyncGenerator[Chunk, None]:
        """`say` without blocking the event loop. Closing it, or cancelling the task, stops it; the turn is kept.

        If `break` leaves the loop over it, it is stopped soon after; `contextlib.aclosing` stops it at once.
        """
        shown = [copied(image) for image in _as_list(images)]

        def turn(cancel: threading.Event) -> Stream:
            own = object()
            self._waiting.append(own)
            try:
                with self._turns:
                    while self._waiting[0] is not own and not cancel.is_set():
                        self._turns.wait(POLL_SECONDS)
                if not cancel.is_set():
                    yield from self.say(text, shown, cancel=cancel)
            finally:
                with self._turns:
                    self._waiting.remove(own)
                    self._turns.notify_all()

        return _awaited(turn, settle=True)

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("A Chat cannot be copied; begin one with Llava.chat, and resume it with messages and images.")

    def prepare(self, image: Shown) -> Picture:
        """Decode and preprocess an image now, to be shown later. Raises `ImageError` or `MissingError`."""
        return self._engine.prepare(_as_bytes(image))


@contextmanager
def _alone(lock: threading.Lock) -> Iterator[None]:
    if not lock.acquire(blocking=False):
        raise UsageError("The last answer of this conversation is still open; read it to its end, or close it, first.")
    try:
        yield
    finally:
        lock.release()


def _before(system: str) -> list[Message]:
    return [Message("system", system)] if system else []


def _asked(system: str, prompt: str, images: Sequence[object]) -> list[Message]:
    return [*_before(system), Message("user", prompt, len(images))]


def _check_question(text: str, images: Sequence[object]) -> None:
    """Raises `UsageError` for what is no text, or is about a picture that is not there."""
    if not isinstance(text, str):
        raise UsageError(f"A text was expected as a question, not {text!r:.60}.")
    if text == DEFAULT_PROMPT and not images:
        raise UsageError("There is no image to describe; pass one, or a question.")


def _as_list(images: Images) -> list[ImageInput | Picture]:
    if images is None:
        return []
    if isinstance(images, Sequence) and not isinstance(images, str | bytes | bytearray | memoryview):
        return [_as_bytes(image) for image in images]
    return [_as_bytes(images)]


def _as_bytes(image: Shown) -> ImageInput | Picture:
    """A buffer as what it holds now: its owner may write to it."""
    return bytes(image) if isinstance(image, bytearray | memoryview) else image


async def _alast(stream: AsyncGenerator[Chunk, None]) -> Result:
    async with aclosing(stream) as chunks:
        return result_of([chunk async for chunk in chunks])


async def _awaited(start: Callable[[threading.Event], Stream], settle: bool = False) -> AsyncGenerator[Chunk, None]:
    """A stream, read in a thread of its own. `settle`: who leaves early waits until it has really ended.

    The last chunk arrives when the stream has ended, so that who leaves with it (Python closes such a generator later)
    finds a turn kept.
    """
    import asyncio  # 20 ms that the command line does without

    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[Chunk | Exception | None] = asyncio.Queue()
    cancel = threading.Event()

    def put(item: Chunk | Exception | None) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(arrived.put_nowait, item)

    def pump() -> None:
        last: Chunk | None = None
        try:
            for chunk in start(cancel):
                if chunk.final is None:
                    put(chunk)
                else:
                    last = chunk
        except Exception as error:  # noqa: BLE001 - raised where it is awaited
            put(error)
        if last is not None:
            put(last)
        put(None)

    threading.Thread(target=pump, name="llava-edge stream", daemon=True).start()
    ended = False
    try:
        while (item := await arrived.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
        ended = True
    finally:
        cancel.set()
        while settle and not ended:
            ended = await arrived.get() is None
