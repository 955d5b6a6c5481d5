"""Loads a bundle into both engines: chooses device, preset and CLIP's setting, and embeds pictures meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from llava_edge import gguf
from llava_edge.bundle import LANGUAGE, VISION, VISION_DATA, Bundle
from llava_edge.errors import BundleError
from llava_edge.options import EngineOptions
from llava_edge.runtimes import devices, machine, presets, probe, tune
from llava_edge.runtimes.draft import DraftModel, check_draft
from llava_edge.runtimes.embedder import Embedder
from llava_edge.runtimes.jobs import Job
from llava_edge.runtimes.language import BATCH, LanguageModel
from llava_edge.runtimes.picture_cache import PictureCache
from llava_edge.runtimes.pictures import Picture
from llava_edge.runtimes.prefill import Prefill
from llava_edge.runtimes.scheduler import Scheduler
from llava_edge.runtimes.speculation import Speculation
from llava_edge.runtimes.stats import elapsed_ms

MAX_BATCH = 1024  # positions; working memory grows with it: 13 MB for 64 positions of a 7B


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """The parts of a loaded bundle."""

    device: devices.DeviceChoice
    preset: presets.Preset
    language: LanguageModel
    embedder: Embedder
    prefill: Prefill
    scheduler: Scheduler
    load_ms: float


class Loader:
    """Loads one bundle. parts: gets a callback for each part that has to be closed, also of an incomplete model.

    Raises `UnavailableError`, `UsageError`, `BundleError` or `MemoryLimitError`, here and in `load`.
    """

    def __init__(self, bundle: Bundle, options: EngineOptions, cache: PictureCache, parts: ExitStack) -> None:
        self._start = time.perf_counter()
        self._bundle = bundle
        self._options = options
        self._cache = cache
        self._parts = parts
        probe.require_working_build()
        self._device = devices.choose(options.device)
        self._batch = min(max(BATCH, bundle.manifest.vision.image_tokens), MAX_BATCH)
        self._header = gguf.read(bundle.part(LANGUAGE))
        gguf.check_language(self._header)
        self._preset = self._choose_preset()
        self._threads = options.threads or machine.thread_count()[0]

    def load(self, job: Job, pictures: Sequence[Future[Picture]], on_load: Callable[[float], None]) -> LoadedModel:
        """Load all parts, and embed pictures as they are prepared; see `Engine.open`. Cancelling the job stops it."""
        embedder = Embedder(self._bundle, self.vision_setting(), self._device.provider, self._cache)
        self._parts.callback(embedder.close)
        self._parts.callback(job.cancel.set)  # embedding may take longer than loading
        embedding = embedder.precompute(pictures, job.cancel)

        def progress(fraction: float) -> bool:
            on_load(fraction)
            return not job.cancel.is_set()

        language = self._load_language(progress)
        draft = self._load_draft(language) if self._options.draft else None
        prefill = Prefill(self._bundle, language, embedder, self._cache)
        self._parts.callback(prefill.save_states)
        scheduler = Scheduler(language, prefill, Speculation(language, draft))
        if not pictures:
            embedding.result()
        load_ms = elapsed_ms(self._start)
        return LoadedModel(self._device, self._preset, language, embedder, prefill, scheduler, load_ms)

    def vision_setting(self) -> tune.Setting:
        """Return the measured setting for this machine, or the default one; a requested number of threads is kept."""
        if self._device.name != "cpu":
            return tune.Setting(self._threads, False)
        measured = tune.choose(tune.load(self._bundle), self._preset.copies)
        if measured is None:
            return tune.default_setting(self._bundle, self._threads)
        return replace(measured, threads=self._options.threads or measured.threads)

    def _choose_preset(self) -> presets.Preset:
        manifest = self._bundle.manifest
        presets.check_context(self._options.context, manifest.language.context_length)
        if self._options.draft:
            check_draft(Path(self._options.draft), self._header)
        logits_bytes = self._batch * manifest.language.vocab_size * 4
        return presets.choose(
            self._options,
            self._header,
            manifest.language.context_length,
            tiles=manifest.preprocessing.square == "anyres",
            gpu_layers=self._device.gpu_layers,
            vision_copy_bytes=self._prepacked_vision_bytes(),
            mapped_bytes=manifest.size + logits_bytes,
        )

    def _prepacked_vision_bytes(self) -> int:
        """Bytes of CLIP's weights if its fastest setting here keeps a rearranged copy of them, else 0."""
        measured = tune.choose(tune.load(self._bundle), copies=True) if self._device.name == "cpu" else None
        if measured is None or not measured.prepack:
            return 0
        files = self._bundle.manifest.files
        return sum(files[name].size for name in (VISION, VISION_DATA) if name in files)

    def _load_language(self, progress: Callable[[float], bool]) -> LanguageModel:
        path, expected = self._bundle.part(LANGUAGE), self._bundle.manifest.language
        language = LanguageModel(
            path,
            header=self._header,
            adapter=self._bundle.adapter,
            context=self._preset.context,
            threads=self._threads,
            batch=self._batch,
            gpu_layers=self._device.gpu_layers,
            repack=self._preset.repack,
            kv=self._preset.kv,
            verbose=self._options.verbose,
            on_load=progress,
        )
        self._parts.callback(language.close)
        actual, declared = (language.hidden_size, language.vocabulary.size), (expected.hidden_size, expected.vocab_size)
        if actual != declared:
            raise BundleError(
                f"{path} has hidden size and vocabulary size {actual}, but the manifest says {declared}: it is from "
                "another bundle."
            )
        return language

    def _load_draft(self, language: LanguageModel) -> DraftModel:
        path, verbose = Path(str(self._options.draft)), self._options.verbose
        draft = DraftModel(path, language, self._threads, repack=self._preset.repack, verbose=verbose)
        self._parts.callback(draft.close)
        return draft
