"""Presets, latency or memory: whether weights may be copied and repacked for this processor, and why.

Knows the header of a language file and this machine's memory; uses no engine.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llava_edge import gguf
from llava_edge.errors import MemoryLimitError, UsageError
from llava_edge.gguf import Gguf
from llava_edge.options import EngineOptions
from llava_edge.runtimes import machine, native
from llava_edge.runtimes.native import choice

CONTEXT = 4096  # LLaVA-1.5's; a longer one is opt-in because its memory grows with it
SMALL_CONTEXT = 2048  # a picture of LLaVA-1.5 and two pages of text; tiles of LLaVA-1.6 need more
# Address space that comes on top: libraries and working memory, and for each thread its stacks in both engines. With
# less, llama.cpp, libgomp or the dynamic linker end the process. Measured on Linux with `smol` and the tests' model, in
# steps of 25 MB of `ulimit -v`.
WORKING_BYTES, STACK_BYTES = 288 << 20, 32 << 20
KV_BYTES = {"f16": 2.0, "q8_0": 34 / 32}  # of a key or value
_REPACKED = ("Q4", "IQ4")  # prefixes of the types that llama.cpp repacks for some processor


@dataclass(frozen=True)
class Preset:
    """A preset and what it implies.

    copies: both engines may keep private copies of weights that are faster to multiply. repack: llama.cpp does so.
    context: size in positions. kv: type of the KV cache.
    """

    name: Literal["latency", "memory"]
    reason: str
    context: int = CONTEXT
    kv: Literal["f16", "q8_0"] = "f16"
    repack: bool = False

    @property
    def copies(self) -> bool:
        return self.name == "latency"


def choose(
    options: EngineOptions,
    header: Gguf,
    trained_context: int,
    *,
    tiles: bool = False,
    gpu_layers: int = 0,
    vision_copy_bytes: int = 0,
    mapped_bytes: int = 0,
) -> Preset:
    """Resolve "auto": latency if that takes no more than half of the free memory.

    trained_context: in positions. tiles: whether pictures are cut into tiles and need many positions.
    vision_copy_bytes: of a copy of CLIP's weights, if copies are allowed. mapped_bytes: address space of the bundle's
    files and a batch's logits. A draft model, which passed `check_draft`, counts too.
    Raises `MemoryLimitError` if private memory does not fit into free memory, or everything into RLIMIT_AS.
    """
    small = options.preset == "memory"
    default = SMALL_CONTEXT if small and not tiles else CONTEXT
    context = options.context or min(trained_context, default)
    kv = ("q8_0" if small else "f16") if options.kv == "auto" else options.kv
    needed, free = memory_bytes(header, context, kv), machine.available_memory()
    repacked = 0 if gpu_layers else _repacked_bytes(header)
    if options.draft:
        draft = gguf.read(Path(options.draft))
        needed += memory_bytes(draft, min(context, draft.number("llama.context_length")), "f16")
        repacked += _repacked_bytes(draft) if repacked else 0
    available = "unknown memory" if free is None else f"{free >> 20} MiB"
    if options.preset == "auto":
        most = needed + repacked + vision_copy_bytes
        name: Literal["latency", "memory"] = "memory" if free is not None and most > free // 2 else "latency"
        reason = f"repacked weights and context take up to {most >> 20} of {available} available"
    else:
        name, reason = options.preset, "asked for"
    preset = Preset(name, reason, context, kv, repack=repacked > 0 and name == "latency")
    copied = repacked + vision_copy_bytes if preset.copies else 0
    needed += copied
    if free is not None and needed > free:
        smaller = "--preset memory, a smaller" if copied else "a smaller"
        raise MemoryLimitError(
            f"{header.path.parent} with a context of {context} needs about {needed >> 20} MiB of memory, "
            f"but {available} are available. Use {smaller} --context or model."
        )
    threads = options.threads or machine.thread_count()[0]
    _require_address_space(header, needed + mapped_bytes + WORKING_BYTES + STACK_BYTES * threads)
    return preset


def _require_address_space(header: Gguf, needed: int) -> None:
    left = machine.address_space()
    if left is not None and needed > left:
        raise MemoryLimitError(
            f"{header.path.parent} needs about {needed >> 20} MiB of address space, but only {left >> 20} MiB are left "
            "to this process (ulimit -v): raise that limit, or use a smaller --context or model."
        )


def check_context(context: int, trained_context: int) -> None:
    """Raise `UsageError` if a context is larger than the model was trained for."""
    if context > trained_context:
        raise UsageError(
            f"A context of {context} was requested, but the model was trained for at most {trained_context}."
        )


def memory_bytes(header: Gguf, context: int, kv: Literal["f16", "q8_0"]) -> int:
    """Return the size of the KV cache for `context` positions."""
    return int(2 * header.metadata["llama.block_count"] * context * kv_width(header) * KV_BYTES[kv])


def kv_width(header: Gguf) -> int:
    """Return the width of a position's keys, and of its values, in one block."""
    heads = header.number("llama.attention.head_count")
    kv_heads: int = header.metadata.get("llama.attention.head_count_kv", heads)
    width: int = header.metadata["llama.embedding_length"]
    return width // heads * kv_heads


def _repacked_bytes(header: Gguf) -> int:
    """Return the bytes of weights that llama.cpp would copy and repack; 0 where that does not pay off: the native
    kernels on mapped weights take hardly longer for a picture and an answer, or repacked weights are no faster.

    With AVX2 alone, repacked Q4_K took 17 % more time for a prompt than mapped, 7 % less for a token, and four times
    the time to load; Q4_0 took 23 % and 14 % less (Zen 4, one thread, 7B sizes; `benchmarks/language.py`).
    """
    sizes = Counter[str]()
    for tensor in header.tensors.values():
        sizes[tensor.kind] += tensor.size
    features = machine.processor()[1]
    if "avx2" in features and "avx512f" not in features and sizes["Q4_K"] > sizes["Q4_0"] + sizes["IQ4_NL"]:
        return 0
    if not choice.should_repack(native.status(), sizes):
        return 0
    if "amx_int8" not in features:
        del sizes["Q4_1"]  # repacked only for AMX
    return sum(size for kind, size in sizes.items() if kind.startswith(_REPACKED))
