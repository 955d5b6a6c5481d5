"""The projector -> projector.gguf: tensors `mm.0.weight`, `mm.0.bias`, `mm.2.weight`, ... as LLaVA numbers them.

Between two Linears stands a GELU in its exact erf form (index 1, 3, ... of LLaVA's nn.Sequential, which has no
weights). LLaVA-1.6's `image_newline`, an embedding like those the projector makes, comes along. They have a file of
their own because llama.cpp refuses a language file with extra tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from llava_edge.models.config import LlavaConfig

ARCHITECTURE = "llava-projector"


def tensor_names(config: LlavaConfig) -> dict[str, str]:
    """GGUF name -> checkpoint name."""
    names = {
        f"mm.{2 * layer}.{kind}": f"multi_modal_projector.linear_{layer + 1}.{kind}"
        for layer in range(config.projector_layers)
        for kind in ("weight", "bias")
    }
    return names | ({"image_newline": "image_newline"} if config.merge == "spatial_unpad" else {})


def write_projector(config: LlavaConfig, tensors: Mapping[str, np.ndarray], path: Path, name: str) -> None:
    """Write the file; everything is float32: the projector is small and its error would come on top of all others."""
    import gguf

    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_name(name)
    writer.add_string(f"{ARCHITECTURE}.type", config.projector_type)
    writer.add_uint32(f"{ARCHITECTURE}.input_length", config.vision.hidden_size)
    writer.add_uint32(f"{ARCHITECTURE}.output_length", config.text.hidden_size)
    for target, source in tensor_names(config).items():
        writer.add_tensor(target, tensors[source])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
