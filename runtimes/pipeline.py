"""A bundle, opened: images and messages in, one stream of chunks out.

All engine work happens in one owner thread; callers queue up and read their own stream, so the main thread stays
free for Ctrl-C. Knows nothing about command lines, files of images (image.py does) or HTTP.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llava_edge import gguf, prompt
from llava_edge.bundle import LANGUAGE, VISION, VISION_DATA, Bundle
from llava_edge.cache import user_cache
from llava_edge.errors import BundleError, ContextOverflowError, MissingError, UsageError
from llava_edge.image import ImageInput
from llava_edge.options import Chunk, EngineOptions, FinishReason, Options
from llava_edge.runtimes import CancelledError, devices, presets, probe, tune
from llava_edge.runtimes.decoding import Answer, decode, decode_many
from llava_edge.runtimes.draft import DraftModel, check_draft
from llava_edge.runtimes.embedder import Embedder
from llava_edge.runtimes.jobs import CLOSED, EngineThread, Job, Stream
from llava_edge.runtimes.language import BATCH, LanguageModel
from llava_edge.runtimes.picture_cache import PictureCache
from llava_edge.runtimes.pictures import RECENT_BYTES, Picture, Recent, check_budget, limited, taken
from llava_edge.runtimes.prefill import Prefill, Segment, segments
from llava_edge.runtimes.sampling import Sampler
from llava_edge.runtimes.speculation import Speculation
from llava_edge.runtimes.stats import RequestStats, elapsed_ms
from llava_edge.runtimes.text import TextStream
from llava_edge.runtimes.tokenization import prompt_encoder
from llava_edge.templates import get_template

MAX_BATCH = 1024  # a batch's working memory grows with it: 13 MB for 64 positions of a 7B


class Engine:
    """Open it with `Engine.open`; it is safe to call from several threads, which are served in turn.

    Closed by `close`, when Python ends, and when nothing refers to it any more: its thread refers to its parts alone.
    """

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        self.bundle = bundle
        self.options = options
        self.choice = devices.choose("cpu")
        self.preset = presets.Chosen("memory", "nothing is loaded")
        self.load_ms = 0.0
        self.context_size = 0
        self._embedder: Embedder | None = None
        self._language: LanguageModel | None = None
        self._prefill: Prefill | None = None
        self._cache = _open_cache(options.cache)
        self._recent = Recent(bundle.manifest, RECENT_BYTES if options.cache else 0)
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
        """Load all parts. `on_load` gets the loaded fraction, in a thread of the engine; what it raises stops loading.

        pictures: each prepares one that will be asked about first. They are called by this thread, and the pictures
            embedded, while the language model loads; if all are known, CLIP is not loaded before it is needed.
        Raises `BundleError`, `UnavailableError`, `MemoryLimitError`, `UsageError`, and what `pictures` raises.
        """
        if options is not None and not isinstance(options, EngineOptions):
            raise UsageError(f"EngineOptions were expected, not {options!r:.60}.")
        engine = Engine(bundle, options or EngineOptions())
        shown: list[Future[Picture]] = [Future() for _ in pictures]
        try:
            loading = engine._thread.start(lambda job: engine._load(job.cancel, shown, on_load))
            for future, read in zip(shown, pictures, strict=True):
                future.set_result(read())
            for _ in loading:
                pass
        except BaseException as error:
            for future in shown:
                future.cancel()  # without effect if it has a result; else nobody may wait for one
            # Ctrl-C does not wait until loading stops. Else Python must not end while another thread frees engines:
            # that would abort the process.
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
        """Answer the last message, or go on with it if it is an answer. Images belong to the messages' slots in order.

        The stream ends with a chunk that carries the `Result`. Setting `cancel`, which is only read, or closing the
        iterator stops the work within one prefill chunk, or at once if it has not begun. `started` (time.monotonic) is
        what time to first token counts from.
        `reuse` also keeps what the last prompt and its answer have in common with this one: faster, but rounded
        differently in the last digits, see `Prefill.run`.
        Pictures in memory are read now, by the caller's thread; files when their turn has come.
        Raises `ImageError`, `MissingError`, `UsageError`, `ContextOverflowError` before any model runs; `BundleError`.
        """
        check_request([messages], options, cancel)
        wanted = _seeded(options)
        stats = RequestStats(time.monotonic() if started is None else started, wanted.seed)
        event = cancel or threading.Event()
        asked, sources = tuple(messages), taken(images, self.bundle.manifest)

        def work(job: Job) -> None:
            self._answer_one(*self._ready(job, asked, sources, wanted, stats), wanted, reuse)

        return self._thread.submit(work, event, lambda: self._last_chunk("", "cancelled", stats))

    def generate_together(
        self,
        conversations: Sequence[Sequence[prompt.Message]],
        pictures: Sequence[Picture],
        options: Options | None = None,
        cancel: threading.Event | None = None,
        *,
        started: float | None = None,
    ) -> list[Stream]:
        """Answer several conversations about the same pictures, as `generate` does; a stream for each.

        What they begin with is read once. Then one token of each answer is computed in a pass, for as many as the
        context has room for; `branches` says when their bits are those of answers alone. Leaving a stream early stops
        all.
        """
        check_request(conversations, options, cancel)
        if not conversations:
            return []
        start = time.monotonic() if started is None else started
        wanted = [_seeded(options) for _ in conversations]

        def work(jobs: list[Job]) -> None:
            ready = [
                self._ready(job, messages, pictures, its, RequestStats(start, its.seed))
                for job, messages, its in zip(jobs, conversations, wanted, strict=True)
            ]
            self._answer_all(ready, wanted)

        def dropped() -> Chunk:
            return self._last_chunk("", "cancelled", RequestStats(start, wanted[0].seed))

        return self._thread.submit_many(work, cancel or threading.Event(), len(conversations), dropped)

    def require_room(
        self, conversations: Sequence[Sequence[prompt.Message]], pictures: Sequence[Picture], options: Options | None
    ) -> None:
        """Raise `ContextOverflowError` with the number, if there are several, of the first one without room.

        Raises `UsageError` for conversations that are none, or have other images.
        """

        def check(job: Job) -> None:
            shown = [limited(picture, options or Options(), self.bundle.manifest) for picture in pictures]
            rows = [len(picture.rows) for picture in shown]
            for number, messages in enumerate(conversations, 1):
                check_slots(messages, pictures)
                try:
                    self._check_room(RequestStats(0), self.encode_prompt(messages), rows, messages)
                except ContextOverflowError as error:
                    which = f"Question {number}: " if len(conversations) > 1 else ""
                    raise ContextOverflowError(f"{which}{error}") from error

        self._thread.run(check)

    def prepare(self, image: ImageInput | Picture) -> Picture:
        """Decode and preprocess an image, unless it was done lately. Raises `ImageError` or `MissingError`."""
        return self._recent.prepare(image)

    def prepare_all(self, images: Sequence[ImageInput | Picture]) -> list[Picture]:
        """Several, side by side. Raises the first one's error."""
        return self._recent.prepare_all(images)

    def embed(self, image: ImageInput | Picture) -> np.ndarray[Any, Any]:
        """What the language model is shown of a picture: (positions, hidden size) float32.

        Raises `ImageError`, `MissingError` or `BundleError`.
        """
        picture = self.prepare(image)
        found = []

        def work(job: Job) -> None:
            assert self._embedder is not None
            found.append(self._embedder.start(picture, RequestStats(0), job).result().copy())

        self._thread.run(work)
        return found[0]

    def close(self) -> None:
        """Cancel the request in work, refuse those that wait, keep what is to be kept, and free the engines.

        Harmless when repeated.
        """
        self._thread.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _load(
        self, cancel: threading.Event, shown: Sequence[Future[Picture]], on_load: Callable[[float], None]
    ) -> None:
        start = time.perf_counter()
        probe.require_working_build()
        manifest = self.bundle.manifest
        self.choice = devices.choose(self.options.device)
        batch = min(max(BATCH, manifest.vision.image_tokens), MAX_BATCH)
        self.preset = self._chosen_preset(batch)
        self.context_size = self.preset.context
        threads = self.options.threads or devices.thread_count()[0]
        self._embedder = Embedder(self.bundle, self._vision(threads), self.choice.provider, self._cache)
        self._parts.callback(self._embedder.close)
        self._parts.callback(cancel.set)  # what is embedded in advance may take longer than loading
        embedding = self._embedder.begin(shown, cancel)

        def progress(fraction: float) -> bool:
            on_load(fraction)
            return not cancel.is_set()

        language = self._load_language(threads, batch, progress)
        draft = None
        if self.options.draft:
            path, verbose = Path(self.options.draft), self.options.verbose
            draft = DraftModel(path, language, threads, repack=self.preset.repack, verbose=verbose)
            self._parts.callback(draft.close)
        self._speculation = Speculation(language, draft)
        self._prefill = Prefill(self.bundle, language, self._embedder, self._cache)
        self._parts.callback(self._prefill.keep)
        self._thread.on_idle = self._prefill.keep
        self._template = get_template(manifest.template)
        self._ends = {language.control_id(name) for name in self._template.stop_tokens}
        self._encode = prompt_encoder(language, manifest, unclosed=True)
        if not shown:
            embedding.result()
        self.load_ms = elapsed_ms(start)

    def _chosen_preset(self, batch: int) -> presets.Chosen:
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
            gpu_layers=self.choice.gpu_layers,
            tower=self._copied_tower(),
            mapped=sum(file.size for file in manifest.files.values()) + batch * manifest.language.vocab_size * 4,
        )

    def _load_language(self, threads: int, batch: int, progress: Callable[[float], bool]) -> LanguageModel:
        path, expected = self.bundle.part(LANGUAGE), self.bundle.manifest.language
        self._language = language = LanguageModel(
            path,
            adapter=self.bundle.adapter,
            context=self.context_size,
            threads=threads,
            batch=batch,
            gpu_layers=self.choice.gpu_layers,
            repack=self.preset.repack,
            kv=self.preset.kv,
            verbose=self.options.verbose,
            on_load=progress,
        )
        self._parts.callback(language.close)
        found, wanted = (language.hidden_size, language.vocab_size), (expected.hidden_size, expected.vocab_size)
        if found != wanted:
            raise BundleError(
                f"{path} has hidden size and vocabulary {found}, the manifest says {wanted}: it is from another bundle."
            )
        return language

    def _copied_tower(self) -> int:
        """Bytes of CLIP's weights, if its fastest setting here holds them a second time."""
        measured = tune.choose(tune.known(self.bundle), copies=True) if self.choice.name == "cpu" else None
        if measured is None or not measured.prepack:
            return 0
        files = self.bundle.manifest.files
        return sum(files[name].size for name in (VISION, VISION_DATA) if name in files)

    def _vision(self, threads: int) -> tune.Setting:
        """The measured setting for this machine, or the plain one; threads that were asked for stay."""
        if self.choice.name != "cpu":
            return tune.Setting(threads, False)
        measured = tune.choose(tune.known(self.bundle), self.preset.copies)
        if measured is None:
            return tune.untuned(self.bundle, threads)
        return replace(measured, threads=self.options.threads or measured.threads)

    def _ready(
        self,
        job: Job,
        messages: Sequence[prompt.Message],
        images: Sequence[ImageInput | Picture],
        options: Options,
        stats: RequestStats,
    ) -> tuple[list[Segment], Answer]:
        """Everything that can be refused is, before any model runs."""
        check_slots(messages, images)
        ids = self.encode_prompt(messages)
        manifest = self.bundle.manifest
        check_budget(options, manifest)
        if manifest.preprocessing.square != "anyres":  # then the positions are known before a file is opened
            self._check_room(stats, ids, [options.image_tokens or manifest.vision.image_tokens] * len(images), messages)
        prepared = self.prepare_all(images)
        pictures = [limited(picture, options, manifest) for picture in prepared]
        self._check_room(stats, ids, [len(picture.rows) for picture in pictures], messages)
        # A picture prepared before and shown twice took its time once; a file that is named twice is read twice.
        once = {id(picture): picture for picture in prepared}.values()
        stats.preprocess_ms = sum(picture.milliseconds for picture in once)
        stats.image_ms = sum(picture.decode_milliseconds for picture in once)
        within = messages[-1].role == "assistant" and messages[-1].text[-1:].strip() != ""
        stream = TextStream((*options.stop, *self._template.stop_sequences), within=within)
        limit = min(options.max_tokens, self.context_size - stats.prompt_tokens)
        language = self._opened()
        if options.grammar:
            Sampler(language, options).close()  # refuses what llama.cpp does not understand
        return segments(ids, pictures), Answer(language, self._ends, stream, limit, stats, job, options.top_logprobs)

    def _answer_one(self, parts: list[Segment], answer: Answer, options: Options, reuse: bool = False) -> None:
        assert self._prefill is not None
        try:
            self._prefill.run(parts, answer.stats, answer.job, reuse=reuse)
            reason = decode(answer, options, self._speculation)
        except CancelledError:
            reason = "cancelled"
        self._finish(answer, reason)

    def _answer_all(self, ready: Sequence[tuple[list[Segment], Answer]], options: Sequence[Options]) -> None:
        """options: of each; only their seeds differ."""
        while ready:
            count = _fitting(ready)
            if count == 1:
                self._answer_one(*ready[0], options[0])
            else:
                self._answer_group(ready[:count], options[:count])
            ready, options = ready[count:], options[count:]

    def _answer_group(self, ready: Sequence[tuple[list[Segment], Answer]], options: Sequence[Options]) -> None:
        """Prompts that differ in their last segment, which is text."""
        answers = [answer for _, answer in ready]
        tails = [[key for key in parts[-1].keys if isinstance(key, int)] for parts, _ in ready]
        parts, first = ready[0]
        waiting = list(answers)

        def done(answer: Answer, reason: FinishReason) -> None:
            waiting.remove(answer)
            self._finish(answer, reason)

        assert self._prefill is not None
        try:
            self._prefill.run(parts, first.stats, first.job, count=len(parts) - 1)
            for answer in answers[1:]:
                answer.stats.kv_cache_hit = True
            decode_many(answers, tails, options, done)
        except CancelledError:
            for answer in list(waiting):
                done(answer, "cancelled")

    def _finish(self, answer: Answer, reason: FinishReason) -> None:
        """The last chunk, and the end of the stream."""
        stream, stats = answer.stream, answer.stats
        tail = stream.end(cut=reason != "stop")
        if stream.stopped and reason == "length":
            reason = "stop"
        stats.text += tail
        answer.job.output.put(self._last_chunk(tail, reason, stats))
        answer.job.output.put(None)

    def _last_chunk(self, text: str, reason: FinishReason, stats: RequestStats) -> Chunk:
        result = stats.result(reason, self.bundle.manifest.name, self.choice.name, self.load_ms)
        return Chunk(text, stats.pending_tokens, reason, result, tuple(stats.pending_chances))

    def encode_prompt(self, messages: Sequence[prompt.Message]) -> list[int]:
        """Token ids, computed in the caller's thread: not while another one closes the engine.

        Raises `UsageError`, or `ContextOverflowError` for what is far too long to be tokenized.
        """
        self._opened()
        size = sum(len(message.text.encode("utf-8", "replace")) for message in messages)
        if size > self.context_size * 64:  # no vocabulary here has tokens of 64 bytes on average
            raise ContextOverflowError(
                f"The messages have {size} bytes of text, far more than a context of {self.context_size} holds."
            )
        return self._encode(messages)

    def _check_room(
        self, stats: RequestStats, ids: list[int], rows: list[int], messages: Sequence[prompt.Message]
    ) -> None:
        """Count positions; `rows` are those of each image. Raises `ContextOverflowError`."""
        stats.image_tokens = sum(rows)
        stats.prompt_tokens = len(ids) - len(rows) + stats.image_tokens
        if stats.prompt_tokens < self.context_size:
            return
        text = "a shorter conversation" if any(turn.role == "assistant" for turn in messages) else "a shorter text"
        remedies = ["fewer images"] if stats.image_tokens > stats.prompt_tokens // 2 else [text]
        if self.context_size < (trained := self.bundle.manifest.language.context_length):
            remedies.append(f"a larger context (--context, EngineOptions.context; at most {trained})")
        counted = "1 image" if len(rows) == 1 else f"{len(rows)} images"
        raise ContextOverflowError(
            f"The prompt needs {stats.prompt_tokens} positions ({counted}: {stats.image_tokens}, text: "
            f"{stats.prompt_tokens - stats.image_tokens}) and the answer at least 1, but the context has "
            f"{self.context_size}. Use {' or '.join(remedies)}."
        )

    def _opened(self) -> LanguageModel:
        if self._language is None or self._language.context is None:
            raise UsageError(CLOSED)
        return self._language


def check_request(
    conversations: Sequence[Sequence[prompt.Message]],
    options: Options | None = None,
    cancel: threading.Event | None = None,
) -> None:
    """Raises `UsageError` for what is of another type, which would fail somewhere within, as a bug of ours.

    And for a question without a text and a picture, for which a model would make something up.
    """
    for value, kind in ((options, Options), (cancel, threading.Event)):
        if value is not None and not isinstance(value, kind):
            raise UsageError(f"An object of {kind.__name__} was expected, not {value!r:.60}.")
    for messages in conversations:
        if isinstance(messages, str) or not isinstance(messages, Sequence):
            raise UsageError(f"A list of Message was expected, not {messages!r:.60}.")
        for message in messages:
            if not isinstance(message, prompt.Message):
                raise UsageError(f"A Message was expected, not {message!r:.60}.")
            if not isinstance(message.text, str):
                raise UsageError(f"A text was expected for a message, not {message.text!r:.60}.")
            if not isinstance(message.images, int) or message.images < 0:
                raise UsageError(f"A number of images was expected for a message, not {message.images!r:.60}.")
        if messages and messages[-1].role == "user" and not (messages[-1].text.strip() or messages[-1].images):
            raise UsageError("The question is empty; a text, a picture or both were expected.")


def _fitting(ready: Sequence[tuple[list[Segment], Answer]]) -> int:
    """How many of the prompts, from the first on, can be answered in the same passes: 1 or more."""
    shared, language = ready[0][0][:-1], ready[0][1].language
    used, count = sum(len(part.keys) for part in shared), 0
    for parts, answer in ready[: language.max_branches]:
        used += len(parts[-1].keys) + answer.max_tokens
        if not shared or parts[-1].picture is not None or parts[:-1] != shared or used > language.context_size:
            break
        count += 1
    return max(count, 1)


def _seeded(options: Options | None) -> Options:
    """With a seed if, and only if, something will be drawn."""
    wanted = options or Options()
    if wanted.greedy:
        return replace(wanted, seed=None)
    return wanted if wanted.seed is not None else replace(wanted, seed=int.from_bytes(os.urandom(4)))


def check_slots(messages: Sequence[prompt.Message], images: Sequence[object]) -> None:
    """Raises `UsageError` if pictures do not fill the messages' slots."""
    slots = sum(message.images for message in messages)
    if slots != len(images):
        raise UsageError(f"The messages have room for {slots} images, {len(images)} were given.")


def _open_cache(wanted: bool | Path | Literal["memory"]) -> PictureCache:
    if not wanted:
        return PictureCache(None, recent=0)
    if wanted == "memory":
        return PictureCache(None)
    try:
        return PictureCache(user_cache(wanted if isinstance(wanted, Path) else None))
    except MissingError:  # there is no home to keep it in
        return PictureCache(None)
