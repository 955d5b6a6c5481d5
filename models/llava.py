"""LLaVA's parts, CLIP tower, projector and LLaMA, as one module to be trained. A checkpoint is run by `streamed`.

State dict names are Hugging Face's classic ones (`vision_tower.vision_model.`, `multi_modal_projector.`,
`language_model.`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llava_edge.errors import CheckpointError
from llava_edge.models.clip import VisionTower
from llava_edge.models.config import LlavaConfig
from llava_edge.models.llama import Llama
from llava_edge.models.projector import Projector


class _Tower(nn.Module):
    """Only here to give the tower its Hugging Face name."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.vision_model = VisionTower(config)


class Llava(nn.Module):
    """All of them."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = _Tower(config)
        self.multi_modal_projector = Projector(config)
        self.language_model = Llama(config.text)


def from_state(config: LlavaConfig, tensors: Mapping[str, Any]) -> Llava:
    """Build in float32 from tensors or arrays under classic Hugging Face names; unused ones (later CLIP blocks,
    post_layernorm) are ignored. Raises `CheckpointError` listing everything missing or misshapen."""
    with torch.device("meta"):
        model = Llava(config)
    state, wrong = {}, []
    for name, parameter in model.state_dict().items():
        if name not in tensors:
            wrong.append(f"{name} missing")
            continue
        given = tensors[name]
        # A copy: arrays read from files may be read-only, which torch cannot represent.
        tensor = (given if isinstance(given, Tensor) else torch.tensor(given)).to(torch.float32)
        if tensor.shape != parameter.shape:
            wrong.append(f"{name} is {tuple(tensor.shape)}, expected {tuple(parameter.shape)}")
        state[name] = tensor
    if wrong:
        raise CheckpointError(f"The checkpoint does not fit its config: {'; '.join(wrong[:20])} ({len(wrong)} in all).")
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)
