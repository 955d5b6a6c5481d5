"""Mean and standard deviation of pixels, from a checkpoint's image processor, whose other settings must be LLaVA's.

It is in preprocessor_config.json, or nested in processor_config.json by newer transformers. LLaVA takes CLIP's
processor from CLIP's own folder, and an adapter uses its base's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llava_edge.errors import CheckpointError
from llava_edge.export.tensors import read_json
from llava_edge.models.config import CLIP_MEAN, CLIP_STD

Normalisation = tuple[tuple[float, float, float], tuple[float, float, float]]  # mean, standard deviation

_BICUBIC = 3  # Pillow's number


def read_normalisation(folders: Iterable[Path], image_size: int, *, squared: bool) -> Normalisation:
    """From the first of these folders with a processor; CLIP's if none has one.

    image_size: side of the vision tower's pictures, in pixels. squared: whether pictures are square before the
    processor resizes them, by LLaVA's padding or tiles; if not, one that resizes to a fixed size squeezes them.

    Raises `CheckpointError` for a processor that makes other pixels than LLaVA's.
    """
    for folder in folders:
        path = folder / "preprocessor_config.json"
        raw = read_json(path) if path.is_file() else None
        if raw is None:
            path = folder / "processor_config.json"
            raw = read_json(path).get("image_processor") if path.is_file() else None
        if isinstance(raw, dict):
            raw = {key: value for key, value in raw.items() if value is not None}
            _check_size(path, raw, image_size, squared=squared or raw.get("do_pad") is True)
            return _parse(path, raw)
    return CLIP_MEAN, CLIP_STD


def _check_size(path: Path, raw: dict[str, Any], image_size: int, *, squared: bool) -> None:
    """Both settings are a number or a dictionary: CLIPImageProcessor's `get_size_dict`."""
    side = {"height": image_size, "width": image_size}
    size, crop = raw.get("size", image_size), raw.get("crop_size", image_size)
    sides = {key: value for key, value in size.items() if value is not None} if isinstance(size, dict) else size
    if sides == side and not squared:
        raise CheckpointError(
            f"{path} squeezes pictures to {image_size} x {image_size} pixels, which is not supported. If the model was "
            f'trained on padded or cropped pictures, as LLaVA, set size to {{"shortest_edge": {image_size}}}.'
        )
    if sides not in (image_size, {"shortest_edge": image_size}, side):
        raise CheckpointError(
            f"{path} sets size to {size!r}; only {image_size} pixels, the vision tower's size, are supported."
        )
    if raw.get("do_center_crop", True) and crop not in (image_size, side):
        raise CheckpointError(
            f"{path} sets crop_size to {crop!r}; only {image_size} pixels, the vision tower's size, are supported."
        )


def _parse(path: Path, raw: dict[str, Any]) -> Normalisation:
    fixed = (("do_rescale", True), ("do_normalize", True), ("do_resize", True), ("resample", _BICUBIC))
    for name, expected in fixed:
        if raw.get(name, expected) != expected:
            raise CheckpointError(
                f"{path} sets {name} to {raw[name]!r}; only {expected!r}, LLaVA's value, is supported."
            )
    factor = raw.get("rescale_factor", 1 / 255)
    if not isinstance(factor, int | float) or abs(factor * 255 - 1) > 1e-6:
        raise CheckpointError(f"{path} sets rescale_factor to {factor!r}; only 1/255 is supported.")
    mean = _three_numbers(path, "image_mean", raw.get("image_mean", CLIP_MEAN), least=0, most=1)
    return mean, _three_numbers(path, "image_std", raw.get("image_std", CLIP_STD), least=1e-6, most=math.inf)


def _three_numbers(path: Path, name: str, values: Any, *, least: float, most: float) -> tuple[float, float, float]:
    try:
        first, second, third = (float(value) for value in values)
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path} should give {name} as three numbers, has {values!r}.") from error
    if not all(math.isfinite(value) and least <= value <= most for value in (first, second, third)):
        raise CheckpointError(f"{path} sets {name} to {values!r}, which cannot be right for colours from 0 to 1.")
    return first, second, third
