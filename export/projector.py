"""The projector -> projector.gguf: tensors `mm.0.weight`, `mm.0.bias`, `mm.2.weight`, ... as LLaVA numbers them.

Between two Linears is a GELU in its exact erf form (index 1, 3, ... of LLaVA's nn.Sequential, without weights).
LLaVA-1.6's `image_newline`, an embedding like the projector's outputs, is included. They are a separate file because
llama.cpp refuses a language file with extra tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import numpy as np

from llava_edge.models.config import LlavaConfig
from llava_edge.models.shapes import NEWLINE
from llava_edge.runtimes.projector import ARCHITECTURE


def tensor_names(config: LlavaConfig) -> dict[str, str]:
    """GGUF name -> checkpoint name."""
    names = {
        f"mm.{2 * layer}.{kind}": f"multi_modal_projector.linear_{layer + 1}.{kind}"
        for layer in range(config.projector_layers)
        for kind in ("weight", "bias")
    }
    return names | ({NEWLINE: NEWLINE} if config.merge == "spatial_unpad" else {})


def write_projector(config: LlavaConfig, tensors: Mapping[str, np.ndarray], path: Path, name: str) -> str:
    """Write the file; returns the precision of its weights: "f16" if that is lossless, else "f32".

    The projector is small, and its error would add to all others.
    """
    import gguf

    sources = tensor_names(config)
    lossless = all(_fits_float16(tensors[source]) for name, source in sources.items() if name.endswith(".weight"))
    with closing(gguf.GGUFWriter(path, ARCHITECTURE)) as writer:
        writer.add_name(name)
        writer.add_string(f"{ARCHITECTURE}.type", config.projector_type)
        writer.add_uint32(f"{ARCHITECTURE}.input_length", config.vision.hidden_size)
        writer.add_uint32(f"{ARCHITECTURE}.output_length", config.text.hidden_size)
        for target, source in sources.items():
            tensor = tensors[source]
            writer.add_tensor(target, tensor.astype(np.float16) if lossless and target.endswith(".weight") else tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return "f16" if lossless else "f32"


def _fits_float16(tensor: np.ndarray) -> bool:
    """Whether float16 holds all values exactly, as for a checkpoint in float16."""
    with np.errstate(over="ignore"):
        return bool((tensor.astype(np.float16) == tensor).all())
