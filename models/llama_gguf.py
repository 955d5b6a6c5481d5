"""LLaMA's tensors in a GGUF: names, row order, values as float32. Imports no torch.

llama.cpp's rotary embedding pairs neighbouring rows of a head, Hugging Face's pairs its two halves, so the rows of q
and k are permuted. Only in the language model: CLIP has no rotary embedding.
"""

from __future__ import annotations

from math import prod

import numpy as np

from llava_edge.errors import BundleError
from llava_edge.gguf import Gguf
from llava_edge.models.config import TextConfig
from llava_edge.models.shapes import EMBEDDINGS, FINAL_NORM, HEAD, TEXT_PREFIX

BLOCK_VALUES = 1 << 18  # dequantized at a time: 1 MB in float32, which stays in a core's cache
BLOCK_TENSORS = {
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
    """GGUF name -> classic Hugging Face name of exactly the tensors llama.cpp expects; it refuses a file with more."""
    names = {"token_embd.weight": EMBEDDINGS, "output_norm.weight": FINAL_NORM}
    if not c.tie_word_embeddings:
        names["output.weight"] = HEAD
    for layer in range(c.num_hidden_layers):
        for target, source in BLOCK_TENSORS.items():
            names[f"blk.{layer}.{target}.weight"] = f"{TEXT_PREFIX}layers.{layer}.{source}.weight"
    return names


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k projection (heads * head_dim, in) from Hugging Face's order to llama.cpp's."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `permute`."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def permuted_heads(name: str, c: TextConfig) -> int:
    """Number of heads within which a tensor's rows are permuted; 0 if they are not."""
    return {"attn_q": c.num_attention_heads, "attn_k": c.num_key_value_heads}.get(name.split(".")[-2], 0)


def read_language_tensor(file: Gguf, name: str, c: TextConfig) -> np.ndarray:
    """Read one tensor of a language model as float32, in Hugging Face's row order."""
    array, heads = read_tensor(file, name), permuted_heads(name, c)
    return unpermute(array, heads) if heads else array


def read_tensor(file: Gguf, name: str) -> np.ndarray:
    """Read and dequantize one tensor to float32. Raises `BundleError` for a type the gguf package cannot read."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    tensor = file.tensors[name]
    width = tensor.shape[-1]
    rows = np.memmap(file.path, np.uint8, "r", tensor.offset, tensor.size).reshape(prod(tensor.shape[:-1]), -1)
    array, count = np.empty((len(rows), width), np.float32), max(1, BLOCK_VALUES // width)
    try:
        for start in range(0, len(rows), count):
            part = slice(start, start + count)
            array[part] = dequantize(rows[part], GGMLQuantizationType[tensor.kind])
    except NotImplementedError as error:
        raise BundleError(f"{file.path} stores {name} as {tensor.kind}, which cannot be read here.") from error
    return array.reshape(tensor.shape)
