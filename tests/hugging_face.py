"""Where transformers 4.57 and 5 differ for the tests, which compare with either."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

V5 = int(transformers.__version__.partition(".")[0]) >= 5


def pillow(model: str) -> Any:
    """The image processor that uses Pillow, as LLaVA does; in version 5 the old names are those of torchvision."""
    name = {"clip": "CLIP", "llava": "Llava", "llava_next": "LlavaNext"}[model]
    module = import_module(f"transformers.models.{model}.image_processing_{'pil_' if V5 else ''}{model}")
    return getattr(module, f"{name}ImageProcessor{'Pil' if V5 else ''}")


def image_features(model: Any, pixels: Tensor, sizes: Tensor) -> Any:
    """(positions, hidden size) of each picture."""
    found = model.get_image_features(pixels, sizes)
    return found.pooler_output if V5 else found


def in_memory(tensors: Mapping[str, np.ndarray], model: nn.Module) -> dict[str, Tensor]:
    """Tensors under classic names -> under those of the model's own state_dict; version 5 has no `vision_model`."""
    names, renamed = model.state_dict().keys(), {}
    for name, array in tensors.items():
        new = name.removeprefix("language_model.") if "lm_head" in name else name
        new = new.replace("language_model.model.", "model.language_model.")
        if new.startswith(("vision_tower", "multi_modal_projector")):
            new = f"model.{new}"
        renamed[new if new in names else new.replace("vision_model.", "")] = torch.from_numpy(array)
    return renamed


def rope_theta(config: Any) -> float:
    """The base of the rotary embedding."""
    return float(config.rope_parameters["rope_theta"] if V5 else config.rope_theta)
