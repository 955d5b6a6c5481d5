"""Any picture -> what the vision encoder and the language model are shown of it, by a bundle's manifest.

How many positions it takes is known before it is encoded, with a token budget too.
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
from llava_edge.errors import UsageError
from llava_edge.image import MAX_PIXELS, PILLOW_LOCK, ImageInput, load_image, read_image
from llava_edge.options import Options, TokenMethod
from llava_edge.runtimes import devices
from llava_edge.runtimes.stats import elapsed_ms

Array = np.ndarray[Any, Any]

RECENT_BYTES = 1 << 25  # 24 pictures of 336 x 336
SIDE_BY_SIDE = 4  # pictures that are decoded at once: a phone's photo takes 50 MB on the way


@dataclass(frozen=True, eq=False)
class Budget:
    """What a picture's positions are made from.

    rows: (candidates,) which of all crops' features (crops * tokens, width), in the picture's order.
    method, seed: how, see `token_budget.reduce_features`.
    """

    rows: Array
    method: TokenMethod
    seed: int


@dataclass(frozen=True, eq=False)
class Picture:
    """An image ready for the vision encoder.

    crops: (crops, 3, S, S) float32; one, or with "anyres" the whole picture and its tiles.
    rows: (positions,) which of the crops' embeddings stands where in the language model, see `anyres.layout`; with a
        budget, which of those that it leaves: 0, 1, 2, ...
    key: a hash of everything that decides about the embeddings.
    milliseconds: what all that took; decode_milliseconds: of these, until the picture was RGB.
    """

    crops: Array
    rows: Array
    key: str
    milliseconds: float
    decode_milliseconds: float = 0.0
    budget: Budget | None = None


def prepare(source: ImageInput | Picture, manifest: Manifest, name: str = "") -> Picture:
    """Decode and preprocess an image; `name` is as in `load_image`. Raises `ImageError` or `MissingError`."""
    if isinstance(source, Picture):
        return source
    start = time.perf_counter()
    image = load_image(source, name)
    decoded = time.perf_counter()
    crops = anyres.crops(image, manifest.preprocessing)
    # Pictures of one colour can have the same crops and differ in size, and so in how many rows are padding.
    rows = anyres.layout(image.size, manifest.preprocessing, manifest.vision.image_tokens)
    key = hashlib.sha256(crops.tobytes() + rows.tobytes()).hexdigest()
    return Picture(crops, rows, key, elapsed_ms(start), (decoded - start) * 1000)


class Recent:
    """Prepares pictures, and those from files or bytes once as long as they are among the last; from any thread.

    They are found by a hash of all bytes of the file, which takes 1 ms where decoding a phone's photo takes 120.
    """

    def __init__(self, manifest: Manifest, limit: int) -> None:
        """limit: bytes of pixels that are kept."""
        self._manifest = manifest
        self._limit = limit
        self._pictures: dict[bytes, Picture] = {}  # the one asked for last stands last
        self._lock = threading.Lock()

    def prepare(self, source: ImageInput | Picture, name: str = "") -> Picture:
        """As the function `prepare`."""
        start = time.perf_counter()
        data, name = read_image(source) if isinstance(source, str | os.PathLike) else (source, name)
        if not isinstance(data, bytes):
            return prepare(data, self._manifest, name)
        key = hashlib.sha256(data).digest()
        with self._lock:
            known = self._pictures.pop(key, None)
        reading = elapsed_ms(start)
        picture = known or prepare(data, self._manifest, name)
        self._keep(key, picture)
        whole, decoding = (0.0, 0.0) if known else (picture.milliseconds, picture.decode_milliseconds)
        return replace(picture, milliseconds=reading + whole, decode_milliseconds=reading + decoding)

    def prepare_all(self, sources: Sequence[ImageInput | Picture]) -> list[Picture]:
        """Each as `prepare`, side by side; their times are shares of what all took. Raises the first one's error."""
        names = _names(len(sources))
        count = sum(not isinstance(source, Picture) for source in sources)
        count = min(count, len(devices.allowed_cpus()), SIDE_BY_SIDE)
        if count < 2:
            return list(map(self.prepare, sources, names))
        start = time.perf_counter()
        try:
            with ThreadPoolExecutor(count) as pool:
                pictures = list(pool.map(self.prepare, sources, names))
        except RuntimeError:  # the system gives no more threads
            pictures = list(map(self.prepare, sources, names))
        new = [picture for source, picture in zip(sources, pictures, strict=True) if picture is not source]
        share = min(1.0, elapsed_ms(start) / sum(picture.milliseconds for picture in new))
        return [_in_share(picture, share) if picture in new else picture for picture in pictures]

    def _keep(self, key: bytes, picture: Picture) -> None:
        with self._lock:
            self._pictures[key] = picture
            while sum(kept.crops.nbytes for kept in self._pictures.values()) > self._limit:
                del self._pictures[next(iter(self._pictures))]


def _in_share(picture: Picture, share: float) -> Picture:
    times = share * picture.milliseconds, share * picture.decode_milliseconds
    return replace(picture, milliseconds=times[0], decode_milliseconds=times[1])


def _names(count: int) -> list[str]:
    """What messages call each of so many pictures that are shown together."""
    return [f"Picture {n} of {count}" for n in range(1, count + 1)] if count > 1 else [""] * count


def taken(sources: Sequence[ImageInput | Picture], manifest: Manifest) -> list[ImageInput | Picture]:
    """Pictures that the caller may change or use again, prepared now; files, to be read later, as they are.

    Raises `ImageError`.
    """
    return [
        prepare(source, manifest, name) if isinstance(source, Image.Image | np.ndarray) else source
        for source, name in zip(sources, _names(len(sources)), strict=True)
    ]


def copied(source: ImageInput | Picture) -> ImageInput | Picture:
    """A copy of a picture that the caller may change or use again: quicker than `taken`, but larger."""
    with suppress(Exception):  # what is wrong with it is said when it is prepared
        if isinstance(source, Image.Image):
            with PILLOW_LOCK:
                return source.copy()
        if isinstance(source, np.ndarray) and source.size <= 4 * MAX_PIXELS:
            return source.copy()
    return source


def limited(picture: Picture, options: Options, manifest: Manifest) -> Picture:
    """The picture in at most `options.image_tokens` positions; itself if it takes no more, or if that is 0."""
    count = options.image_tokens
    if not 0 < count < len(picture.rows):
        return picture
    # Without those that end rows of patches: what is left has no rows.
    candidates = picture.rows[picture.rows < len(picture.crops) * manifest.vision.image_tokens]
    key = hashlib.sha256(f"{picture.key} {options.image_token_method} {count}".encode()).hexdigest()
    budget = Budget(candidates, options.image_token_method, seed=int(picture.key[:8], 16))
    return replace(picture, rows=np.arange(min(count, len(candidates))), key=key, budget=budget)


def check_budget(options: Options, manifest: Manifest) -> None:
    """Raises `UsageError` if pictures cannot be had in `options.image_tokens` positions."""
    vision = manifest.vision
    if not options.image_tokens:
        return
    if manifest.preprocessing.square != "anyres" and options.image_tokens > vision.image_tokens:
        raise UsageError(
            f"image_tokens is {options.image_tokens}, but in {manifest.name} a picture takes {vision.image_tokens}; "
            f"1 to {vision.image_tokens}, or 0 for all, was expected."
        )
    if not vision.attention:
        raise UsageError(
            f"image_tokens is {options.image_tokens}, but {manifest.name} was exported without the attention that it "
            "chooses by: leave it out, or export or pull the bundle again."
        )
