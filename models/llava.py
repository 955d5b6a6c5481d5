"""CLIP tower, projector and LLaMA as one trainable module. For inference from a checkpoint see `streamed`.

State dict names are Hugging Face's classic ones (`vision_tower.vision_model.`, `multi_modal_projector.`,
`language_model.`).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from llava_edge.models.clip import VisionTower
from llava_edge.models.config import LlavaConfig
from llava_edge.models.llama import Llama
from llava_edge.models.projector import Projector


class _Tower(nn.Module):
    """Adds the level that Hugging Face's names have."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.vision_model = VisionTower(config)


class Llava(nn.Module):
    """The whole model."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = _Tower(config)
        self.multi_modal_projector = Projector(config)
        self.language_model = Llama(config.text)


def from_state(config: LlavaConfig, tensors: Mapping[str, np.ndarray]) -> Llava:
    """Build a frozen float32 model from copies of a checkpoint's arrays. Keys: classic Hugging Face names."""
    with torch.device("meta"):
        model = Llava(config)
    state = {name: torch.tensor(tensors[name], dtype=torch.float32) for name in model.state_dict()}
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)
