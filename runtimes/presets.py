"""Fast or small: whether weights may be copied to be re-ordered for this processor, and why.

Knows a language file's header and this machine's memory; no engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llava_edge.errors import MemoryLimitError
from llava_edge.gguf import Gguf
from llava_edge.options import KV, Preset
from llava_edge.runtimes import devices, native

_BYTES = {"f16": 2.0, "q8_0": 34 / 32}  # of a key or value
_REORDERED = ("Q4", "IQ4")  # beginnings of the types that llama.cpp re-orders for some processor


@dataclass(frozen=True)
class Chosen:
    """copies: whether both engines may keep re-ordered, private copies of weights, which are faster to multiply."""

    name: Literal["latency", "memory"]
    reason: str

    @property
    def copies(self) -> bool:
        return self.name == "latency"


def choose(asked: Preset, header: Gguf, context: int, kv: KV, gpu_layers: int = 0) -> Chosen:
    """Resolve "auto": fast if that takes no more than half of what memory is free.

    Raises `MemoryLimitError` if what has to be private does not fit at all.
    """
    needed, copied, free = memory_bytes(header, context, kv), _copied_bytes(header), devices.available_memory()
    room = "unknown memory" if free is None else f"{free >> 20} MiB"
    if asked == "auto" and gpu_layers:
        chosen = Chosen("memory", "the accelerator has weights of its own")
    elif asked == "auto":
        small = free is not None and needed + copied > free // 2
        about = f"re-ordered weights and context may take {(needed + copied) >> 20} of {room} available"
        chosen = Chosen("memory" if small else "latency", about)
    else:
        chosen = Chosen(asked, "asked for")
    needed += copied if chosen.copies else 0
    if free is not None and needed > free:
        smaller = "--preset memory, a smaller" if chosen.copies and copied else "a smaller"
        raise MemoryLimitError(
            f"{header.path.parent} with a context of {context} needs about {needed >> 20} MiB of memory, "
            f"{room} are available. Use {smaller} --context or model."
        )
    return chosen


def memory_bytes(header: Gguf, context: int, kv: KV) -> int:
    """Keys and values of `context` positions."""
    heads = header.number("llama.attention.head_count", 1, 1024)
    kv_heads = header.metadata.get("llama.attention.head_count_kv", heads)
    width = header.metadata["llama.embedding_length"] // heads * kv_heads
    return int(2 * header.metadata["llama.block_count"] * context * width * _BYTES[kv])


def _copied_bytes(header: Gguf) -> int:
    """Weights that llama.cpp would copy: none where the native kernels are as fast on mapped ones."""
    if not native.reordering_pays(native.status(), {tensor.kind for tensor in header.tensors.values()}):
        return 0
    return sum(tensor.size for tensor in header.tensors.values() if tensor.kind.startswith(_REORDERED))
