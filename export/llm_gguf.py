"""The language model and its tokenizer -> a float16 GGUF that llama.cpp loads as architecture `llama`.

q and k rows are permuted: llama.cpp rotates neighbouring rows, Hugging Face the two halves of a head. Norms stay
float32. A tied head is not stored; llama.cpp then uses the embeddings. Tensors are read, converted and written
one at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llava_edge.errors import CheckpointError
from llava_edge.export.checkpoint import Checkpoint
from llava_edge.export.names import EMBEDDINGS, HEAD, TEXT_PREFIX
from llava_edge.export.tokenizer import Vocabulary
from llava_edge.models.config import TextConfig

_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def tensor_names(c: TextConfig) -> dict[str, str]:
    """GGUF name -> checkpoint name; exactly what llama.cpp creates, for it refuses a file with more."""
    names = {"token_embd.weight": EMBEDDINGS, "output_norm.weight": TEXT_PREFIX + "norm.weight"}
    if not c.tie_word_embeddings:
        names["output.weight"] = HEAD
    for layer in range(c.num_hidden_layers):
        for target, source in _BLOCK.items():
            names[f"blk.{layer}.{target}.weight"] = f"{TEXT_PREFIX}layers.{layer}.{source}.weight"
    return names


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k projection (heads * head_dim, in) from Hugging Face's order to llama.cpp's."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def gguf_tensor(checkpoint: Checkpoint, target: str, source: str) -> np.ndarray:
    """The float32 values that belong under the GGUF name `target`."""
    c = checkpoint.config.text
    array = checkpoint.tensors[source]
    if target.endswith("attn_q.weight"):
        return permute(array, c.num_attention_heads)
    if target.endswith("attn_k.weight"):
        return permute(array, c.num_key_value_heads)
    return array


def write_language(
    checkpoint: Checkpoint,
    vocabulary: Vocabulary,
    path: Path,
    name: str,
    progress: Callable[[float], None] = lambda share: None,
) -> None:
    """Write the float16 file. Raises `CheckpointError` for a weight that float16 cannot hold."""
    import gguf

    c = checkpoint.config.text
    writer = gguf.GGUFWriter(path, "llama")
    try:
        _write_fields(writer, c, name)
        vocabulary.write(writer)
        names = tensor_names(c)
        for target, source in names.items():
            shape = checkpoint.tensors.shape(source)
            dtype = _dtype(shape)
            writer.add_tensor_info(target, shape, dtype, int(np.prod(shape)) * dtype.itemsize)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, (target, source) in enumerate(names.items()):
            writer.write_tensor_data(_as_stored(source, gguf_tensor(checkpoint, target, source)))
            progress((done + 1) / len(names))
    finally:
        writer.close()


def _write_fields(writer: Any, c: TextConfig, name: str) -> None:
    import gguf

    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)


def _dtype(shape: tuple[int, ...]) -> np.dtype[np.floating]:
    return np.dtype(np.float32) if len(shape) == 1 else np.dtype(np.float16)


def _as_stored(name: str, array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(array, _dtype(array.shape))
    if not np.isfinite(stored).all():
        largest = float(np.abs(array).max())
        raise CheckpointError(f"The tensor {name} reaches {largest:.3g}, more than float16 can hold (65504).")
    return stored
