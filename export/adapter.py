"""Low-rank updates (LoRA) of a language model -> adapter.gguf, which llama.cpp applies at run time:

    y = W x + B (A x)         A (rank, in), B (out, rank), in float16; the factor alpha / rank is folded into B

So a public 4-bit file stays unchanged, byte for byte. Merging a small update and quantizing the sum again loses more
than it saves: of 50 fine grocery names, 39 of which the default model gets right in float32, it then got 4 fewer right
(Q4_K_M, with or without an importance matrix), with the adapter 1 fewer.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava_edge import gguf as header
from llava_edge.errors import CheckpointError
from llava_edge.export.checkpoint import Checkpoint, LanguageFile
from llava_edge.export.verify import relative_error
from llava_edge.models.config import TextConfig
from llava_edge.models.llama_gguf import permute, permuted_heads, read_language_tensor, tensor_names, unpermute

Array = np.ndarray[Any, Any]

SUM_LIMIT = 1e-3  # relative error of base + update from rounding A and B to float16


@dataclass(frozen=True)
class LowRank:
    """A finished language file and updates of its weights.

    updates: (A, B) by classic Hugging Face name without `.weight`, with every factor folded in.
    """

    base: LanguageFile
    updates: Mapping[str, tuple[Array, Array]]


def write_adapter(low_rank: LowRank, config: TextConfig, path: Path, name: str) -> None:
    """Write the file in the format of llama.cpp's converter (convert_lora_to_gguf.py)."""
    import gguf

    targets = {source.removesuffix(".weight"): target for target, source in tensor_names(config).items()}
    with closing(gguf.GGUFWriter(path, "llama")) as writer:
        writer.add_type("adapter")
        writer.add_name(name)
        writer.add_string("adapter.type", "lora")
        # llama.cpp scales by alpha / rank, or by 1 if alpha is 0.
        writer.add_float32("adapter.lora.alpha", 0.0)
        for source, (a, b) in low_rank.updates.items():
            heads = permuted_heads(targets[source], config)
            writer.add_tensor(f"{targets[source]}.lora_a", np.ascontiguousarray(a, np.float16))
            rows = permute(b, heads) if heads else b
            writer.add_tensor(f"{targets[source]}.lora_b", np.ascontiguousarray(rows, np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def read_back_adapter(language: Path, adapter: Path, checkpoint: Checkpoint) -> None:
    """Compare base + update with every tensor of the checkpoint. Raises `CheckpointError` naming one that differs."""
    base, update = header.read(language), header.read(adapter)
    header.check_language(base)
    header.check_adapter(update, base)
    for target, source in tensor_names(checkpoint.config.text).items():
        heads = permuted_heads(target, checkpoint.config.text)
        tensor = read_language_tensor(base, target, checkpoint.config.text)
        if f"{target}.lora_a" in update.tensors:
            change = update.array(f"{target}.lora_b").astype(np.float32) @ update.array(f"{target}.lora_a")
            tensor = tensor + (unpermute(change, heads) if heads else change)
        error = relative_error(tensor, checkpoint.tensors[source])
        if error > SUM_LIMIT:
            raise CheckpointError(
                f"{adapter} and {language} together do not give the checkpoint's {source}: off by {error:.2g} "
                f"(relative), at most {SUM_LIMIT:g} is possible."
            )
