"""Any picture -> what the vision encoder and the language model are shown of it, by a bundle's manifest."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from llava_edge import anyres
from llava_edge.bundle import Manifest
from llava_edge.image import ImageInput, load_image

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Picture:
    """An image ready for the vision encoder.

    crops: (crops, 3, S, S) float32; one, or with "anyres" the whole picture and its tiles.
    rows: (positions,) which of the crops' embeddings stands where in the language model, see `anyres.layout`.
    key: a hash of both. milliseconds: what all that took; decode_milliseconds: of these, until the picture was RGB.
    """

    crops: Array
    rows: Array
    key: str
    milliseconds: float
    decode_milliseconds: float = 0.0


def prepare(source: ImageInput | Picture, manifest: Manifest) -> Picture:
    """Decode and preprocess an image. Raises `ImageError` or `MissingError`."""
    if isinstance(source, Picture):
        return source
    start = time.perf_counter()
    image = load_image(source)
    decoded = time.perf_counter()
    crops = anyres.crops(image, manifest.preprocessing)
    # Pictures of one colour can have the same crops and differ in size, and so in how many rows are padding.
    rows = anyres.layout(image.size, manifest.preprocessing, manifest.vision.image_tokens)
    key = hashlib.sha256(crops.tobytes() + rows.tobytes()).hexdigest()
    return Picture(crops, rows, key, (time.perf_counter() - start) * 1000, (decoded - start) * 1000)
