"""A bundle, opened: images and messages in, one stream of chunks out.

All engine work happens in one owner thread; callers queue up and read their own stream, so the main thread stays
free for Ctrl-C. Knows nothing about command lines, files of images (image.py does) or HTTP.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llava_edge import anyres, gguf, prompt
from llava_edge.bundle import LANGUAGE, Bundle
from llava_edge.errors import BundleError, ContextOverflowError, MemoryLimitError, UsageError
from llava_edge.image import ImageInput
from llava_edge.options import Chunk, EngineOptions, FinishReason, Options, Result, Timings
from llava_edge.runtimes import CancelledError, after_control, devices, probe
from llava_edge.runtimes.language import Key, LanguageModel
from llava_edge.runtimes.pictures import Picture, prepare
from llava_edge.runtimes.projector import Projector
from llava_edge.runtimes.sampling import Sampler
from llava_edge.runtimes.text import TextStream
from llava_edge.runtimes.vision import VisionEncoder
from llava_edge.templates import template

Stream = Generator[Chunk, None, None]

DEFAULT_CONTEXT = 4096  # LLaVA-1.5's; a longer one is opt-in because its memory grows with it
POLL_SECONDS = 0.05  # how often a waiting caller looks whether it was cancelled


@dataclass
class _Job:
    """One request: what the owner thread runs, and where it puts what comes out. None ends the stream."""

    run: Callable[[_Job], None]
    cancel: threading.Event
    output: queue.SimpleQueue[Chunk | BaseException | None] = field(default_factory=queue.SimpleQueue)
    vision_run: Any = None

    def stop(self) -> None:
        """Ask the owner thread to leave this job, from any thread."""
        self.cancel.set()
        if self.vision_run is not None:
            self.vision_run.terminate = True


@dataclass
class _Run:
    """Measurements of one answer, filled in on the way."""

    started: float
    preprocess_ms: float = 0.0
    encode_ms: float = 0.0
    prefill_ms: float = 0.0
    first_token: float = 0.0
    prompt_tokens: int = 0
    image_tokens: int = 0
    tokens: int = 0  # of the answer, without its end token
    unseen: int = 0  # of these, not yet in a chunk
    text: str = ""


class Engine:
    """Open it with `Engine.open`; it is safe to call from several threads, which are served in turn."""

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        self.bundle = bundle
        self.options = options
        self.choice = devices.choose("cpu")
        self.load_ms = 0.0
        self.context_size = 0
        self._vision: VisionEncoder | None = None
        self._language: LanguageModel | None = None
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._owner = threading.Thread(target=self._serve, name="llava-edge engine", daemon=True)
        self._owner.start()

    @staticmethod
    def open(
        bundle: Bundle,
        options: EngineOptions | None = None,
        *,
        on_load: Callable[[float], None] = lambda fraction: None,
    ) -> Engine:
        """Load all parts. `on_load` gets the loaded fraction, in the owner thread.

        Raises `BundleError`, `UnavailableError`, `MemoryLimitError` or `UsageError`.
        """
        engine = Engine(bundle, options or EngineOptions())
        try:
            for _ in engine._submit(lambda job: engine._load(job.cancel, on_load), threading.Event()):
                pass
        except BaseException:
            engine._jobs.put(None)
            raise
        return engine

    def generate(
        self,
        messages: Sequence[prompt.Message],
        images: Sequence[ImageInput | Picture] = (),
        options: Options | None = None,
        cancel: threading.Event | None = None,
        *,
        started: float | None = None,
        reuse: bool = False,
    ) -> Stream:
        """Answer the last message. Images belong to the messages' slots in order.

        The stream ends with a chunk that carries the `Result`. Setting `cancel`, or closing the iterator, stops the
        work within one prefill chunk. `started` (time.monotonic) is what time to first token counts from.
        `reuse` keeps a beginning that the last prompt had too: faster, but rounded differently in the last digits,
        because other kernels computed it.
        Raises `ImageError`, `MissingError`, `UsageError`, `ContextOverflowError` before any model runs; `BundleError`.
        """
        run = _Run(time.monotonic() if started is None else started)
        wanted = options or Options()
        event = cancel or threading.Event()
        return self._submit(lambda job: self._answer(job, messages, images, wanted, run, reuse), event)

    def close(self) -> None:
        """Stop after the request in work, and free the engines. Harmless when repeated."""
        self._jobs.put(None)
        if self._owner is not threading.current_thread():
            self._owner.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(self, run: Callable[[_Job], None], cancel: threading.Event) -> Stream:
        """Queue a job and yield its chunks. Leaving early, by Ctrl-C too, cancels it."""
        if not self._owner.is_alive():
            raise UsageError("The engine is closed.")
        job = _Job(run, cancel)
        self._jobs.put(job)
        try:
            while (item := self._next(job)) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            job.stop()

    def _next(self, job: _Job) -> Chunk | BaseException | None:
        while True:
            try:
                return job.output.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if job.cancel.is_set():
                    job.stop()

    def _serve(self) -> None:
        """The owner thread: everything that touches an engine runs here."""
        while (job := self._jobs.get()) is not None:
            try:
                job.run(job)
                job.output.put(None)
            except BaseException as error:  # noqa: BLE001 - the caller gets it
                job.output.put(error)
        if self._language is not None:
            self._language.close()
        self._vision = None

    def _load(self, cancel: threading.Event, on_load: Callable[[float], None]) -> None:
        start = time.perf_counter()
        probe.require_working_build()
        self.choice = devices.choose(self.options.device)
        manifest = self.bundle.manifest
        path = self.bundle.part(LANGUAGE)
        header = gguf.read(path)
        gguf.check_language(header)
        self.context_size = _context_size(self.options.context, manifest.language.context_length)
        _check_memory(header, self.context_size, self.options.repack)
        threads = self.options.threads or devices.thread_count()[0]

        def progress(fraction: float) -> bool:
            on_load(fraction)
            return not cancel.is_set()

        self._language = LanguageModel(
            path,
            context=self.context_size,
            threads=threads,
            gpu_layers=self.choice.gpu_layers,
            repack=self.options.repack,
            verbose=self.options.verbose,
            on_load=progress,
        )
        found = (self._language.hidden_size, self._language.vocab_size)
        if found != (manifest.language.hidden_size, manifest.language.vocab_size):
            raise BundleError(
                f"{path} has hidden size and vocabulary {found}, the manifest says "
                f"{(manifest.language.hidden_size, manifest.language.vocab_size)}: it is from another bundle."
            )
        self._projector = Projector(self.bundle)
        self._vision = VisionEncoder(self.bundle, threads, self.choice.provider)
        self._template = template(manifest.template)
        self._ends = {self._language.control_id(name) for name in self._template.stops}
        self._after_control = after_control.encoder(self._language, manifest.after_control)
        self.load_ms = _since(start)

    def _answer(
        self,
        job: _Job,
        messages: Sequence[prompt.Message],
        images: Sequence[ImageInput | Picture],
        options: Options,
        run: _Run,
        reuse: bool,
    ) -> None:
        slots = sum(message.images for message in messages)
        if slots != len(images):
            raise UsageError(f"The messages have room for {slots} images, {len(images)} were given.")
        ids = self._encode_prompt(messages)
        manifest = self.bundle.manifest
        if manifest.preprocessing.square != "anyres":  # then the positions are known before a file is opened
            self._check_room(run, ids, [manifest.vision.image_tokens] * slots)
        pictures = [prepare(image, manifest) for image in images]
        self._check_room(run, ids, [len(picture.rows) for picture in pictures])
        run.preprocess_ms = sum(picture.milliseconds for picture in pictures)
        stream = TextStream((*options.stop, *self._template.stop_texts))
        try:
            if not reuse:
                self._opened().keep([])
            self._prefill(ids, pictures, run, job)
            reason = self._decode(job, stream, options, run)
        except CancelledError:
            reason = "cancelled"
        tail = stream.end(cut=reason != "stop")
        if stream.stopped and reason == "length":
            reason = "stop"
        run.text += tail
        job.output.put(Chunk(tail, run.unseen, reason, self._result(run, reason)))

    def _encode_prompt(self, messages: Sequence[prompt.Message]) -> list[int]:
        language = self._opened()
        size = sum(len(message.text.encode("utf-8", "replace")) for message in messages)
        if size > self.context_size * 64:  # no vocabulary here has tokens of 64 bytes on average
            raise ContextOverflowError(
                f"The messages have {size} bytes of text, far more than a context of {self.context_size} holds."
            )
        manifest = self.bundle.manifest
        pieces = prompt.render(manifest.template, messages, manifest.image_markers)
        return prompt.encode(pieces, language.tokenize, language.control_id, self._after_control)

    def _check_room(self, run: _Run, ids: list[int], rows: list[int]) -> None:
        """Count positions; `rows` are those of each image. Raises `ContextOverflowError`."""
        run.image_tokens = sum(rows)
        run.prompt_tokens = len(ids) - len(rows) + run.image_tokens
        if run.prompt_tokens < self.context_size:
            return
        raise ContextOverflowError(
            f"The prompt needs {run.prompt_tokens} positions ({len(rows)} images: {run.image_tokens}, text: "
            f"{run.prompt_tokens - run.image_tokens}) and the answer at least 1, but the context has "
            f"{self.context_size}. Use fewer images, a shorter text or a larger --context."
        )

    def _prefill(self, ids: list[int], pictures: list[Picture], run: _Run, job: _Job) -> None:
        """Evaluate the prompt, except for a beginning that is still in memory from the last one."""
        language = self._opened()
        waiting = iter(pictures)
        parts: list[tuple[Picture | None, list[Key]]] = []
        for token in ids:
            if token == prompt.IMAGE_TOKEN_INDEX:
                picture = next(waiting)
                parts.append((picture, [(picture.key, row) for row in range(len(picture.rows))]))
            elif parts and parts[-1][0] is None:
                parts[-1][1].append(token)
            else:
                parts.append((None, [token]))
        skip = language.keep([key for _, keys in parts for key in keys])
        for part, keys in parts:
            done, skip = min(skip, len(keys)), max(0, skip - len(keys))
            if done == len(keys):
                continue
            start = time.perf_counter()
            if part is None:
                language.evaluate_tokens([key for key in keys[done:] if isinstance(key, int)], job.cancel)
            else:
                embeddings = self._embed(part, job)
                run.encode_ms += _since(start)
                start = time.perf_counter()
                language.evaluate_embeddings(embeddings[done:], keys[done:], job.cancel)
            run.prefill_ms += _since(start)

    def _embed(self, picture: Picture, job: _Job) -> np.ndarray[Any, Any]:
        """(positions, hidden size) float32. Crops go one by one: five at once take five times the working memory."""
        if self._vision is None:
            raise UsageError("The engine is closed.")
        job.vision_run = job.vision_run or self._vision.new_run()
        embeddings = []
        for crop in picture.crops:
            if job.cancel.is_set():  # asked after the handle can be seen, so that no stop is lost
                raise CancelledError
            embeddings.append(self._projector.project(self._vision.encode(crop, job.vision_run)))
        return anyres.arrange(np.stack(embeddings), self._projector.newline, picture.rows)

    def _decode(self, job: _Job, stream: TextStream, options: Options, run: _Run) -> FinishReason:
        language = self._opened()
        limit = min(options.max_tokens, self.context_size - run.prompt_tokens)
        sampler = Sampler(language.library, options)
        try:
            while True:
                language.logits()  # refuses what is not finite
                token = sampler.sample(language.context)
                run.first_token = run.first_token or time.monotonic()
                if token in self._ends or language.ends(token):
                    return "stop"
                run.tokens += 1
                run.unseen += 1
                text = stream.feed(language.piece(token))
                if text:
                    run.text += text
                    job.output.put(Chunk(text, run.unseen))
                    run.unseen = 0
                if stream.stopped:
                    return "stop"
                if run.tokens >= limit:
                    return "length"
                language.evaluate_tokens([token], job.cancel)
        finally:
            sampler.close()

    def _result(self, run: _Run, reason: FinishReason) -> Result:
        now = time.monotonic()
        decode = now - run.first_token if run.first_token else 0.0
        timings = Timings(
            load_ms=self.load_ms,
            preprocess_ms=run.preprocess_ms,
            encode_ms=run.encode_ms,
            prefill_ms=run.prefill_ms,
            ttft_ms=(run.first_token - run.started) * 1000 if run.first_token else 0.0,
            decode_ms=decode * 1000,
            decode_tokens_per_s=(run.tokens - 1) / decode if decode > 0 and run.tokens > 1 else 0.0,
            total_ms=(now - run.started) * 1000,
        )
        return Result(
            text=run.text,
            finish_reason=reason,
            model=self.bundle.manifest.name,
            device=self.choice.name,
            image_tokens=run.image_tokens,
            prompt_tokens=run.prompt_tokens,
            completion_tokens=run.tokens,
            cache="miss",
            timings=timings,
            memory=devices.memory_use(),
        )

    def _opened(self) -> LanguageModel:
        if self._language is None:
            raise UsageError("The engine is closed.")
        return self._language


def _context_size(asked: int, trained: int) -> int:
    if asked > trained:
        raise UsageError(f"A context of {asked} was asked for, but the model was trained for at most {trained}.")
    return asked or min(trained, DEFAULT_CONTEXT)


def _check_memory(header: gguf.Gguf, context: int, repack: bool) -> None:
    """Refuse early what cannot fit. Mapped weights count only if they are copied for repacking."""
    heads = header.number("llama.attention.head_count", 1, 1024)
    kv_heads = header.metadata.get("llama.attention.head_count_kv", heads)
    width = header.metadata["llama.embedding_length"] // heads * kv_heads
    needed = 2 * header.metadata["llama.block_count"] * context * width * 2  # keys and values, float16
    if repack:
        needed += sum(tensor.size for tensor in header.tensors.values() if tensor.kind.startswith(("Q4", "IQ4")))
    available = devices.available_memory()
    if available is not None and needed > available:
        raise MemoryLimitError(
            f"{header.path.parent} with a context of {context} needs about {needed >> 20} MiB of memory, "
            f"{available >> 20} MiB are available. Use a smaller --context or model."
        )


def _since(start: float) -> float:
    """Milliseconds since a `time.perf_counter()` instant."""
    return (time.perf_counter() - start) * 1000
