"""A checkpoint's tensors in Hugging Face's classic layout: names, shapes, and how to save them. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from llava_edge.models.config import LlavaConfig
from llava_edge.outputs import storage_errors

Shapes = dict[str, tuple[int, ...]]

VISION_PREFIX = "vision_tower.vision_model."
TEXT_PREFIX = "language_model.model."
HEAD = "language_model.lm_head.weight"
EMBEDDINGS = TEXT_PREFIX + "embed_tokens.weight"
FINAL_NORM = TEXT_PREFIX + "norm.weight"
NEWLINE = "image_newline"  # ends each row of patches in LLaVA-1.6
_ALIGNMENT = 8  # of the values in a safetensors file


def tensor_shapes(config: LlavaConfig) -> Shapes:
    """Every tensor of a whole checkpoint, including CLIP blocks and the post_layernorm that LLaVA does not use."""
    return {**vision_shapes(config), **projector_shapes(config), **language_shapes(config)}


def vision_shapes(config: LlavaConfig) -> Shapes:
    """vision_tower.vision_model.*"""
    v = config.vision
    d, root = v.hidden_size, VISION_PREFIX
    shapes: Shapes = {
        root + "embeddings.class_embedding": (d,),
        root + "embeddings.patch_embedding.weight": (d, 3, v.patch_size, v.patch_size),
        root + "embeddings.position_embedding.weight": (v.grid**2 + 1, d),
    }
    for norm in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"{root}{norm}.weight": (d,), f"{root}{norm}.bias": (d,)}
    for n in range(v.num_hidden_layers):
        block = f"{root}encoder.layers.{n}."
        for linear in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{block}self_attn.{linear}.weight": (d, d), f"{block}self_attn.{linear}.bias": (d,)}
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{block}{norm}.weight": (d,), f"{block}{norm}.bias": (d,)}
        wide = v.intermediate_size
        shapes |= {f"{block}mlp.fc1.weight": (wide, d), f"{block}mlp.fc1.bias": (wide,)}
        shapes |= {f"{block}mlp.fc2.weight": (d, wide), f"{block}mlp.fc2.bias": (d,)}
    return shapes


def projector_shapes(config: LlavaConfig) -> Shapes:
    """multi_modal_projector.linear_N.* and, with merge "spatial_unpad", image_newline."""
    hidden = config.text.hidden_size
    shapes: Shapes = {}
    for i in range(config.projector_layers):
        root = f"multi_modal_projector.linear_{i + 1}."
        width = hidden if i else config.vision.hidden_size
        shapes |= {root + "weight": (hidden, width), root + "bias": (hidden,)}
    if config.merge == "spatial_unpad":
        shapes[NEWLINE] = (hidden,)
    return shapes


def language_shapes(config: LlavaConfig) -> Shapes:
    """language_model.*, without lm_head if it is tied."""
    t = config.text
    d, kv = t.hidden_size, t.num_key_value_heads * t.head_dim
    shapes: Shapes = {EMBEDDINGS: (t.vocab_size, d), FINAL_NORM: (d,)}
    for n in range(t.num_hidden_layers):
        block = f"{TEXT_PREFIX}layers.{n}."
        attention = {"q_proj": (d, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, d)}
        shapes |= {f"{block}self_attn.{name}.weight": shape for name, shape in attention.items()}
        wide = t.intermediate_size
        mlp = {"gate_proj": (wide, d), "up_proj": (wide, d), "down_proj": (d, wide)}
        shapes |= {f"{block}mlp.{name}.weight": shape for name, shape in mlp.items()}
        shapes |= {f"{block}{norm}.weight": (d,) for norm in ("input_layernorm", "post_attention_layernorm")}
    if not t.tie_word_embeddings:
        shapes[HEAD] = (t.vocab_size, d)
    return shapes


def save_tensors(path: Path, tensors: Mapping[str, np.ndarray], **metadata: str) -> None:
    """Write a safetensors file. Raises `StorageError` if it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    with storage_errors(path, SafetensorError):
        save_file(dict(tensors), path, {"format": "pt", **metadata})


def stream_tensors(
    path: Path, shapes: Shapes, dtype: Literal["float16", "float32"], read: Callable[[str], np.ndarray]
) -> None:
    """Write a safetensors file tensor by tensor, so that memory is needed for the largest one only.

    read: returns the tensor of a name. Raises `StorageError` if the file cannot be written.
    """
    # uint64 header length, JSON header, values
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        end = start + np.dtype(dtype).itemsize * int(np.prod(shape))
        header[name] = {"dtype": f"F{dtype[-2:]}", "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with storage_errors(path), path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            file.write(np.ascontiguousarray(read(name), dtype).data)
