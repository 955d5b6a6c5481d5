"""The picture of a measurement, and marked copies of it that no cache has seen."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from llava_edge.image import load_image

SIZE = (1280, 960)  # typical of messages and web pages
_MARK_SIZE = 16  # pixels, a block at JPEG's coarsest subsampling


def draw_scene() -> Image.Image:
    """A fixed scene with gradients, edges and fine grain, so that decoding and resizing cost as much as for photos."""
    width, height = SIZE
    y, x = np.mgrid[0:height, 0:width]
    sky = np.stack([x * 160 // width + 60, y * 120 // height + 90, 220 - y * 100 // height], -1)
    grain = np.random.default_rng(0).integers(-12, 13, sky.shape)
    image = Image.fromarray((sky + grain).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    draw.ellipse((width // 8, height // 8, width // 3, height // 2), fill="orange", outline="black", width=6)
    draw.rectangle((width // 2, height // 2, width - 90, height - 60), fill="darkgreen", outline="white", width=6)
    return image


def marked_copy(path: Path | None, number: int) -> bytes:
    """Encode the picture of a file, or the drawn one, in the same format with a mark of a colour that `number` selects.

    The mark is in the middle, which no model crops away. Raises `ImageError` or `MissingError`.
    """
    image = draw_scene() if path is None else load_image(path)
    kind = "JPEG"
    if path is not None:
        with Image.open(path) as original:
            kind = original.format if original.format in ("PNG", "WEBP", "BMP") else kind
    colour = (number * 67 % 256, number * 31 % 256, number * 11 % 256)
    left, top = max(image.width - _MARK_SIZE, 0) // 2, max(image.height - _MARK_SIZE, 0) // 2
    image.paste(colour, (left, top, min(left + _MARK_SIZE, image.width), min(top + _MARK_SIZE, image.height)))
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 92} if kind in ("JPEG", "WEBP") else {}))
    return buffer.getvalue()
