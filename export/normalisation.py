"""Mean and standard deviation of pixels, from a checkpoint's image processor.

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


def read_normalisation(folders: Iterable[Path]) -> Normalisation:
    """From the first of these folders with a processor; CLIP's if none has one. Raises `CheckpointError`."""
    for folder in folders:
        path = folder / "preprocessor_config.json"
        if path.is_file():
            return _parse(path, read_json(path))
        path = folder / "processor_config.json"
        nested = read_json(path).get("image_processor") if path.is_file() else None
        if isinstance(nested, dict):
            return _parse(path, nested)
    return CLIP_MEAN, CLIP_STD


def _parse(path: Path, raw: dict[str, Any]) -> Normalisation:
    raw = {key: value for key, value in raw.items() if value is not None}
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
