"""LLaVA-1.6's "anyres" images: the whole picture and tiles of it, and the order of their embeddings.

    crops     RGB picture -> pixels (1 + tiles, 3, S, S): the whole picture resized to a square, then the tiles of a
              resized copy on a black canvas of one of the allowed sizes (`grids`), row by row
    layout    which embedding of which crop goes to which position of the language model

Pictures of one crop ("pad", "crop") use the same two functions. The rules are those of haotian-liu/LLaVA
(llava/mm_utils.py, llava/model/llava_arch.py). transformers differs in two ways:

- Its grids are (height, width), but published conversions kept LLaVA's numbers, which are (width, height). Where two
  grids are equally good (pictures smaller than both) it picks the other one. A checkpoint's own order is followed.
- Before removing the padding it rounds the picture's side in patches to 7 digits, where LLaVA only truncates. This
  matters where an integer comes out slightly too small: of 47 x 1128 pixels it keeps 4 columns of 24, not 2.

Sizes are (width, height) everywhere. Knows nothing about the width of embeddings.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image

from llava_edge.bundle import Preprocessing
from llava_edge.errors import ImageError
from llava_edge.image import normalise, preprocess

Size = tuple[int, int]
Array = np.ndarray[Any, Any]


def crops(image: Image.Image, spec: Preprocessing) -> Array:
    """Preprocess a picture for CLIP: float32, (crops, 3, S, S). Raises `ImageError` unless `load_image` made it."""
    if spec.square != "anyres":
        return preprocess(image, spec)[None]
    if image.mode != "RGB":
        raise ImageError(f"Preprocessing expects an RGB picture from load_image, not one of mode {image.mode}.")
    side = spec.image_size
    canvas = _canvas(image, best_grid(image.size, spec.grids))
    parts = [image.resize((side, side), Image.Resampling.BICUBIC)]
    for top in range(0, canvas.height, side):
        parts += [canvas.crop((left, top, left + side, top + side)) for left in range(0, canvas.width, side)]
    return np.stack([normalise(part, spec) for part in parts])


def best_grid(size: Size, grids: tuple[Size, ...]) -> Size:
    """The grid that keeps most pixels of a picture, then the one that wastes least, then the first."""

    def effective_pixels(grid: Size) -> int:
        scale = min(grid[0] / size[0], grid[1] / size[1])
        return min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])

    return max(grids, key=lambda grid: (effective_pixels(grid), effective_pixels(grid) - grid[0] * grid[1]))


def _canvas(image: Image.Image, grid: Size) -> Image.Image:
    """The picture resized to fit the grid (its free side rounded up) and centred on black."""
    scale_x, scale_y = grid[0] / image.width, grid[1] / image.height
    if scale_x < scale_y:
        fitted = grid[0], min(math.ceil(image.height * scale_x), grid[1])
    else:
        fitted = min(math.ceil(image.width * scale_y), grid[0]), grid[1]
    canvas = Image.new("RGB", grid)
    corner = (grid[0] - fitted[0]) // 2, (grid[1] - fitted[1]) // 2
    canvas.paste(image.resize(fitted, Image.Resampling.BICUBIC), corner)
    return canvas


def layout(size: Size, spec: Preprocessing, tokens: int) -> Array:
    """Order of a picture's embeddings in the prompt: (positions,) int, rows of (crops * tokens, ...).

    tokens: embeddings per crop. Row crops * tokens, one past the last, is the newline embedding.
    """
    if spec.square != "anyres":
        return np.arange(tokens)
    grid = best_grid(size, spec.grids)
    columns, rows = grid[0] // spec.image_size, grid[1] // spec.image_size
    newline = (1 + columns * rows) * tokens
    if spec.merge == "flat":
        return np.arange(newline)
    side = math.isqrt(tokens)
    tiles = np.arange(tokens, newline).reshape(rows, columns, side, side)
    unpadded = _unpad(tiles.swapaxes(1, 2).reshape(rows * side, columns * side), size)
    lines = np.pad(unpadded, ((0, 0), (0, 1)), constant_values=newline)
    return np.concatenate([np.arange(tokens), lines.ravel()])


def _unpad(indices: Array, size: Size) -> Array:
    """Remove the rows or columns of padding, equally many on both sides; of an odd number, one stays.

    As in LLaVA, nothing is left of a picture thinner than half a patch.
    """
    height, width = indices.shape
    if size[0] / size[1] > width / height:
        margin = (height - int(size[1] * (width / size[0]))) // 2
        return indices[margin : height - margin]
    margin = (width - int(size[0] * (height / size[1]))) // 2
    return indices[:, margin : width - margin]


def arrange(embeddings: Array, newline: Array | None, rows: Array) -> Array:
    """Arrange embeddings (crops, tokens, D) as `layout` says: (positions, D); `newline` (D,) becomes the last row."""
    flat = embeddings.reshape(-1, embeddings.shape[-1])
    return (flat if newline is None else np.concatenate([flat, newline[None]]))[rows]
