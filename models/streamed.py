"""Run a checkpoint in PyTorch with one part in memory at a time: the reference for models larger than memory.

Uses the modules of `clip.py`, `projector.py` and `llama.py`, each loaded when it is needed. `tensors` is any mapping
from classic names to float32 arrays that reads lazily, such as the exporter's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from llava_edge.models import anyres
from llava_edge.models.clip import VisionTower
from llava_edge.models.config import LlavaConfig
from llava_edge.models.llama import Block, Context, RMSNorm, rotary
from llava_edge.models.projector import Projector
from llava_edge.models.shapes import EMBEDDINGS, FINAL_NORM, HEAD, NEWLINE, TEXT_PREFIX, VISION_PREFIX
from llava_edge.prompt import IMAGE_TOKEN_INDEX

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]
Module = TypeVar("Module", bound=nn.Module)


def _tensor(array: Array) -> Tensor:
    """Wrap an array; copy it only if it is read-only, which torch cannot represent."""
    return torch.from_numpy(np.require(array, None, "W"))


def load_part(build: Callable[[], Module], tensors: Arrays, prefix: str) -> Module:
    """Build a frozen module from the tensors named `prefix` + its own parameter names."""
    with torch.device("meta"):
        module = build()
    state = {name: _tensor(tensors[prefix + name]) for name in module.state_dict()}
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)


@torch.no_grad()
def image_features(config: LlavaConfig, tensors: Arrays, pixels: Iterable[Array]) -> list[Array]:
    """Pixels (crops, 3, S, S) of each picture -> CLIP features (crops, tokens, vision width)."""
    tower = load_part(lambda: VisionTower(config), tensors, VISION_PREFIX)
    return [torch.cat([tower(crop[None]) for crop in torch.from_numpy(item)]).numpy() for item in pixels]


@torch.no_grad()
def image_features_with_attention(
    config: LlavaConfig, tensors: Arrays, pixels: Iterable[Array]
) -> tuple[list[Array], list[Array]]:
    """The same, and the class token's attention (crops, tokens) for each picture."""
    tower = load_part(lambda: VisionTower(config), tensors, VISION_PREFIX)
    outputs = [[tower.forward_with_attention(crop[None]) for crop in torch.from_numpy(item)] for item in pixels]
    features, attention = ([torch.cat([pair[n] for pair in pairs]).numpy() for pairs in outputs] for n in (0, 1))
    return features, attention


@torch.no_grad()
def project(config: LlavaConfig, tensors: Arrays, features: Sequence[Array]) -> list[Array]:
    """CLIP features of each picture -> embeddings (crops, tokens, hidden size)."""
    projector = load_part(lambda: Projector(config), tensors, "multi_modal_projector.")
    return [projector(torch.from_numpy(item)).numpy() for item in features]


@torch.no_grad()
def arrange(
    config: LlavaConfig, tensors: Arrays, embeds: Sequence[Array], sizes: Sequence[tuple[int, int]]
) -> list[Array]:
    """Embeddings of each picture's crops -> (positions, hidden size). sizes: (width, height) of the pictures."""
    if config.square != "anyres":
        return [item[0] for item in embeds]
    newline = _tensor(tensors[NEWLINE]) if config.merge == "spatial_unpad" else None
    return [
        anyres.arrange(torch.from_numpy(item), newline, config, size).numpy()
        for item, size in zip(embeds, sizes, strict=True)
    ]


def splice(tensors: Arrays, ids: Sequence[int], images: Sequence[Array]) -> Array:
    """Embeddings (T, hidden size) of ids, each IMAGE_TOKEN_INDEX replaced by one of `images`, (positions, hidden size).

    Raises `ValueError` if their numbers differ.
    """
    tokens = np.asarray(ids, np.int64)
    slots = np.flatnonzero(tokens == IMAGE_TOKEN_INDEX)
    text = tensors[EMBEDDINGS][np.delete(tokens, slots)]
    first, *others = np.split(text, slots - np.arange(len(slots)))
    return np.concatenate([first, *chain.from_iterable(zip(images, others, strict=True))])


@torch.no_grad()
def logits(
    config: LlavaConfig,
    tensors: Arrays,
    embeds: Array,
    start: int = 0,
    progress: Callable[[float], None] = lambda share: None,
) -> Array:
    """Embeddings (T, hidden size) -> logits (T - start, vocab) of the positions from `start` on."""
    text = config.text
    states: Tensor = torch.from_numpy(embeds)[None]
    cos, sin = rotary(torch.arange(len(embeds))[None], text.head_dim, text.rope_theta)
    for number in range(text.num_hidden_layers):
        states = _run_block(config, tensors, number, states, Context(cos, sin, None))
        progress((number + 1) / text.num_hidden_layers)
    norm = load_part(lambda: RMSNorm(text.hidden_size, text.rms_norm_eps), tensors, FINAL_NORM.removesuffix("weight"))
    head = EMBEDDINGS if text.tie_word_embeddings else HEAD
    weights = _tensor(tensors[head])
    return np.asarray((norm(states)[0, start:] @ weights.T).numpy())


def _run_block(config: LlavaConfig, tensors: Arrays, number: int, states: Tensor, context: Context) -> Tensor:
    """Load and run one block; its weights are freed on return."""
    block = load_part(lambda: Block(config.text), tensors, f"{TEXT_PREFIX}layers.{number}.")
    out: Tensor = block(states, context)
    return out
