"""The engine of an open bundle: images and messages in, a stream of chunks out.

All model work happens in one engine thread; callers queue jobs and read their own stream, so the main thread stays free
for Ctrl-C. Knows nothing about command lines, image files (image.py does) or HTTP.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llava_edge import prompt
from llava_edge.bundle import Bundle
from llava_edge.cache import user_cache
from llava_edge.errors import LlavaEdgeError, MissingError, OptionError, UsageError
from llava_edge.image import ImageInput
from llava_edge.options import Chunk, EngineOptions, FinishReason, Options
from llava_edge.runtimes.decoding import Answer
from llava_edge.runtimes.jobs import CLOSED, EngineThread, Job, Stream
from llava_edge.runtimes.loading import LoadedModel, Loader
from llava_edge.runtimes.parallel import Outcome, Request
from llava_edge.runtimes.picture_cache import PictureCache
from llava_edge.runtimes.pictures import RECENT_BYTES, Picture, RecentPictures, snapshot_images
from llava_edge.runtimes.requests import Preparer, check_request
from llava_edge.runtimes.stats import RequestStats


class Engine:
    """An open bundle; use `Engine.open`. Thread-safe: requests are served in order, `parallel` at a time.

    Closed by `close`, at Python's exit, and when it is garbage-collected: its thread refers only to its parts.
    """

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        self.bundle = bundle
        self._options = options
        self._model: LoadedModel | None = None
        self._preparer: Preparer  # once the model is loaded
        self._cache = _open_cache(options.cache)
        self._recent = RecentPictures(bundle.manifest, RECENT_BYTES if options.cache else 0)
        self._parts = ExitStack()
        self._parts.callback(self._cache.close)
        self._thread = EngineThread(self._parts.close)
        weakref.finalize(self, self._thread.close, wait=False).atexit = False

    @staticmethod
    def open(
        bundle: Bundle,
        options: EngineOptions | None = None,
        *,
        pictures: Sequence[Callable[[], Picture]] = (),
        on_load: Callable[[float], None] = lambda fraction: None,
    ) -> Engine:
        """Load all parts. `on_load` gets the loaded fraction, in a thread of the engine; if it raises, loading stops.

        pictures: functions that prepare the pictures of the first request. They are called in the caller's thread, and
            the pictures embedded, while the language model loads; if all are cached, CLIP is loaded only when needed.
        Raises `BundleError`, `UnavailableError`, `MemoryLimitError`, `UsageError`, and what `pictures` raises.
        """
        if options is not None and not isinstance(options, EngineOptions):
            raise UsageError(f"Expected EngineOptions, not {options!r:.60}.")
        engine = Engine(bundle, options or EngineOptions())
        prepared: list[Future[Picture]] = [Future() for _ in pictures]
        try:
            loading = engine._thread.start(lambda job: engine._load(job, prepared, on_load))
            for future, prepare in zip(prepared, pictures, strict=True):
                future.set_result(prepare())
            for _ in loading:
                pass
        except BaseException as error:
            for future in prepared:
                future.cancel()  # so that nobody waits for it; no effect if it has a result
            # After Ctrl-C, do not wait until loading stops. Otherwise wait: the process would abort if Python exited
            # while another thread frees engines.
            engine._thread.close(wait=isinstance(error, Exception))
            raise
        engine._thread.close_at_exit()
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
        """Answer the last message, or continue it if it is an answer. Images fill the messages' slots in order.

        The stream ends with a chunk that carries the `Result`. Setting `cancel`, which is only read, or closing the
        iterator stops the job within one prefill batch, or at once if it is still queued. Time to first token counts
        from `started` (time.monotonic).
        reuse: also reuse what the last prompt and its answer have in common with this one: faster, but rounded
            differently in the last digits, see `Prefill.run`.
        Pictures in memory are read now, in the caller's thread; files when the job starts.
        Raises `ImageError`, `MissingError`, `UsageError`, `ContextOverflowError` before any model runs; `BundleError`.
        """
        check_request([messages], options, cancel)
        seeded = _with_seed(options)
        stats = RequestStats(time.monotonic() if started is None else started, seeded.seed)
        event = cancel or threading.Event()
        messages, sources = tuple(messages), snapshot_images(images, self.bundle.manifest)

        def prepare(job: Job) -> Request:
            return replace(self._preparer.prepare(job, messages, sources, seeded, stats), reuse=reuse)

        def answer(job: Job) -> None:
            own = iter([prepare(job)])
            self.model.scheduler.answer_all(lambda: next(own, None) or self._take_request(), self._finish)

        join = prepare if self.parallel > 1 else None
        return self._thread.submit(answer, event, lambda: self._last_chunk("", "cancelled", stats), join)

    def generate_many(
        self,
        conversations: Sequence[Sequence[prompt.Message]],
        images: Sequence[Sequence[ImageInput | Picture]],
        options: Options | None = None,
        cancel: threading.Event | None = None,
        *,
        started: float | None = None,
        save: bool = True,
    ) -> list[Stream]:
        """Answer several conversations, each about its own images, as `generate` does; return a stream for each.

        Each batch computes one token of each answer, for as many answers as fit into the context; `branches` says when
        they are bit-identical to separate ones. What a prompt has in common with the last one is evaluated once. An
        unusable image is an error of its own stream. Closing a stream early stops all.
        started: for all; otherwise time to first token counts from where an answer's images are read.
        save: save KV cache states: hundreds of megabytes for each picture of a 7B.
        """
        check_request(conversations, options, cancel)
        if not conversations:
            return []
        seeded = [_with_seed(options) for _ in conversations]
        event, start = cancel or threading.Event(), time.monotonic() if started is None else started

        def answer(jobs: list[Job]) -> None:
            requests = self._prepare_requests(jobs, conversations, images, seeded, started, save)
            self.model.scheduler.answer_all(lambda: next(requests, None), self._finish)

        def cancelled_chunk() -> Chunk:
            return self._last_chunk("", "cancelled", RequestStats(start, seeded[0].seed))

        return self._thread.submit_many(answer, event, len(conversations), cancelled_chunk)

    def check_options(self, options: Options) -> None:
        """Raise `UsageError` for options that suit no question to this model."""
        self._thread.run(lambda job: self._preparer.check_options(options))

    def check_context(
        self, conversations: Sequence[Sequence[prompt.Message]], pictures: Sequence[Picture], options: Options | None
    ) -> None:
        """See `Preparer.check_context`."""
        self._thread.run(lambda job: self._preparer.check_context(conversations, pictures, options or Options()))

    @property
    def parallel(self) -> int:
        """How many requests are answered at a time if they fit into the context: 1 if that could change an answer."""
        language = self.model.language
        return max(1, language.max_branches) if language.batch_invariant else 1

    def prepare(self, image: ImageInput | Picture) -> Picture:
        """Decode and preprocess an image, unless it is a recent one. Raises `ImageError` or `MissingError`."""
        return self._recent.prepare(image)

    def prepare_all(self, images: Sequence[ImageInput | Picture]) -> list[Picture]:
        """Prepare several images in parallel. Raises the first error."""
        return self._recent.prepare_all(images)

    def embed(self, image: ImageInput | Picture) -> np.ndarray[Any, Any]:
        """Return a picture's embeddings, as the language model gets them: (positions, hidden size) float32.

        Raises `ImageError`, `MissingError` or `BundleError`.
        """
        picture = self.prepare(image)
        embeddings = []

        def embed(job: Job) -> None:
            embeddings.append(self.model.embedder.submit(picture, RequestStats(0), job).result().copy())

        self._thread.run(embed)
        return embeddings[0]

    def close(self) -> None:
        """Cancel the running request, refuse queued ones, save KV cache states, and free the models.

        Harmless when repeated.
        """
        self._thread.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def encode_prompt(self, messages: Sequence[prompt.Message]) -> list[int]:
        """Return token ids, computed in the caller's thread: the engine must not be closed meanwhile.

        Raises `UsageError`, or `ContextOverflowError` for what is far too long to be tokenized.
        """
        if self.model.language.context is None:
            raise UsageError(CLOSED)
        return self._preparer.encode(messages)

    @property
    def model(self) -> LoadedModel:
        """The loaded parts, which are freed when the engine is closed. Raises `UsageError` before they are loaded."""
        if self._model is None:
            raise UsageError(CLOSED)
        return self._model

    def _load(self, job: Job, pictures: Sequence[Future[Picture]], on_load: Callable[[float], None]) -> None:
        loader = Loader(self.bundle, self._options, self._cache, self._parts)
        self._model = loader.load(job, pictures, on_load)
        self._preparer = Preparer(self.bundle.manifest, self._model, self._recent)
        self._thread.on_idle = self._model.prefill.save_states

    def _prepare_requests(
        self,
        jobs: Sequence[Job],
        conversations: Sequence[Sequence[prompt.Message]],
        images: Sequence[Sequence[ImageInput | Picture]],
        options: Sequence[Options],
        started: float | None,
        save: bool,
    ) -> Iterator[Request]:
        """Prepare each request when it is asked for; end the streams of those that cannot be, or are cancelled."""
        for job, messages, sources, own_options in zip(jobs, conversations, images, options, strict=True):
            stats = RequestStats(time.monotonic() if started is None else started, own_options.seed)
            if job.cancel.is_set():
                job.output.put(self._last_chunk("", "cancelled", stats))
                job.end()
                continue
            try:
                request = self._preparer.prepare(job, messages, sources, own_options, stats)
            except LlavaEdgeError as error:
                job.end(error)
            else:
                yield replace(request, save=save)

    def _take_request(self) -> Request | None:
        """Take the next request from the queue, if it may be answered together with another one."""
        while (job := self._thread.take()) is not None:
            try:
                assert job.join is not None
                request: Request = job.join(job)
            except Exception as error:  # noqa: BLE001 - of this job alone
                job.end(error)
            else:
                return request
        return None

    def _finish(self, answer: Answer, outcome: Outcome) -> None:
        """Output the last chunk, unless there is an error, and end the stream."""
        if isinstance(outcome, Exception):
            answer.job.end(outcome)
            return
        stream, stats = answer.stream, answer.stats
        tail = stream.end(interrupted=outcome != "stop")
        reason: FinishReason = "stop" if stream.stopped and outcome == "length" else outcome
        stats.text += tail
        answer.job.output.put(self._last_chunk(tail, reason, stats))
        answer.job.end()

    def _last_chunk(self, text: str, reason: FinishReason, stats: RequestStats) -> Chunk:
        model = self.model
        result = stats.result(reason, self.bundle.manifest.name, model.device.name, model.load_ms)
        return Chunk(text, stats.pending_tokens, reason, result, tuple(stats.pending_chances))


def _with_seed(options: Options | None) -> Options:
    """Return options with a seed if, and only if, sampling is random."""
    options = options or Options()
    if options.greedy:
        return replace(options, seed=None)
    return options if options.seed is not None else replace(options, seed=int.from_bytes(os.urandom(4)))


def _open_cache(setting: bool | Path | Literal["memory"]) -> PictureCache:
    if not setting:
        return PictureCache(None, memory_bytes=0)
    if setting == "memory":
        return PictureCache(None)
    if isinstance(setting, Path) and os.path.isfile(setting):  # noqa: PTH113 - no error for a name that is too long
        raise OptionError("cache", f"is {setting}, which is a file; expected a folder.")
    try:
        return PictureCache(user_cache(setting if isinstance(setting, Path) else None))
    except MissingError:  # no home folder
        return PictureCache(None)
