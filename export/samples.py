"""Pictures to measure with: drawn by formula, so that every export anywhere measures the same thing.

They have what CLIP's activations depend on in photographs: large smooth areas, edges, fine texture with a natural
spectrum, dark and bright parts, and two shapes that are not square.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

_SIZES = ((320, 240), (240, 320), (256, 256), (400, 225))


def pictures() -> list[Image.Image]:
    """Four RGB pictures, the same every time."""
    return [_picture(size, seed) for seed, size in enumerate(_SIZES)]


def held_out() -> list[Image.Image]:
    """Four others, for what must not be measured on the pictures it was made with."""
    return [_picture(size, len(_SIZES) + seed) for seed, size in enumerate(_SIZES)]


def _picture(size: tuple[int, int], seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    width, height = size
    slope = np.linspace(0, 1, height)[:, None, None]
    sky, ground = rng.uniform(60, 250, 3), rng.uniform(20, 180, 3)
    picture = Image.fromarray(np.uint8(sky * (1 - slope) + ground * slope + np.zeros((height, width, 3))))
    draw = ImageDraw.Draw(picture)
    for i in range(9):
        left, top = rng.uniform(-0.1, 0.9, 2) * size
        box = (left, top, left + rng.uniform(0.08, 0.5) * width, top + rng.uniform(0.08, 0.5) * height)
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        (draw.ellipse, draw.rectangle, draw.rounded_rectangle)[i % 3](box, fill=colour)
    values = np.asarray(picture, np.float64) + _texture(size, rng)
    return Image.fromarray(np.uint8(np.clip(values, 0, 255)))


def _texture(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """(H, W, 1) noise whose amplitude falls with frequency as in photographs (1/f), standard deviation 18."""
    width, height = size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    frequency[0, 0] = np.inf
    noise = np.fft.ifft2(np.fft.fft2(rng.standard_normal((height, width))) / frequency).real
    return np.asarray(18 * noise / noise.std())[..., None]
