"""Writes the vision tower in the requested precision; in an int8 tower, sensitive blocks get 16-bit weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from llava_edge.anyres import crops
from llava_edge.bundle import Bundle
from llava_edge.errors import CheckpointError
from llava_edge.export import Progress, verify
from llava_edge.export.checkpoint import Checkpoint
from llava_edge.export.clip_onnx import Precision, write_clip
from llava_edge.runtimes.vision import VisionEncoder

INT8_TARGET = 2e-2  # relative error to stay below; photographs reached 2.2e-2 where the sample drawings had 1.6e-2


def write_tower(
    bundle: Bundle,
    checkpoint: Checkpoint,
    fine_blocks: int | None,
    pictures: Sequence[Image.Image],
    scratch: Path,
    progress: Progress,
) -> None:
    """Write vision.onnx of `bundle` in its manifest's precision.

    fine_blocks: of an int8 tower, how many blocks from the front have weights in two int8 parts; if None, as few as
    keep the error on `pictures` below `INT8_TARGET`.
    Raises `CheckpointError` for a tower whose output is constant or not finite.
    """
    precision: Precision = bundle.manifest.vision.precision
    progress(f"vision tower as {precision}", None)
    if precision == "int8" and fine_blocks is None:
        _write_int8(bundle, checkpoint, pictures, scratch, progress)
    else:
        write_clip(checkpoint.config, checkpoint.tensors, bundle.folder, precision, fine_blocks or 0)
    _features(bundle, pictures[:1])  # raises


def _write_int8(
    bundle: Bundle, checkpoint: Checkpoint, pictures: Sequence[Image.Image], scratch: Path, progress: Progress
) -> None:
    """Find by bisection the fewest finer blocks that meet `INT8_TARGET`, and write that tower."""
    config, tensors = checkpoint.config, checkpoint.tensors
    write_clip(config, tensors, scratch, "fp32")
    reference = _features(Bundle(scratch, bundle.manifest), pictures)
    low, high, written = 0, config.vision_blocks, -1  # `high` always suffices: 5e-4 was measured
    attempt = 0  # most towers need few
    while low < high:
        written = attempt
        write_clip(config, tensors, bundle.folder, "int8", written)
        pairs = zip(_features(bundle, pictures), reference, strict=True)
        error = max(verify.relative_error(ours, expected) for ours, expected in pairs)
        progress(f"vision tower as int8, {written} of {config.vision_blocks} blocks finer: error {error:.4f}", None)
        low, high = (low, written) if error <= INT8_TARGET else (written + 1, high)
        attempt = (low + high) // 2
    if written != high:
        write_clip(config, tensors, bundle.folder, "int8", high)


def _features(bundle: Bundle, pictures: Sequence[Image.Image]) -> list[np.ndarray]:
    """The features of each crop of the pictures."""
    encoder = VisionEncoder(bundle)
    features = [encoder.encode(crop) for item in pictures for crop in crops(item, bundle.manifest.preprocessing)]
    with np.errstate(over="ignore"):
        spread = float(np.std(features))
    if not 0 < spread < np.inf:
        what = "the same number everywhere" if spread == 0 else "numbers that exceed float32"
        raise CheckpointError(f"The vision tower gives {what}; its weights cannot be right.")
    return features
