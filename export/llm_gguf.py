"""The language model and its tokenizer -> a float16 GGUF that llama.cpp loads as architecture `llama`.

q and k rows are permuted (llava_edge.models.llama_gguf). Norms stay float32. A tied head is not stored; llama.cpp then
uses the embeddings. Tensors are read, converted and written one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from llava_edge.export.checkpoint import Checkpoint
from llava_edge.export.tensors import to_float16
from llava_edge.export.vocabulary import Vocabulary
from llava_edge.models.config import TextConfig
from llava_edge.models.llama_gguf import permute, permuted_heads, tensor_names


def gguf_tensor(checkpoint: Checkpoint, target: str, source: str) -> np.ndarray:
    """The float32 values of the GGUF tensor `target`."""
    array, heads = checkpoint.tensors[source], permuted_heads(target, checkpoint.config.text)
    return permute(array, heads) if heads else array


def float16_bytes(checkpoint: Checkpoint) -> int:
    """Size of the file's tensors."""
    shapes = [checkpoint.tensors.shape(source) for source in tensor_names(checkpoint.config.text).values()]
    return sum(int(np.prod(shape)) * _dtype(shape).itemsize for shape in shapes)


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
    with closing(gguf.GGUFWriter(path, "llama")) as writer:
        _write_fields(writer, c, name)
        vocabulary.write(writer)
        write_tensors(writer, checkpoint, tensor_names(c), gguf_tensor, progress)


def write_tensors(
    writer: Any,
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    values: Callable[[Checkpoint, str, str], np.ndarray],
    progress: Callable[[float], None] = lambda share: None,
) -> None:
    """Write a `gguf.GGUFWriter`'s header, fields and tensors; matrices as float16."""
    for target, source in names.items():
        shape = checkpoint.tensors.shape(source)
        dtype = _dtype(shape)
        writer.add_tensor_info(target, shape, dtype, int(np.prod(shape)) * dtype.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for done, (target, source) in enumerate(names.items()):
        writer.write_tensor_data(_as_stored(source, values(checkpoint, target, source)))
        progress((done + 1) / len(names))


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
    is_half = _dtype(array.shape) == np.float16
    return to_float16(name, array) if is_half else np.ascontiguousarray(array, np.float32)
