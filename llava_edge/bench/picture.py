"""The picture a measurement shows, and copies of it that no cache can know."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from llava_edge.image import load_image

SIZE = (1280, 960)  # about what a message or a web page carries
_MARK = 16  # pixels: what is painted over, as wide as a block of JPEG's coarsest sampling


def drawn() -> Image.Image:
    """A fixed scene with gradients, edges and fine grain, so that decoding and resizing have what photos give them."""
    width, height = SIZE
    y, x = np.mgrid[0:height, 0:width]
    sky = np.stack([x * 160 // width + 60, y * 120 // height + 90, 220 - y * 100 // height], -1)
    grain = np.random.default_rng(0).integers(-12, 13, sky.shape)
    image = Image.fromarray((sky + grain).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    draw.ellipse((width // 8, height // 8, width // 3, height // 2), fill="orange", outline="black", width=6)
    draw.rectangle((width // 2, height // 2, width - 90, height - 60), fill="darkgreen", outline="white", width=6)
    return image


def variant(path: Path | None, number: int) -> bytes:
    """The picture of a file, or the drawn one, as a file of its format with a mark that differs for each number.

    The mark is in the middle, where no model crops.

    Raises `ImageError` or `MissingError`.
    """
    image = drawn() if path is None else load_image(path)
    kind = "JPEG"
    if path is not None:
        with Image.open(path) as original:
            kind = original.format if original.format in ("PNG", "WEBP", "BMP") else kind
    colour = (number * 67 % 256, number * 31 % 256, number * 11 % 256)
    left, top = max(image.width - _MARK, 0) // 2, max(image.height - _MARK, 0) // 2
    image.paste(colour, (left, top, min(left + _MARK, image.width), min(top + _MARK, image.height)))
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 92} if kind in ("JPEG", "WEBP") else {}))
    return buffer.getvalue()
