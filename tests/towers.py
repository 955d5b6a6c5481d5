"""A small CLIP tower of transformers, pixels for it, and how far what is computed of them is from what it should be."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava_edge.export.names import classic_name
from llava_edge.models.config import VisionConfig

Array = np.ndarray[Any, Any]

TOWER = VisionConfig(
    image_size=48,
    patch_size=8,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    layer_norm_eps=1e-3,  # not ONNX's default, which is CLIP's, too
)


def clip_tower() -> tuple[CLIPVisionModel, dict[str, Array]]:
    """Random weights, large enough for activations and norms to matter and for some patches to be looked at more."""
    torch.manual_seed(0)
    tower = CLIPVisionModel(CLIPVisionConfig(**vars(TOWER), attn_implementation="eager")).eval()
    for parameter in tower.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.15)
    return tower, {classic_name(name): value.numpy() for name, value in tower.state_dict().items()}


def some_pixels(count: int = 1) -> Array:
    return np.random.default_rng(3).standard_normal((count, 3, 48, 48)).astype(np.float32)


def relative(found: Array, wanted: Array) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
