"""A second implementation of LLaVA's and CLIPImageProcessor's preprocessing, to check the first against."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image

from llava_edge.bundle import Preprocessing

Array = np.ndarray[Any, Any]


def reference_pixels(image: Image.Image, spec: Preprocessing) -> Array:
    """(crops, 3, S, S) float32 of an RGB picture: LLaVA's expand2square, CLIP's shortest-edge resize and centre crop,
    or LLaVA's process_anyres_image; then rescale and normalise. Pillow's bicubic filter throughout."""
    make = {"pad": _padded, "crop": _cropped, "anyres": _tiled}[spec.square]
    scaled = (np.stack([np.asarray(crop) for crop in make(image, spec)]).astype(np.float64) * (1 / 255)).astype("f4")
    normalised = (scaled - np.array(spec.mean, np.float32)) / np.array(spec.std, np.float32)
    return np.ascontiguousarray(normalised.transpose(0, 3, 1, 2))


def _padded(image: Image.Image, spec: Preprocessing) -> list[Image.Image]:
    side, size = max(image.size), spec.image_size
    canvas = Image.new("RGB", (side, side), tuple(int(255 * value) for value in spec.mean))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return [canvas.resize((size, size), Image.Resampling.BICUBIC)]


def _cropped(image: Image.Image, spec: Preprocessing) -> list[Image.Image]:
    size = spec.image_size
    short, long = min(image.size), max(image.size)
    longer = int(size * long / short)
    image = image.resize((size, longer) if image.width == short else (longer, size), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return [image.crop((left, top, left + size, top + size))]


def _tiled(image: Image.Image, spec: Preprocessing) -> list[Image.Image]:
    size = spec.image_size
    best, used, wasted = (0, 0), -1, 0
    for width, height in spec.grids:
        scale = min(width / image.width, height / image.height)
        effective = min(int(image.width * scale) * int(image.height * scale), image.width * image.height)
        if effective > used or (effective == used and width * height - effective < wasted):
            best, used, wasted = (width, height), effective, width * height - effective
    wide, high = best[0] / image.width, best[1] / image.height
    if wide < high:
        inner = (best[0], min(math.ceil(image.height * wide), best[1]))
    else:
        inner = (min(math.ceil(image.width * high), best[0]), best[1])
    canvas = Image.new("RGB", best, (0, 0, 0))
    canvas.paste(image.resize(inner), ((best[0] - inner[0]) // 2, (best[1] - inner[1]) // 2))
    corners = [(left, top) for top in range(0, best[1], size) for left in range(0, best[0], size)]
    tiles = [canvas.crop((left, top, left + size, top + size)) for left, top in corners]
    return [image.resize((size, size)), *tiles]
