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

from llava_edge import gguf, prompt
from llava_edge.bundle import LANGUAGE, VISION, VISION_DATA, Bundle
from llava_edge.cache import user_cache
from llava_edge.errors import BundleError, ContextOverflowError, LlavaEdgeError, MissingError, UsageError
from llava_edge.image import ImageInput
from llava_edge.options import Chunk, EngineOptions, FinishReason, Options
from llava_edge.runtimes import devices, presets, probe, tune
from llava_edge.runtimes.decoding import Answer
from llava_edge.runtimes.draft import DraftModel, check_draft
from llava_edge.runtimes.embedder import Embedder
from llava_edge.runtimes.jobs import CLOSED, EngineThread, Job, Stream
from llava_edge.runtimes.language import BATCH, LanguageModel
from llava_edge.runtimes.parallel import Outcome, Request
from llava_edge.runtimes.picture_cache import PictureCache
from llava_edge.runtimes.pictures import (
    RECENT_BYTES,
    Picture,
    RecentPictures,
    apply_token_budget,
    check_budget,
    snapshot_images,
)
from llava_edge.runtimes.prefill import Prefill, split_segments
from llava_edge.runtimes.requests import check_request, check_slots
from llava_edge.runtimes.sampling import Sampler
from llava_edge.runtimes.scheduler import Scheduler
from llava_edge.runtimes.speculation import Speculation
from llava_edge.runtimes.stats import RequestStats, elapsed_ms
from llava_edge.runtimes.text import TextStream
from llava_edge.runtimes.tokenization import prompt_encoder
from llava_edge.templates import get_template

MAX_BATCH = 1024  # positions; working memory grows with it: 13 MB for 64 positions of a 7B


class Engine:
    """An open bundle; use `Engine.open`. Thread-safe: requests are served in order, `parallel` at a time.

    Closed by `close`, at Python's exit, and when it is garbage-collected: its thread refers only to its parts.
    """

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        self.bundle = bundle
        self.options = options
        self.device = devices.choose("cpu")
        self.preset = presets.Preset("memory", "nothing is loaded")
        self.load_ms = 0.0
        self.context_size = 0
        self._embedder: Embedder | None = None
        self._language: LanguageModel | None = None
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
            loading = engine._thread.start(lambda job: engine._load(job.cancel, prepared, on_load))
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
            return replace(self._prepare_request(job, messages, sources, seeded, stats), reuse=reuse)

        def answer(job: Job) -> None:
            own = iter([prepare(job)])
            self._scheduler.answer_all(lambda: next(own, None) or self._take_request(), self._finish)

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
        save: use and save KV cache states: hundreds of megabytes for each picture of a 7B.
        """
        check_request(conversations, options, cancel)
        if not conversations:
            return []
        seeded = [_with_seed(options) for _ in conversations]
        event, start = cancel or threading.Event(), time.monotonic() if started is None else started

        def answer(jobs: list[Job]) -> None:
            requests = self._prepare_requests(jobs, conversations, images, seeded, started, save)
            self._scheduler.answer_all(lambda: next(requests, None), self._finish)

        def cancelled_chunk() -> Chunk:
            return self._last_chunk("", "cancelled", RequestStats(start, seeded[0].seed))

        return self._thread.submit_many(answer, event, len(conversations), cancelled_chunk)

    def check_options(self, options: Options) -> None:
        """Raise `UsageError` for options that suit no question to this model."""
        self._thread.run(lambda job: self._check_options(options))

    def check_context(
        self, conversations: Sequence[Sequence[prompt.Message]], pictures: Sequence[Picture], options: Options | None
    ) -> None:
        """Raise `ContextOverflowError` for the first conversation that does not fit, numbered if several are given.

        Raises `UsageError` for invalid conversations, or a number of pictures that they do not have.
        """

        def check(job: Job) -> None:
            reduced = [apply_token_budget(picture, options or Options(), self.bundle.manifest) for picture in pictures]
            rows = [len(picture.rows) for picture in reduced]
            for number, messages in enumerate(conversations, 1):
                check_slots(messages, pictures)
                try:
                    self._check_fits(RequestStats(0), self.encode_prompt(messages), rows, messages)
                except ContextOverflowError as error:
                    prefix = f"Question {number}: " if len(conversations) > 1 else ""
                    raise ContextOverflowError(f"{prefix}{error}") from error

        self._thread.run(check)

    @property
    def parallel(self) -> int:
        """How many requests are answered at a time if they fit into the context: 1 if that could change an answer."""
        language = self._language
        return max(1, language.max_branches) if language is not None and language.batch_invariant else 1

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
            assert self._embedder is not None
            embeddings.append(self._embedder.submit(picture, RequestStats(0), job).result().copy())

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

    def _load(
        self, cancel: threading.Event, pictures: Sequence[Future[Picture]], on_load: Callable[[float], None]
    ) -> None:
        start = time.perf_counter()
        probe.require_working_build()
        manifest = self.bundle.manifest
        self.device = devices.choose(self.options.device)
        batch = min(max(BATCH, manifest.vision.image_tokens), MAX_BATCH)
        self.preset = self._choose_preset(batch)
        self.context_size = self.preset.context
        threads = self.options.threads or devices.thread_count()[0]
        self._embedder = Embedder(self.bundle, self._vision_setting(threads), self.device.provider, self._cache)
        self._parts.callback(self._embedder.close)
        self._parts.callback(cancel.set)  # embedding may take longer than loading
        embedding = self._embedder.precompute(pictures, cancel)

        def progress(fraction: float) -> bool:
            on_load(fraction)
            return not cancel.is_set()

        language = self._load_language(threads, batch, progress)
        draft = None
        if self.options.draft:
            path, verbose = Path(self.options.draft), self.options.verbose
            draft = DraftModel(path, language, threads, repack=self.preset.repack, verbose=verbose)
            self._parts.callback(draft.close)
        prefill = Prefill(self.bundle, language, self._embedder, self._cache)
        self._scheduler = Scheduler(language, prefill, Speculation(language, draft))
        self._parts.callback(prefill.save_states)
        self._thread.on_idle = prefill.save_states
        self._template = get_template(manifest.template)
        self._end_tokens = {language.control_id(name) for name in self._template.stop_tokens}
        self._encode = prompt_encoder(language, manifest, unclosed=True)
        if not pictures:
            embedding.result()
        self.load_ms = elapsed_ms(start)

    def _choose_preset(self, batch: int) -> presets.Preset:
        manifest = self.bundle.manifest
        header = gguf.read(self.bundle.part(LANGUAGE))
        gguf.check_language(header)
        presets.check_context(self.options.context, manifest.language.context_length)
        if self.options.draft:
            check_draft(Path(self.options.draft), header)
        return presets.choose(
            self.options,
            header,
            manifest.language.context_length,
            tiles=manifest.preprocessing.square == "anyres",
            gpu_layers=self.device.gpu_layers,
            vision_copy_bytes=self._prepacked_vision_bytes(),
            mapped_bytes=sum(file.size for file in manifest.files.values()) + batch * manifest.language.vocab_size * 4,
        )

    def _load_language(self, threads: int, batch: int, progress: Callable[[float], bool]) -> LanguageModel:
        path, expected = self.bundle.part(LANGUAGE), self.bundle.manifest.language
        self._language = language = LanguageModel(
            path,
            adapter=self.bundle.adapter,
            context=self.context_size,
            threads=threads,
            batch=batch,
            gpu_layers=self.device.gpu_layers,
            repack=self.preset.repack,
            kv=self.preset.kv,
            verbose=self.options.verbose,
            on_load=progress,
        )
        self._parts.callback(language.close)
        actual, declared = (language.hidden_size, language.vocab_size), (expected.hidden_size, expected.vocab_size)
        if actual != declared:
            raise BundleError(
                f"{path} has hidden size and vocabulary size {actual}, but the manifest says {declared}: it is from "
                "another bundle."
            )
        return language

    def _prepacked_vision_bytes(self) -> int:
        """Bytes of CLIP's weights if its fastest setting here keeps a rearranged copy of them, else 0."""
        measured = tune.choose(tune.load(self.bundle), copies=True) if self.device.name == "cpu" else None
        if measured is None or not measured.prepack:
            return 0
        files = self.bundle.manifest.files
        return sum(files[name].size for name in (VISION, VISION_DATA) if name in files)

    def _vision_setting(self, threads: int) -> tune.Setting:
        """Return the measured setting for this machine, or the default one; a requested number of threads is kept."""
        if self.device.name != "cpu":
            return tune.Setting(threads, False)
        measured = tune.choose(tune.load(self.bundle), self.preset.copies)
        if measured is None:
            return tune.default_setting(self.bundle, threads)
        return replace(measured, threads=self.options.threads or measured.threads)

    def _prepare_request(
        self,
        job: Job,
        messages: Sequence[prompt.Message],
        images: Sequence[ImageInput | Picture],
        options: Options,
        stats: RequestStats,
    ) -> Request:
        """Prepare pictures and check everything that can be checked before any model runs."""
        check_slots(messages, images)
        ids = self.encode_prompt(messages)
        self._check_options(options)
        manifest = self.bundle.manifest
        if manifest.preprocessing.square != "anyres":  # then the number of positions is known before a file is opened
            self._check_fits(stats, ids, [options.image_tokens or manifest.vision.image_tokens] * len(images), messages)
        prepared = self.prepare_all(images)
        pictures = [apply_token_budget(picture, options, manifest) for picture in prepared]
        self._check_fits(stats, ids, [len(picture.rows) for picture in pictures], messages)
        # A prepared picture that is given twice took its time once; a file that is named twice was read twice.
        distinct = {id(picture): picture for picture in prepared}.values()
        stats.preprocess_ms = sum(picture.milliseconds for picture in distinct)
        stats.image_ms = sum(picture.decode_milliseconds for picture in distinct)
        continued = messages[-1].role == "assistant" and messages[-1].text[-1:].strip() != ""
        stream = TextStream((*options.stop, *self._template.stop_sequences), continued=continued)
        max_tokens = min(options.max_tokens, self.context_size - stats.prompt_tokens)
        answer = Answer(self._require_open(), self._end_tokens, stream, max_tokens, stats, job, options.top_logprobs)
        return Request(split_segments(ids, pictures), answer, options)

    def _check_options(self, options: Options) -> None:
        check_budget(options, self.bundle.manifest)
        if options.grammar:
            Sampler(self._require_open(), options).close()  # raises if llama.cpp cannot parse it

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
                request = self._prepare_request(job, messages, sources, own_options, stats)
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
        result = stats.result(reason, self.bundle.manifest.name, self.device.name, self.load_ms)
        return Chunk(text, stats.pending_tokens, reason, result, tuple(stats.pending_chances))

    def encode_prompt(self, messages: Sequence[prompt.Message]) -> list[int]:
        """Return token ids, computed in the caller's thread: the engine must not be closed meanwhile.

        Raises `UsageError`, or `ContextOverflowError` for what is far too long to be tokenized.
        """
        self._require_open()
        size = sum(len(message.text.encode("utf-8", "replace")) for message in messages)
        if size > self.context_size * 64:  # no vocabulary here has tokens of 64 bytes on average
            raise ContextOverflowError(
                f"The messages have {size} bytes of text, far more than a context of {self.context_size} holds."
            )
        return self._encode(messages)

    def _check_fits(
        self, stats: RequestStats, ids: list[int], rows: list[int], messages: Sequence[prompt.Message]
    ) -> None:
        """Count positions; `rows` is the number for each image. Raises `ContextOverflowError`."""
        stats.image_tokens = sum(rows)
        stats.prompt_tokens = len(ids) - len(rows) + stats.image_tokens
        if stats.prompt_tokens < self.context_size:
            return
        text = "a shorter conversation" if any(turn.role == "assistant" for turn in messages) else "a shorter text"
        remedies = ["fewer images"] if stats.image_tokens > stats.prompt_tokens // 2 else [text]
        if self.context_size < (max_context := self.bundle.manifest.language.context_length):
            remedies.append(f"a larger context (--context, EngineOptions.context; at most {max_context})")
        counted = "1 image" if len(rows) == 1 else f"{len(rows)} images"
        raise ContextOverflowError(
            f"The prompt needs {stats.prompt_tokens} positions ({counted}: {stats.image_tokens}, text: "
            f"{stats.prompt_tokens - stats.image_tokens}) and the answer at least 1, but the context has "
            f"{self.context_size}. Use {' or '.join(remedies)}."
        )

    def _require_open(self) -> LanguageModel:
        if self._language is None or self._language.context is None:
            raise UsageError(CLOSED)
        return self._language


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
    try:
        return PictureCache(user_cache(setting if isinstance(setting, Path) else None))
    except MissingError:  # no home folder
        return PictureCache(None)
