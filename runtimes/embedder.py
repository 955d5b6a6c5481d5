"""Pictures -> embeddings: CLIP, the token budget if there is one, projector, and the order of the crops.

Works in a thread of its own, so that a picture is encoded while the language model loads or reads what comes before
it, and loads CLIP only when a picture is not known.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from llava_edge import anyres, token_budget
from llava_edge.bundle import PROJECTOR, VISION, VISION_DATA, Bundle
from llava_edge.runtimes import CancelledError, devices, native
from llava_edge.runtimes.jobs import Job, Worker
from llava_edge.runtimes.picture_cache import PictureCache, digest, identity
from llava_edge.runtimes.pictures import Budget, Picture
from llava_edge.runtimes.projector import Projector
from llava_edge.runtimes.stats import RequestStats, elapsed_ms
from llava_edge.runtimes.tune import Setting, opened
from llava_edge.runtimes.vision import VisionEncoder

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Embedding:
    """rows: (positions, hidden size) float32, not to be written to. Milliseconds that CLIP and projector took."""

    rows: Array
    encode_ms: float
    project_ms: float


class Embedder:
    """One for an open engine. Faults of vision.onnx and projector.gguf (`BundleError`) come when these are needed."""

    def __init__(self, bundle: Bundle, setting: Setting, provider: str, cache: PictureCache) -> None:
        self._bundle = bundle
        self._setting = setting
        self._provider = provider
        self._cache = cache
        self._library = native.projector_library()
        self._identity = _identity(bundle, setting, provider, self._library)
        self._parts: tuple[VisionEncoder, Projector] | None = None
        self._early: dict[str, Embedding] = {}
        self._thread = Worker("llava-edge vision")

    def begin(self, shown: Sequence[Future[Picture]], cancel: threading.Event) -> Future[None]:
        """Embed in advance those of the pictures that are not known; without any, load what embeds them."""
        return self._thread.submit(self._begin, shown, cancel)

    def start(self, picture: Picture, stats: RequestStats, job: Job) -> Future[Array]:
        """Embed in the background: (positions, hidden size) float32. Raises `CancelledError` or `BundleError`."""
        return self._thread.submit(self._embed, picture, stats, job)

    def key(self, picture_key: str) -> str:
        """What decides about a picture's embeddings."""
        return digest("embeddings", self._identity, picture_key)

    def close(self) -> None:
        """Free the engine. Harmless when repeated."""
        self._thread.shutdown()
        self._parts = None

    def _begin(self, shown: Sequence[Future[Picture]], cancel: threading.Event) -> None:
        if not shown:
            self._opened()
        for picture in map(Future.result, shown):
            if picture.key not in self._early and self._known(picture) is None:
                self._early[picture.key] = self._compute(picture, None, cancel)

    def _embed(self, picture: Picture, stats: RequestStats, job: Job) -> Array:
        start = time.perf_counter()
        rows = self._known(picture)
        if rows is not None:
            stats.encode_ms += elapsed_ms(start)
            return rows
        found = self._early.pop(picture.key, None)
        if found is None:
            job.vision_run = job.vision_run or self._opened()[0].new_run()
            found = self._compute(picture, job.vision_run, job.cancel)
        stats.encoded_pictures += 1
        stats.encode_ms += found.encode_ms + found.project_ms
        stats.project_ms += found.project_ms
        about = {"model": self._bundle.manifest.name, "kind": "embeddings", "positions": str(len(found.rows))}
        self._cache.put(self.key(picture.key), about, found.rows.data.cast("B"))
        return found.rows

    def _known(self, picture: Picture) -> Array | None:
        payload = self._cache.get(self.key(picture.key))
        shape = (len(picture.rows), self._bundle.manifest.language.hidden_size)
        if payload is None or len(payload) != shape[0] * shape[1] * 4:
            return None
        return np.frombuffer(payload, np.float32).reshape(shape)

    def _opened(self) -> tuple[VisionEncoder, Projector]:
        if self._parts is None:
            projector = Projector(self._bundle, self._library, self._setting.threads)
            self._parts = opened(self._bundle, self._setting, self._provider), projector
        return self._parts

    def _compute(self, picture: Picture, vision_run: Any, cancel: threading.Event) -> Embedding:
        """Crops go one by one: five at once take five times the working memory."""
        vision, projector = self._opened()
        start = time.perf_counter()
        if picture.budget is not None:
            features = [_reduced(vision, picture, picture.budget, vision_run, cancel)]
        else:
            features = [vision.encode(crop, vision_run) for crop in _crops(picture, cancel)]
        encoded = elapsed_ms(start)
        start = time.perf_counter()
        embeddings = np.stack([projector.project(item) for item in features])
        rows = embeddings[0] if picture.budget else anyres.arrange(embeddings, projector.newline, picture.rows)
        return Embedding(np.ascontiguousarray(rows), encoded, elapsed_ms(start))


def _reduced(
    vision: VisionEncoder, picture: Picture, budget: Budget, vision_run: Any, cancel: threading.Event
) -> Array:
    """(positions, vision width) float32."""
    encoded = [vision.encode_attended(crop, vision_run) for crop in _crops(picture, cancel)]
    features, attention = (np.concatenate(outputs)[budget.rows] for outputs in zip(*encoded, strict=True))
    return token_budget.reduce_features(features, attention, len(picture.rows), budget.method, budget.seed)


def _crops(picture: Picture, cancel: threading.Event) -> Iterator[Array]:
    """The crops, until the job is cancelled: `CancelledError`."""
    for crop in picture.crops:
        if cancel.is_set():  # asked after the handle of the run can be seen, so that no stop is lost
            raise CancelledError
        yield crop


def _identity(bundle: Bundle, setting: Setting, provider: str, library: Path | None) -> list[object]:
    """What embeddings depend on besides the picture. ONNX Runtime is not loaded for it, which takes a while."""
    manifest = bundle.manifest
    files = [name for name in (VISION, VISION_DATA, PROJECTOR) if name in manifest.files]
    spec = find_spec("onnxruntime")
    libraries = sorted(Path(spec.origin).parent.glob("capi/*.so*")) if spec and spec.origin else []
    engine = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in libraries]
    parts = [asdict(manifest.preprocessing), asdict(manifest.vision), asdict(manifest.projector)]
    operator = str(native.operator_library()) if setting.native else ""  # its folder is named by all it depends on
    settings = [setting.threads, setting.prepack, operator, str(library), provider]
    if provider != "CPUExecutionProvider":
        settings += ["float32", devices.nvidia_gpus()]
    return [identity(bundle, *files), parts, engine, devices.processor(), *settings]
