"""The library: load a model, ask it about images, stream answers, hold conversations, from threads or asyncio.

The command line, chat and server are built on it. It knows no engine by name.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llava_edge.asynchronous import collect_result, stream_in_thread
from llava_edge.bundle import Bundle
from llava_edge.conversation import Chat
from llava_edge.errors import LlavaEdgeError, UsageError
from llava_edge.image import ImageInput
from llava_edge.options import DEFAULT_PROMPT, Chunk, Device, EngineOptions, Options, Result, result_of
from llava_edge.prompt import Message
from llava_edge.question import SINGLE, AnyImage, Images, as_list, check_question, copy_buffer, question_messages
from llava_edge.runtimes.jobs import Stream
from llava_edge.runtimes.pictures import Picture, copy_image, snapshot_images
from llava_edge.runtimes.pipeline import Engine
from llava_edge.store import DEFAULT_MODEL, resolve

Embeddings = np.ndarray[tuple[int, int], np.dtype[np.float32]]


class Llava:
    """A loaded model. Use it in a `with` block, or call `close`.

    Calls from several threads are served in order, up to `parallel` at a time.
    """

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
        """Load a model, given as a bundle folder or as the name of a pulled model.

        device: shorthand for `EngineOptions(device=...)`.
        pictures: functions that prepare the pictures to be asked about first, which are read and encoded while the
            model loads.
        on_load: gets the loaded fraction, 0 to 1, in another thread. To cancel loading, raise an exception in it, which
            is then raised here.

        Weights are memory-mapped: processes, or several `Llava`, that load the same bundle share them, except for the
        copies that the preset "latency" makes (`EngineOptions.preset`).
        Raises `MissingError`, `BundleError`, `UnavailableError`, `MemoryLimitError`, `UsageError`, or what
        one of `pictures` raises.
        """
        if device is not None:
            options = replace(options or EngineOptions(), device=device)
        return cls(Engine.open(Bundle.open(resolve(model)), options, pictures=pictures, on_load=on_load))

    def ask(
        self, prompt: str = DEFAULT_PROMPT, images: Images = (), options: Options | None = None, *, system: str = ""
    ) -> Result:
        """Answer one question about any number of images.

        images: each a path, an encoded file as bytes, a Pillow image, or a uint8 array (H, W), (H, W, 3) or (H, W, 4):
            grey, RGB (not OpenCV's BGR) or RGBA.
        system: system prompt; empty means the model's own.
        Raises `ImageError`, `MissingError`, `ContextOverflowError`, `UsageError` or `BundleError`.
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
        """Like `ask`, but a generator of `Chunk`s, the last of which has the `Result`. Closing it stops the work.

        Nothing is computed before the first chunk is requested; after that, decoding runs ahead of the reader.
        PIL images and arrays are read now, so the caller may reuse them; files are opened when the stream is read.
        Raises what `ask` does, some of it only when it is read.
        cancel: set it from another thread to stop. started: the instant (time.monotonic) that times count from.
        """
        sources = as_list(images)
        check_question(prompt, sources)
        messages = question_messages(system, prompt, sources)
        return self._engine.generate(messages, sources, options, cancel, started=started)

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
        """Several questions about the same images: yields one stream per question.

        Work begins when the first stream is requested. Closing one early, or dropping it, stops all. The images are
        encoded and prefilled once, and the answers are decoded as a batch: each pass over the weights gives one token
        of every answer. With the native kernels these are the tokens that `ask` gives; without them a batch rounds
        differently from a single token, so where two tokens are almost equally likely an answer may differ. Raises
        `ContextOverflowError` with the number of the question before anything is computed.
        """
        if isinstance(prompts, str):
            raise UsageError("ask_many expects a list of questions; use ask for a single one.")
        sources = snapshot_images(as_list(images), self.bundle.manifest)
        return self._stream_answers(tuple(prompts), sources, options, system, cancel, started)

    def _stream_answers(
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
            check_question(text, pictures)
        conversations = [question_messages(system, text, pictures) for text in prompts]
        self._engine.check_context(conversations, pictures, options)
        images = [pictures] * len(conversations)
        yield from self._engine.generate_many(conversations, images, options, cancel, started=started)

    def ask_each(
        self,
        images: Sequence[AnyImage],
        prompt: str = DEFAULT_PROMPT,
        options: Options | None = None,
        *,
        system: str = "",
        cancel: threading.Event | None = None,
    ) -> list[Stream]:
        """The same question about each of many images: one stream per image. Closing one early stops all.

        Work begins at once: images are read and encoded one after another, and the answers are decoded as a batch,
        with the same tokens as `ask_many` says. The stream of an image that cannot be used raises `ImageError`,
        `MissingError` or `ContextOverflowError`, that of an answer whose grammar allows no next token `UsageError`, and
        the others go on. With options that `check_options` refuses, all raise. KV cache states are used, but not saved.
        """
        if isinstance(images, SINGLE) or not isinstance(images, Sequence):
            raise UsageError("ask_each expects a list of images; use ask for a single one.")
        sources = [self._snapshot(image) for image in images]
        check_question(prompt, sources or [None])
        conversations = [question_messages(system, prompt, [source]) for source in sources]
        return self._engine.generate_many(conversations, [[source] for source in sources], options, cancel, save=False)

    def check_options(self, options: Options) -> None:
        """Raise `UsageError` for options that suit no question to this model: a grammar that llama.cpp cannot parse,
        say. Otherwise each question raises it.
        """
        self._engine.check_options(options)

    def _snapshot(self, image: AnyImage) -> ImageInput | Picture:
        """Prepare a picture in memory now, because the caller may change it; an unusable one raises its error later."""
        source = copy_buffer(image)
        with suppress(LlavaEdgeError):
            (source,) = snapshot_images([source], self.bundle.manifest)
        return source

    def answer(
        self,
        messages: Sequence[Message],
        images: Images = (),
        options: Options | None = None,
        *,
        cancel: threading.Event | None = None,
    ) -> Stream:
        """Stream the next answer of a conversation kept by the caller; if it ends with an answer, continue that one.

        After an optional system message, user and assistant alternate. Images fill the messages' image slots in order.
        A grammar applies to what is streamed, not to what it continues. Raises what `stream` does.
        """
        return self._engine.generate(messages, as_list(images), options, cancel)

    def aask(
        self, prompt: str = DEFAULT_PROMPT, images: Images = (), options: Options | None = None, *, system: str = ""
    ) -> Coroutine[Any, Any, Result]:
        """`ask` for asyncio. Cancelling the task stops the work."""
        return collect_result(self.astream(prompt, images, options, system=system))

    def astream(
        self, prompt: str = DEFAULT_PROMPT, images: Images = (), options: Options | None = None, *, system: str = ""
    ) -> AsyncGenerator[Chunk, None]:
        """`stream` for asyncio. Closing it, or cancelling the task, stops the work."""
        sources = [copy_image(image) for image in as_list(images)]
        return stream_in_thread(lambda cancel: self.stream(prompt, sources, options, system=system, cancel=cancel))

    def embed_image(self, image: AnyImage) -> Embeddings:
        """Image embeddings after CLIP and projector, as the language model gets them: (positions, hidden size) float32.

        Raises `ImageError`, `MissingError` or `BundleError`.
        """
        return self._engine.embed(copy_buffer(image))

    def aembed_image(self, image: AnyImage) -> Coroutine[Any, Any, Embeddings]:
        """`embed_image` for asyncio."""
        import asyncio

        return asyncio.to_thread(self.embed_image, copy_image(copy_buffer(image)))

    def chat(self, system: str = "", options: Options | None = None) -> Chat:
        """Start a conversation. An empty `system` means the model's own system prompt."""
        return Chat(self._engine, system, options)

    @property
    def bundle(self) -> Bundle:
        """The opened bundle."""
        return self._engine.bundle

    @property
    def device(self) -> str:
        """Device in use and why, such as "cpu (asked for)"."""
        return f"{self._engine.model.device.name} ({self._engine.model.device.reason})"

    @property
    def preset(self) -> str:
        """Preset in use and why, such as "memory (asked for)"."""
        return f"{self._engine.model.preset.name} ({self._engine.model.preset.reason})"

    @property
    def context(self) -> int:
        """Context length: positions that prompt and answer share."""
        return self._engine.model.preset.context

    @property
    def parallel(self) -> int:
        """How many requests of different threads are answered at a time.

        1 where that could change an answer: on GPUs, and without our native kernels for all parts of the model.
        """
        return self._engine.parallel

    @property
    def load_ms(self) -> float:
        """Loading time in milliseconds."""
        return self._engine.model.load_ms

    def close(self) -> None:
        """Free the engines. A running answer ends as cancelled, waiting calls raise. May be called again."""
        self._engine.close()

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("A Llava cannot be copied or pickled; load another one, which shares the mapped weights.")

    def __enter__(self) -> Llava:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
