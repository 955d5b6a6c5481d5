"""Pictures -> embeddings: CLIP, the token budget if there is one, the projector, and the order of the crops.

Works in its own thread, so that a picture is encoded while the language model loads or evaluates the text before it.
Loads CLIP only when a picture's embeddings are not cached.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from llava_edge import anyres, token_budget
from llava_edge.bundle import PROJECTOR, VISION, VISION_DATA, Bundle
from llava_edge.runtimes import CancelledError, machine, native
from llava_edge.runtimes.jobs import Job
from llava_edge.runtimes.picture_cache import PictureCache, digest, file_identity
from llava_edge.runtimes.pictures import Budget, Picture
from llava_edge.runtimes.projector import Projector
from llava_edge.runtimes.stats import RequestStats, elapsed_ms
from llava_edge.runtimes.tune import Setting, open_encoder
from llava_edge.runtimes.vision import VisionEncoder
from llava_edge.runtimes.worker import Worker

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Embedding:
    """rows: (positions, hidden size) float32, read-only. encode_ms, project_ms: time in CLIP and the projector."""

    rows: Array
    encode_ms: float
    project_ms: float


class Embedder:
    """Embeds the pictures of an open engine. `BundleError` for vision.onnx or projector.gguf is raised at first use."""

    def __init__(self, bundle: Bundle, setting: Setting, provider: str, cache: PictureCache) -> None:
        self._bundle = bundle
        self._setting = setting
        self._provider = provider
        self._cache = cache
        self._library = native.projector_library()
        self._identity = _identity(bundle, setting, provider, self._library)
        self._models: tuple[VisionEncoder, Projector] | None = None
        self._precomputed: dict[str, Embedding] = {}  # picture key -> embedding
        self._thread = Worker("llava-edge vision")

    def precompute(self, pictures: Sequence[Future[Picture]], cancel: threading.Event) -> Future[None]:
        """Embed pictures that are not cached, in the background; without any pictures, load CLIP and the projector."""
        return self._thread.submit(self._precompute, pictures, cancel)

    def submit(self, picture: Picture, stats: RequestStats, job: Job) -> Future[Array]:
        """Embed in the background: (positions, hidden size) float32. Raises `CancelledError` or `BundleError`."""
        return self._thread.submit(self._embed, picture, stats, job)

    def cache_key(self, picture_key: str) -> str:
        """Hash everything that a picture's embeddings depend on."""
        return digest("embeddings", self._identity, picture_key)

    def close(self) -> None:
        """Free the models. Harmless when repeated."""
        self._thread.shutdown()
        self._models = None

    def _precompute(self, pictures: Sequence[Future[Picture]], cancel: threading.Event) -> None:
        if not pictures:
            self._load_models()
        for picture in map(Future.result, pictures):
            if picture.key not in self._precomputed and self._cached(picture) is None:
                self._precomputed[picture.key] = self._compute(picture, None, cancel)

    def _embed(self, picture: Picture, stats: RequestStats, job: Job) -> Array:
        start = time.perf_counter()
        rows = self._cached(picture)
        if rows is not None:
            stats.encode_ms += elapsed_ms(start)
            return rows
        embedding = self._precomputed.pop(picture.key, None)
        if embedding is None:
            run_options = self._load_models()[0].new_run_options()
            job.abort = partial(setattr, run_options, "terminate", True)
            embedding = self._compute(picture, run_options, job.cancel)
        stats.encoded_pictures += 1
        stats.encode_ms += embedding.encode_ms + embedding.project_ms
        stats.project_ms += embedding.project_ms
        about = {"model": self._bundle.manifest.name, "kind": "embeddings", "positions": str(len(embedding.rows))}
        self._cache.put(self.cache_key(picture.key), about, embedding.rows.data.cast("B"))
        return embedding.rows

    def _cached(self, picture: Picture) -> Array | None:
        payload = self._cache.get(self.cache_key(picture.key))
        shape = (len(picture.rows), self._bundle.manifest.language.hidden_size)
        if payload is None or len(payload) != shape[0] * shape[1] * 4:
            return None
        return np.frombuffer(payload, np.float32).reshape(shape)

    def _load_models(self) -> tuple[VisionEncoder, Projector]:
        """Return CLIP and the projector; load them first if necessary."""
        if self._models is None:
            projector = Projector(self._bundle, self._library, self._setting.threads)
            self._models = open_encoder(self._bundle, self._setting, self._provider), projector
        return self._models

    def _compute(self, picture: Picture, run_options: Any, cancel: threading.Event) -> Embedding:
        """Encode and project a picture. Crops go one by one: five at once take five times the working memory."""
        vision, projector = self._load_models()
        start = time.perf_counter()
        if picture.budget is not None:
            features = [_encode_reduced(vision, picture, picture.budget, run_options, cancel)]
        else:
            features = [vision.encode(crop, run_options) for crop in _crops(picture, cancel)]
        encode_ms = elapsed_ms(start)
        start = time.perf_counter()
        embeddings = np.stack([projector.project(item) for item in features])
        rows = embeddings[0] if picture.budget else anyres.arrange(embeddings, projector.newline, picture.rows)
        return Embedding(np.ascontiguousarray(rows), encode_ms, elapsed_ms(start))


def _encode_reduced(
    vision: VisionEncoder, picture: Picture, budget: Budget, run_options: Any, cancel: threading.Event
) -> Array:
    """Encode a picture and reduce its features to the budget: (positions, vision width) float32."""
    encoded = [vision.encode_with_attention(crop, run_options) for crop in _crops(picture, cancel)]
    features, attention = (np.concatenate(outputs)[budget.rows] for outputs in zip(*encoded, strict=True))
    return token_budget.reduce_features(features, attention, len(picture.rows), budget.method, budget.seed)


def _crops(picture: Picture, cancel: threading.Event) -> Iterator[Array]:
    """Yield the crops until the job is cancelled. Raises `CancelledError`."""
    for crop in picture.crops:
        if cancel.is_set():  # checked after `job.abort` is set, so that `Job.stop` is never missed
            raise CancelledError
        yield crop


def _identity(bundle: Bundle, setting: Setting, provider: str, library: Path | None) -> list[object]:
    """What embeddings depend on besides the picture, found without loading ONNX Runtime, which is slow."""
    manifest = bundle.manifest
    files = [name for name in (VISION, VISION_DATA, PROJECTOR) if name in manifest.files]
    spec = find_spec("onnxruntime")
    libraries = sorted(Path(spec.origin).parent.glob("capi/*.so*")) if spec and spec.origin else []
    engine = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in libraries]
    parts = [asdict(manifest.preprocessing), asdict(manifest.vision), asdict(manifest.projector)]
    operator = str(native.operator_library()) if setting.native else ""  # in a folder named by all it depends on
    settings = [setting.threads, setting.prepack, operator, str(library), provider]
    if provider != "CPUExecutionProvider":
        settings += ["float32", machine.nvidia_gpus()]
    return [file_identity(bundle, *files), parts, engine, machine.processor(), *settings]
