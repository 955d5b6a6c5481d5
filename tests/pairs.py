"""mmproj files as they were published for LLaVA, written with the gguf package from its converters' names and keys.

Not by our own writer, so that the importer and the exporter cannot share a mistake.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize

from llava_edge.models.config import CLIP_MEAN, CLIP_STD, LlavaConfig

Array = np.ndarray[Any, Any]

_ROOT = "vision_tower.vision_model."
_NAMES = (
    ("multi_modal_projector.linear_1", "mm.0"),
    ("multi_modal_projector.linear_2", "mm.2"),
    (_ROOT + "embeddings.class_embedding", "v.class_embd"),
    (_ROOT + "embeddings.patch_embedding", "v.patch_embd"),
    (_ROOT + "embeddings.position_embedding", "v.position_embd"),
    (_ROOT + "pre_layrnorm", "v.pre_ln"),
    (_ROOT + "post_layernorm", "v.post_ln"),
    (_ROOT + "encoder.layers.", "v.blk."),
    (".self_attn.out_proj", ".attn_out"),
    (".self_attn.q_proj", ".attn_q"),
    (".self_attn.k_proj", ".attn_k"),
    (".self_attn.v_proj", ".attn_v"),
    (".layer_norm", ".ln"),
)


def in_halves(tensors: Mapping[str, Array]) -> dict[str, Array]:
    """float32 that float16 holds exactly, as published checkpoints do, so that a file in float16 loses nothing."""
    return {name: value.astype(np.float16).astype(np.float32) for name, value in tensors.items()}


def gguf_name(name: str, swapped: bool) -> str:
    """The converters' replacements; the first one called fc1 `ffn_down` and fc2 `ffn_up`."""
    for source, target in (*_NAMES, (".mlp.fc1", ".ffn_down" if swapped else ".ffn_up")):
        name = name.replace(source, target)
    return name.replace(".mlp.fc2", ".ffn_up" if swapped else ".ffn_down")


def published(tensors: Mapping[str, Array], blocks: int, swapped: bool) -> dict[str, Array]:
    """CLIP's first `blocks` blocks without its last norm, and the projector, under the names of a file."""
    left_out = tuple(f"{_ROOT}encoder.layers.{n}." for n in range(blocks, 99))
    parts = ("vision_tower.", "multi_modal_projector.")
    return {
        gguf_name(name, swapped): array
        for name, array in tensors.items()
        if name.startswith(parts) and not name.startswith((*left_out, _ROOT + "post_layernorm"))
    }


def write_mmproj(
    path: Path,
    config: LlavaConfig,
    tensors: Mapping[str, Array],
    *,
    kind: str = "F16",
    fields: Mapping[str, Any] | None = None,
) -> Path:
    """Write `tensors`, matrices as `kind`. `fields`: keys below `clip.` to set, or to leave out when None."""
    v = config.vision
    writer: Any = gguf.GGUFWriter(path, "clip")
    keys: dict[str, Any] = {
        "has_text_encoder": False,
        "has_vision_encoder": True,
        "has_llava_projector": True,
        "use_gelu": False,
        "vision.image_size": v.image_size,
        "vision.patch_size": v.patch_size,
        "vision.embedding_length": v.hidden_size,
        "vision.feed_forward_length": v.intermediate_size,
        "vision.projection_dim": 768,
        "vision.attention.head_count": v.num_attention_heads,
        "vision.attention.layer_norm_epsilon": v.layer_norm_eps,
        "vision.block_count": config.vision_blocks,
        "vision.image_mean": list(CLIP_MEAN),
        "vision.image_std": list(CLIP_STD),
    }
    for key, value in (keys | dict(fields or {})).items():
        if value is not None:
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add.get(type(value), writer.add_array)(f"clip.{key}", value)
    for name, array in tensors.items():
        stored = "F32" if array.ndim == 1 else "F16" if array.ndim == 4 else kind
        if stored in ("F32", "F16"):
            writer.add_tensor(name, array.astype(np.float32 if stored == "F32" else np.float16))
        else:
            which = gguf.GGMLQuantizationType[stored]
            writer.add_tensor(name, quantize(array, which), raw_dtype=which)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
