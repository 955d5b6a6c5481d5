"""LLaVA-1.6's way to look at a picture: once whole and once in tiles, and the order of what is seen.

    crops     RGB picture -> pixels (1 + tiles, 3, S, S): the whole picture squeezed to a square, then the tiles of an
              enlarged or reduced copy on a black canvas of one of the allowed sizes (`grids`), row by row
    layout    which embedding of which crop stands at which position of the language model

Pictures that are one crop ("pad", "crop") go through the same two functions. The rules are those of haotian-liu/LLaVA
(llava/mm_utils.py, llava/model/llava_arch.py). transformers differs in two points:

- Its grids are (height, width), and published conversions kept LLaVA's numbers, which are (width, height). Where two
  grids are equally good (pictures smaller than both) it takes the other one. A checkpoint's own order is followed.
- Before it cuts off the padding it rounds the picture's side on the map to 7 digits, where LLaVA only truncates. This
  matters where a whole number comes out a last digit too small: of 47 x 1128 pixels it keeps 4 columns of 24, not 2.

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
    """What CLIP gets: float32, (crops, 3, S, S). `image` is what `load_image` returns; raises `ImageError` else."""
    if spec.square != "anyres":
        return preprocess(image, spec)[None]
    if image.mode != "RGB":
        raise ImageError(f"Preprocessing takes an RGB picture as load_image returns it, not one of mode {image.mode}.")
    side = spec.image_size
    canvas = _canvas(image, best_grid(image.size, spec.grids))
    parts = [image.resize((side, side), Image.Resampling.BICUBIC)]
    for top in range(0, canvas.height, side):
        parts += [canvas.crop((left, top, left + side, top + side)) for left in range(0, canvas.width, side)]
    return np.stack([normalise(part, spec) for part in parts])


def best_grid(size: Size, grids: tuple[Size, ...]) -> Size:
    """The grid that keeps most pixels of a picture; of equals the one that wastes least, of those the first."""

    def kept(grid: Size) -> int:
        scale = min(grid[0] / size[0], grid[1] / size[1])
        return min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])

    return max(grids, key=lambda grid: (kept(grid), kept(grid) - grid[0] * grid[1]))


def _canvas(image: Image.Image, grid: Size) -> Image.Image:
    """The picture at the largest size that fits, its free side rounded up, in the middle of black."""
    across, down = grid[0] / image.width, grid[1] / image.height
    if across < down:
        fitted = grid[0], min(math.ceil(image.height * across), grid[1])
    else:
        fitted = min(math.ceil(image.width * down), grid[0]), grid[1]
    canvas = Image.new("RGB", grid)
    corner = (grid[0] - fitted[0]) // 2, (grid[1] - fitted[1]) // 2
    canvas.paste(image.resize(fitted, Image.Resampling.BICUBIC), corner)
    return canvas


def layout(size: Size, spec: Preprocessing, tokens: int) -> Array:
    """(positions,) int: rows of the embeddings (crops * tokens, ..) that a picture of `size` shows the language model.

    tokens: embeddings of one crop. The row behind the last, crops * tokens, is the newline's.
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
    seen = _without_padding(tiles.swapaxes(1, 2).reshape(rows * side, columns * side), size)
    lines = np.pad(seen, ((0, 0), (0, 1)), constant_values=newline)
    return np.concatenate([np.arange(tokens), lines.ravel()])


def _without_padding(places: Array, size: Size) -> Array:
    """Cut off the rows or columns that are padding, as many on either side: of an odd number, one stays.

    Of a picture thinner than half a patch nothing is left, as in LLaVA.
    """
    height, width = places.shape
    if size[0] / size[1] > width / height:
        margin = (height - int(size[1] * (width / size[0]))) // 2
        return places[margin : height - margin]
    margin = (width - int(size[0] * (height / size[1]))) // 2
    return places[:, margin : width - margin]


def arrange(embeddings: Array, newline: Array | None, rows: Array) -> Array:
    """(crops, tokens, D) -> (positions, D) in the order `layout` gave; `newline` (D,) is its last row."""
    flat = embeddings.reshape(-1, embeddings.shape[-1])
    return (flat if newline is None else np.concatenate([flat, newline[None]]))[rows]
