"""Fast or small: whether weights may be copied to be re-ordered for this processor, and why.

Knows a language file's header and this machine's memory; no engine.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from llava_edge import gguf
from llava_edge.errors import MemoryLimitError, UsageError
from llava_edge.gguf import Gguf
from llava_edge.options import EngineOptions
from llava_edge.runtimes import devices, native
from llava_edge.runtimes.native import choice

CONTEXT = 4096  # LLaVA-1.5's; a longer one is opt-in because its memory grows with it
SMALL_CONTEXT = 2048  # a picture of LLaVA-1.5 and two pages of text; tiles of LLaVA-1.6 need more
# Of address space, besides what is counted: libraries and what they compute in, and for each thread its stacks in both
# engines. Refused less than that, llama.cpp, libgomp or the dynamic linker end the process. Measured on Linux with
# `smol` and the tests' model, in steps of 25 MB of `ulimit -v`.
WORKING, STACKS = 288 << 20, 32 << 20
KV_BYTES = {"f16": 2.0, "q8_0": 34 / 32}  # of a key or value
_REORDERED = ("Q4", "IQ4")  # beginnings of the types that llama.cpp re-orders for some processor


@dataclass(frozen=True)
class Chosen:
    """A preset and what it means.

    copies: both engines may keep private copies of weights that are faster to multiply. repack: llama.cpp does.
    context: positions. kv: numbers that they are kept in.
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
    trained: int,
    *,
    tiles: bool = False,
    gpu_layers: int = 0,
    tower: int = 0,
    mapped: int = 0,
) -> Chosen:
    """Resolve "auto": fast if that takes no more than half of what memory is free.

    trained: positions that the model knows. tiles: whether pictures are cut up and need many of them. tower: bytes that
    CLIP's weights take once more if they may. mapped: bytes of address space that the bundle's files and a batch's
    logits take. A draft counts too, which `check_draft` took.
    Raises `MemoryLimitError` if what has to be private does not fit at all, or all of it not into RLIMIT_AS.
    """
    small = options.preset == "memory"
    usual = SMALL_CONTEXT if small and not tiles else CONTEXT
    context = options.context or min(trained, usual)
    kv = ("q8_0" if small else "f16") if options.kv == "auto" else options.kv
    needed, free = memory_bytes(header, context, kv), devices.available_memory()
    copied = 0 if gpu_layers else _copied_bytes(header)
    if options.draft:
        draft = gguf.read(Path(options.draft))
        needed += memory_bytes(draft, min(context, draft.number("llama.context_length", 1, 1 << 24)), "f16")
        copied += _copied_bytes(draft) if copied else 0
    room = "unknown memory" if free is None else f"{free >> 20} MiB"
    chosen = Chosen("memory" if small else "latency", "asked for", context, kv, repack=copied > 0 and not small)
    if options.preset == "auto":
        most = needed + copied + tower
        tight = free is not None and most > free // 2
        about = f"re-ordered weights and context take up to {most >> 20} of {room} available"
        chosen = replace(chosen, name="memory" if tight else "latency", reason=about, repack=copied > 0 and not tight)
    needed += (copied if chosen.repack else 0) + (tower if chosen.copies else 0)
    if free is not None and needed > free:
        smaller = "--preset memory, a smaller" if chosen.repack or (tower and chosen.copies) else "a smaller"
        raise MemoryLimitError(
            f"{header.path.parent} with a context of {context} needs about {needed >> 20} MiB of memory, "
            f"{room} are available. Use {smaller} --context or model."
        )
    threads = options.threads or devices.thread_count()[0]
    _require_address_space(header, needed + mapped + WORKING + STACKS * threads)
    return chosen


def _require_address_space(header: Gguf, needed: int) -> None:
    left = devices.address_space()
    if left is not None and needed > left:
        raise MemoryLimitError(
            f"{header.path.parent} needs about {needed >> 20} MiB of address space, of which {left >> 20} MiB are left "
            "to this process (ulimit -v): raise that limit, or use a smaller --context or model."
        )


def check_context(asked: int, trained: int) -> None:
    """Raises `UsageError` if more positions are asked for than the model was trained for."""
    if asked > trained:
        raise UsageError(f"A context of {asked} was asked for, but the model was trained for at most {trained}.")


def memory_bytes(header: Gguf, context: int, kv: Literal["f16", "q8_0"]) -> int:
    """Keys and values of `context` positions."""
    return int(2 * header.metadata["llama.block_count"] * context * kv_width(header) * KV_BYTES[kv])


def kv_width(header: Gguf) -> int:
    """Numbers of a position's keys in one block, and of its values."""
    heads = header.number("llama.attention.head_count", 1, 1024)
    kv_heads: int = header.metadata.get("llama.attention.head_count_kv", heads)
    width: int = header.metadata["llama.embedding_length"]
    return width // heads * kv_heads


def _copied_bytes(header: Gguf) -> int:
    """What llama.cpp copies if it may; 0 where that does not pay: a picture and an answer take hardly longer with the
    native kernels on mapped weights, or re-ordered ones are no faster.

    With AVX2 alone, re-ordered Q4_K took 17 % more time for a prompt than mapped, 7 % less for a token, and four times
    the time to load; Q4_0 took 23 % and 14 % less (Zen 4, one thread, 7B sizes; `benchmarks/language.py`).
    """
    sizes = Counter[str]()
    for tensor in header.tensors.values():
        sizes[tensor.kind] += tensor.size
    features = devices.processor()[1]
    if "avx2" in features and "avx512f" not in features and sizes["Q4_K"] > sizes["Q4_0"] + sizes["IQ4_NL"]:
        return 0
    if not choice.should_repack(native.status(), sizes):
        return 0
    if "amx_int8" not in features:
        del sizes["Q4_1"]  # which has an order of its own there alone
    return sum(size for kind, size in sizes.items() if kind.startswith(_REORDERED))
