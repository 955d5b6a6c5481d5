"""CLIP and projector -> the `mmproj` GGUF that llama.cpp's programs use with a language file.

Matrices are float16, the rest float32. Blocks after the selected layer and CLIP's last norm are left out, since
llama.cpp would apply them. It skips the last block unless `clip.vision.feature_layer` is set, so that is written.
tests/test_interop.py lists the remaining differences between llama.cpp and LLaVA.
"""

from __future__ import annotations

import os
from contextlib import closing
from math import prod
from pathlib import Path
from typing import Any

from llava_edge import gguf as header
from llava_edge.errors import CannotCreateError, CheckpointError, LlavaEdgeError
from llava_edge.export import projector
from llava_edge.export.checkpoint import Checkpoint
from llava_edge.export.llm_gguf import write_tensors
from llava_edge.models.config import LlavaConfig
from llava_edge.models.shapes import VISION_PREFIX, tensor_shapes
from llava_edge.outputs import check_space, replacing, storage_errors, write_problem

ARCHITECTURE = "clip"

_OUTER = {
    "v.class_embd": "embeddings.class_embedding",
    "v.patch_embd.weight": "embeddings.patch_embedding.weight",
    "v.position_embd.weight": "embeddings.position_embedding.weight",
    "v.pre_ln.weight": "pre_layrnorm.weight",
    "v.pre_ln.bias": "pre_layrnorm.bias",
}
_BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.out_proj",
    "ln1": "layer_norm1",
    "ln2": "layer_norm2",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}


def tensor_names(config: LlavaConfig) -> dict[str, str]:
    """GGUF name -> classic Hugging Face name of everything up to the selected layer, and the projector."""
    names = {target: VISION_PREFIX + source for target, source in _OUTER.items()}
    for layer in range(config.vision_blocks):
        for target, source in _BLOCK.items():
            for kind in ("weight", "bias"):
                names[f"v.blk.{layer}.{target}.{kind}"] = f"{VISION_PREFIX}encoder.layers.{layer}.{source}.{kind}"
    return names | projector.tensor_names(config)


def check_mmproj(config: LlavaConfig, path: Path, force: bool) -> None:
    """Raise `CheckpointError` for a model such a file cannot express, `CannotCreateError` if `path` exists or its
    folder is not writable, `StorageError` if the disk is too full."""
    rules = {
        f"has a projector of the type {config.projector_type}": config.projector_type == "mlp2x_gelu",
        "averages neighbouring patches": config.image_pool == 1,
        "cuts pictures into tiles": config.square != "anyres",
        "keeps CLIP's class token": config.feature == "patch",
        "runs no block of CLIP": config.vision_blocks > 0,
    }
    for property, good in rules.items():
        if not good:
            raise CheckpointError(
                f"No mmproj file can be made of a model that {property}: llama.cpp would compute something else. "
                "Leave out --emit-mmproj."
            )
    if os.path.lexists(path) and not _is_picture_encoder(path):
        raise CannotCreateError(f"{path} exists and is not a picture encoder for llama.cpp; choose another name.")
    if os.path.lexists(path) and not force:
        raise CannotCreateError(f"{path} exists already; use --force to replace it, or choose another name.")
    if reason := write_problem(path.parent):  # it is written there under a temporary name
        raise CannotCreateError(f"{path} cannot be written, as its folder takes no files ({reason}).")
    shapes = tensor_shapes(config)
    weights = sum(prod(shapes[source]) for source in tensor_names(config).values())
    check_space(path.parent, 2 * weights, "A picture encoder for llama.cpp")


def _is_picture_encoder(path: Path) -> bool:
    try:
        return path.is_file() and header.read(path).architecture == ARCHITECTURE
    except LlavaEdgeError:
        return False


def write_mmproj(checkpoint: Checkpoint, path: Path, name: str) -> None:
    """Write the whole file or nothing. Raises `StorageError` if the disk fails."""
    import gguf

    names = tensor_names(checkpoint.config)
    with (
        storage_errors(path),
        replacing(path) as temporary,
        closing(gguf.GGUFWriter(temporary, ARCHITECTURE)) as writer,
    ):
        _write_fields(writer, checkpoint, name)
        write_tensors(writer, checkpoint, names, lambda _, target, source: checkpoint.tensors[source])


def _write_fields(writer: Any, checkpoint: Checkpoint, name: str) -> None:
    """Field names of llama.cpp (tools/mtmd/clip-impl.h). Without use_gelu and use_silu it uses quick-GELU."""
    import gguf

    config, (mean, std) = checkpoint.config, checkpoint.normalisation
    v = config.vision
    writer.add_type("mmproj")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_bool("clip.has_text_encoder", False)
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", False)
    writer.add_uint32("clip.vision.image_size", v.image_size)
    writer.add_uint32("clip.vision.patch_size", v.patch_size)
    writer.add_uint32("clip.vision.embedding_length", v.hidden_size)
    writer.add_uint32("clip.vision.feed_forward_length", v.intermediate_size)
    writer.add_uint32("clip.vision.projection_dim", config.text.hidden_size)
    writer.add_uint32("clip.vision.attention.head_count", v.num_attention_heads)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", v.layer_norm_eps)
    writer.add_uint32("clip.vision.block_count", config.vision_blocks)
    writer.add_array("clip.vision.feature_layer", [config.vision_blocks])
    writer.add_array("clip.vision.image_mean", list(mean))
    writer.add_array("clip.vision.image_std", list(std))
