"""CLIP features -> image embeddings for the language model: the Linear and GELU layers of projector.gguf.

Computed in numpy, or by the kernel of our ONNX Runtime operators where that is faster.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from llava_edge import gguf
from llava_edge.bundle import PROJECTOR, Bundle
from llava_edge.errors import BundleError, MemoryLimitError, UnavailableError, not_finite
from llava_edge.runtimes.native import operator

Array = np.ndarray[Any, Any]

ARCHITECTURE = "llava-projector"
MAX_LAYERS = 16
NEWLINE = "image_newline"
GELU_ROWS = 4  # of activations at a time, so that temporaries stay in the processor's cache
BLOCK = 1024  # outputs computed at a time: 16 MB of float32 weights for LLaVA-1.5-7B


class Projector:
    """Memory-mapped layers `mm.0`, `mm.2`, ...: each has `weight` (out, in) and `bias` (out). Raises `BundleError`.

    library: our operators', whose kernel then computes with `threads` threads (`native.projector_library`).
    newline: (hidden size) float32, the embedding that ends a row of patches, or None if the model has none.
    """

    def __init__(self, bundle: Bundle, library: Path | None = None, threads: int = 1) -> None:
        path = bundle.part(PROJECTOR)
        file = gguf.read(path)
        if file.architecture != ARCHITECTURE:
            raise BundleError(f"{path} holds {file.architecture!r}; expected {ARCHITECTURE!r}.")
        numbers = [index for index in range(0, 2 * MAX_LAYERS, 2) if f"mm.{index}.weight" in file.tensors]
        names = {f"mm.{index}.{kind}" for index in numbers for kind in ("weight", "bias")}
        names |= {NEWLINE} if bundle.manifest.preprocessing.merge == "spatial_unpad" else set()
        if not numbers or numbers != list(range(0, 2 * len(numbers), 2)) or names != set(file.tensors):
            expected = "mm.0, mm.2, ..." + (f" and {NEWLINE}" if NEWLINE in names else "")
            raise BundleError(f"{path} has the tensors {sorted(file.tensors)[:6]}; expected {expected}.")
        self._layers = [(file.array(f"mm.{index}.weight"), file.array(f"mm.{index}.bias")) for index in numbers]
        width = bundle.manifest.vision.width
        for weight, bias in self._layers:
            if weight.ndim != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1]:
                raise BundleError(
                    f"{path} has a layer {weight.shape} with bias {bias.shape}, but its input has width {width}."
                )
            width = weight.shape[0]
        hidden_size = bundle.manifest.language.hidden_size
        if width != hidden_size:
            raise BundleError(f"{path} has output width {width}, but the language model has width {hidden_size}.")
        self.newline = file.array(NEWLINE).astype(np.float32) if NEWLINE in names else None
        if self.newline is not None and self.newline.shape != (width,):
            raise BundleError(f"{path} has an {NEWLINE} of shape {self.newline.shape}; expected ({width},).")
        self._path, self._library, self._threads = path, library, threads

    def project(self, features: Array) -> Array:
        """(image_tokens, vision width) float32 -> (image_tokens, hidden size) float32, C-contiguous and finite.

        Raises `BundleError`, `MemoryLimitError`, or `UnavailableError` if the kernel cannot be loaded.
        """
        values = features
        try:
            for number, (weight, bias) in enumerate(self._layers, 1):
                values = self._layer(values, weight, bias, then_gelu=number < len(self._layers))
        except MemoryError as error:
            raise MemoryLimitError("There is not enough memory to compute the embeddings of a picture.") from error
        if not np.isfinite(values).all():
            raise not_finite(self._path)
        return np.ascontiguousarray(values, np.float32)

    def _layer(self, values: Array, weight: Array, bias: Array, then_gelu: bool) -> Array:
        """Compute values @ weight.T + bias, then GELU if `then_gelu`, by our kernel where it supports the layer."""
        if self._library is not None and operator.supports_projection(weight):
            try:
                return operator.project(self._library, values, weight, bias, self._threads, then_gelu)
            except OSError as error:  # its file is gone
                raise UnavailableError(
                    f"The native kernel for the projector failed: {error}. Try again, or set LLAVA_EDGE_NATIVE=off."
                ) from error
        values = linear(values, weight, bias)
        for first in range(0, len(values) if then_gelu else 0, GELU_ROWS):
            values[first : first + GELU_ROWS] = gelu(values[first : first + GELU_ROWS])
        return values


def linear(values: Array, weight: Array, bias: Array) -> Array:
    """Compute values @ weight.T + bias in numpy. Mapped float16 weights are converted at use, a block at a time."""
    result = np.empty((*values.shape[:-1], len(weight)), np.float32)
    for first in range(0, len(weight), BLOCK):
        part = slice(first, first + BLOCK)
        result[..., part] = values @ weight[part].astype(np.float32).T + bias[part]
    return result


def gelu(values: Array) -> Array:
    """x/2 (1 + erf(x/sqrt 2)), the exact form that LLaVA's projector was trained with; float32 in and out.

    erf by Abramowitz and Stegun 7.1.26, off by 1.5e-7 at most, which rounding to float32 makes 5e-7 between -12 and 12.
    """
    t = 1 / (1 + np.float32(0.3275911 / math.sqrt(2)) * np.abs(values))
    tail = np.float32(1.061405429) * t
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        tail += np.float32(coefficient)
        tail *= t
    tail *= np.float32(0.5) * np.exp(np.float32(-0.5) * values * values)  # probability beyond |x|
    return np.asarray(values * np.where(values < 0, tail, 1 - tail))
