"""Any picture -> the crops that CLIP encodes and the layout of their embeddings, according to a bundle's manifest.

The number of positions is known before a picture is encoded, with a token budget too.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from llava_edge import anyres
from llava_edge.bundle import Manifest
from llava_edge.errors import ImageError, OptionError
from llava_edge.image import MAX_PIXELS, PILLOW_LOCK, ImageInput, load_image, pixel_count, read_image
from llava_edge.options import Options, TokenMethod
from llava_edge.runtimes import machine
from llava_edge.runtimes.stats import elapsed_ms

Array = np.ndarray[Any, Any]

RECENT_BYTES = 1 << 25  # 24 pictures of 336 x 336
MAX_PARALLEL = 4  # pictures decoded at a time: a phone's photo takes 50 MB meanwhile
LARGE = 1 << 24  # pixels of a picture, for which it is checked whether there is memory


@dataclass(frozen=True, eq=False)
class Budget:
    """How a picture's features are reduced to fewer positions, see `token_budget.reduce_features`.

    rows: (candidates,) indices into all crops' features (crops * tokens, width), in the picture's order.
    """

    rows: Array
    method: TokenMethod
    seed: int


@dataclass(frozen=True, eq=False)
class Picture:
    """An image ready for the vision encoder.

    crops: (crops, 3, S, S) float32; one, or with "anyres" the whole picture and its tiles.
    rows: (positions,) indices into the crops' embeddings, in the order of the language model's positions, see
        `anyres.layout`; with a budget, into those that it leaves: 0, 1, 2, ...
    key: a hash of everything that the embeddings depend on.
    preprocess_ms: time to prepare it; image_ms: of these, until the picture was RGB.
    """

    crops: Array
    rows: Array
    key: str
    preprocess_ms: float
    image_ms: float = 0.0
    budget: Budget | None = None


def prepare(source: ImageInput | Picture, manifest: Manifest, name: str = "") -> Picture:
    """Decode and preprocess an image; `name` is as in `load_image`. Raises `ImageError` or `MissingError`."""
    if isinstance(source, Picture):
        return source
    start = time.perf_counter()
    if isinstance(source, str | os.PathLike):
        source, name = read_image(source)
    if isinstance(source, bytes):
        _check_memory(pixel_count(source), name)
    image = load_image(source, name)
    decoded = time.perf_counter()
    crops = anyres.crops(image, manifest.preprocessing)
    # Pictures of one colour can have the same crops but different sizes, and so different amounts of padding.
    rows = anyres.layout(image.size, manifest.preprocessing, manifest.vision.image_tokens)
    key = hashlib.sha256(crops.tobytes() + rows.tobytes()).hexdigest()
    return Picture(crops, rows, key, elapsed_ms(start), (decoded - start) * 1000)


def _check_memory(pixels: int, name: str) -> None:
    """Raise `ImageError` where Linux would end this process for what Pillow takes: 4 bytes for each pixel."""
    if pixels <= LARGE:
        return
    free = machine.available_memory()
    if free is not None and 4 * pixels > free:
        raise ImageError(
            f"{name or 'The picture'} has {pixels:,} pixels and takes {4 * pixels >> 20} MiB of memory, "
            f"but {free >> 20} MiB are available; make it smaller first."
        )


class RecentPictures:
    """Prepares pictures and keeps the most recently used ones that come from files or bytes. Thread-safe.

    They are found by a hash of the file's bytes, which takes 1 ms where decoding a phone's photo takes 120.
    """

    def __init__(self, manifest: Manifest, max_bytes: int) -> None:
        """max_bytes: of the pixels that are kept."""
        self._manifest = manifest
        self._max_bytes = max_bytes
        self._pictures: dict[bytes, Picture] = {}  # least recently used first
        self._lock = threading.Lock()

    def prepare(self, source: ImageInput | Picture, name: str = "") -> Picture:
        """Like the function `prepare`."""
        start = time.perf_counter()
        data, name = read_image(source) if isinstance(source, str | os.PathLike) else (source, name)
        if not isinstance(data, bytes):
            return prepare(data, self._manifest, name)
        key = hashlib.sha256(data).digest()
        with self._lock:
            recent = self._pictures.pop(key, None)
        read_ms = elapsed_ms(start)
        picture = recent or prepare(data, self._manifest, name)
        self._add(key, picture)
        total_ms, image_ms = (0.0, 0.0) if recent else (picture.preprocess_ms, picture.image_ms)
        return replace(picture, preprocess_ms=read_ms + total_ms, image_ms=read_ms + image_ms)

    def prepare_all(self, sources: Sequence[ImageInput | Picture]) -> list[Picture]:
        """Prepare several in parallel; their times are scaled to add up to the elapsed time. Raises the first error."""
        names = _error_names(len(sources))
        count = sum(not isinstance(source, Picture) for source in sources)
        count = min(count, len(machine.allowed_cpus()), MAX_PARALLEL)
        if count < 2:
            return list(map(self.prepare, sources, names))
        start = time.perf_counter()
        try:
            with ThreadPoolExecutor(count) as pool:
                pictures = list(pool.map(self.prepare, sources, names))
        except RuntimeError:  # no thread could be started
            pictures = list(map(self.prepare, sources, names))
        new = [picture for source, picture in zip(sources, pictures, strict=True) if picture is not source]
        factor = min(1.0, elapsed_ms(start) / sum(picture.preprocess_ms for picture in new))
        return [_scale_times(picture, factor) if picture in new else picture for picture in pictures]

    def _add(self, key: bytes, picture: Picture) -> None:
        with self._lock:
            self._pictures[key] = picture
            while sum(recent.crops.nbytes for recent in self._pictures.values()) > self._max_bytes:
                del self._pictures[next(iter(self._pictures))]


def _scale_times(picture: Picture, factor: float) -> Picture:
    return replace(picture, preprocess_ms=factor * picture.preprocess_ms, image_ms=factor * picture.image_ms)


def _error_names(count: int) -> list[str]:
    """Return the names that error messages use for each of `count` pictures of a request."""
    return [f"Picture {n} of {count}" for n in range(1, count + 1)] if count > 1 else [""] * count


def snapshot_images(sources: Sequence[ImageInput | Picture], manifest: Manifest) -> list[ImageInput | Picture]:
    """Prepare pictures in memory now, because the caller may change them; return files, to be read later, unchanged.

    Raises `ImageError`.
    """
    return [
        prepare(source, manifest, name) if isinstance(source, Image.Image | np.ndarray) else source
        for source, name in zip(sources, _error_names(len(sources)), strict=True)
    ]


def copy_image(source: ImageInput | Picture) -> ImageInput | Picture:
    """Copy a picture in memory, which the caller may change: faster than `snapshot_images`, but takes more memory."""
    with suppress(Exception):  # preparing it will raise the error
        if isinstance(source, Image.Image):
            with PILLOW_LOCK:
                return source.copy()
        if isinstance(source, np.ndarray) and source.size <= 4 * MAX_PIXELS:
            return source.copy()
    return source


def apply_token_budget(picture: Picture, options: Options, manifest: Manifest) -> Picture:
    """Return the picture in at most `options.image_tokens` positions; unchanged if it fits already or if that is 0."""
    count = options.image_tokens
    if not 0 < count < len(picture.rows):
        return picture
    # Without the newline embeddings that end rows of patches: reduced features have no rows.
    candidates = picture.rows[picture.rows < len(picture.crops) * manifest.vision.image_tokens]
    key = hashlib.sha256(f"{picture.key} {options.image_token_method} {count}".encode()).hexdigest()
    budget = Budget(candidates, options.image_token_method, seed=int(picture.key[:8], 16))
    return replace(picture, rows=np.arange(min(count, len(candidates))), key=key, budget=budget)


def check_budget(options: Options, manifest: Manifest) -> None:
    """Raise `OptionError` if pictures of this bundle cannot be reduced to `options.image_tokens` positions."""
    vision = manifest.vision
    if not options.image_tokens:
        return
    if manifest.preprocessing.square != "anyres" and options.image_tokens > vision.image_tokens:
        raise OptionError(
            "image_tokens",
            f"is {options.image_tokens}, but in {manifest.name} a picture takes {vision.image_tokens}; "
            f"expected 1 to {vision.image_tokens}, or 0 for all.",
        )
    if not vision.attention:
        raise OptionError(
            "image_tokens",
            f"is {options.image_tokens}, but {manifest.name} was exported without the attention output "
            "that this needs: omit the option, or export or pull the bundle again.",
        )
