"""Reads the finished GGUF files back and compares every dequantised tensor with the checkpoint. Without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llava_edge import gguf
from llava_edge.errors import CheckpointError
from llava_edge.export import llm_gguf, projector
from llava_edge.export.checkpoint import Checkpoint
from llava_edge.models import llama_gguf
from llava_edge.models.llama_gguf import BLOCK_VALUES

Array = np.ndarray[Any, Any]

# Largest relative (l2) error of a tensor by GGUF type. For b bits with one scale per n values a block's error is at
# most about max / 2^(b-1) / sqrt(12), and max / rms at most sqrt(n): 0.2 for q4_0. A swapped tensor gives about 1.4.
TYPE_LIMITS = {"F32": 0.0, "F16": 1e-3, "Q8_0": 0.02, "Q6_K": 0.05, "Q5_K": 0.13, "Q5_0": 0.13, "Q5_1": 0.13}
TYPE_LIMITS |= {"Q4_K": 0.25, "Q4_0": 0.25, "Q4_1": 0.25}


def read_back_language(path: Path, checkpoint: Checkpoint, progress: Callable[[float], None]) -> None:
    """Compare every tensor of a language file with its source. Raises `CheckpointError` naming one that differs."""
    names = llama_gguf.tensor_names(checkpoint.config.text)
    _read_back(path, names, lambda target: llm_gguf.gguf_tensor(checkpoint, target, names[target]), progress)
    gguf.check_language(gguf.read(path))


def read_back_projector(path: Path, checkpoint: Checkpoint) -> None:
    """Compare every tensor of projector.gguf with its source. Raises `CheckpointError` naming one that differs."""
    names = projector.tensor_names(checkpoint.config)
    _read_back(path, names, lambda target: checkpoint.tensors[names[target]], lambda share: None)


def _read_back(
    path: Path, names: Mapping[str, str], source: Callable[[str], Array], progress: Callable[[float], None]
) -> None:
    from gguf import GGUFReader

    stored = {item.name: item for item in GGUFReader(path).tensors}
    if stored.keys() != names.keys():
        raise CheckpointError(f"{path} holds other tensors than were written: {sorted(stored.keys() ^ names.keys())}.")
    for done, (name, item) in enumerate(stored.items()):
        expected, limit = source(name), TYPE_LIMITS.get(item.tensor_type.name, 0.0)
        same_shape = tuple(item.shape[::-1]) == expected.shape
        error = _relative_error(_dequantized(item, np.atleast_2d(expected))) if same_shape else np.inf
        if not error <= limit:
            raise CheckpointError(
                f"{path} does not hold what was written: {name} as {item.tensor_type.name} is off by {error:.2g} "
                f"(relative), at most {limit:.2g} is possible."
            )
        progress((done + 1) / len(stored))


def _dequantized(item: Any, expected: Array) -> Iterator[tuple[Array, Array]]:
    """A tensor of a GGUF and what it should be, a few rows at a time: twice as fast as all at once."""
    from gguf.quants import dequantize

    data, count = np.atleast_2d(item.data), max(1, BLOCK_VALUES // expected.shape[1])
    for start in range(0, len(expected), count):
        rows = slice(start, start + count)
        yield dequantize(data[rows], item.tensor_type), expected[rows]


def relative_error(ours: Array, reference: Array) -> float:
    """l2 norm of the difference, divided by that of the reference; infinite if one of them exceeds float32."""
    ours, reference = np.ravel(ours), np.ravel(reference)
    parts = [slice(start, start + BLOCK_VALUES) for start in range(0, reference.size, BLOCK_VALUES)]
    return _relative_error((ours[part], reference[part]) for part in parts or [slice(0)])


def _relative_error(blocks: Iterable[tuple[Array, Array]]) -> float:
    """The same of an array in several blocks, each with its reference."""
    with np.errstate(over="ignore", invalid="ignore"):
        norms = [
            (np.linalg.norm(reference), np.linalg.norm(np.subtract(ours, reference, dtype=np.float32)))
            for ours, reference in blocks
        ]
        norm, difference = np.linalg.norm(np.array(norms, np.float64), axis=0)
    if not np.isfinite([norm, difference]).all():
        return np.inf
    return float(difference / norm if norm else difference > 0)
