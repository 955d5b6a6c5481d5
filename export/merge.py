"""Merges LoRA adapters and deltas into their base model, one tensor at a time, when it is read.

LoRA     W + scale * B A; tensors stored whole replace the base's (non_lora_trainables.bin: the projector)
delta    base + difference, in float16 as llava/model/apply_delta.py adds; the base may have fewer rows
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llava_edge.errors import CheckpointError, MissingError
from llava_edge.export.names import classic_name, is_buffer
from llava_edge.export.tensors import StoredTensor, open_file, read_json
from llava_edge.models.shapes import EMBEDDINGS, HEAD

Stored = dict[str, StoredTensor]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
NON_LORA = "non_lora_trainables.bin"  # llava/train/train.py

_BASE_UNCHANGED = ("gaussian", "eva", "orthogonal")  # values of init_lora_weights besides true and false

_UNSUPPORTED = (  # settings of peft under which W + scale * B A is not the adapted weight
    *("use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias", "layer_replication"),
    *("alora_invocation_tokens", "trainable_token_indices"),
)

_LORA = re.compile(r"^(.*)\.lora_(A|B)(?:\.default)?\.weight$")


def rename_tensors(folder: Path, stored: Mapping[str, StoredTensor]) -> Stored:
    """Tensors under classic names. Raises `CheckpointError` if two naming schemes meet in one folder."""
    renamed: Stored = {}
    for raw_name, tensor in stored.items():
        name = classic_name(raw_name)
        if is_buffer(name):
            continue
        if name in renamed:
            raise CheckpointError(f"{folder} holds {name} twice, under two naming schemes; it mixes two checkpoints.")
        renamed[name] = tensor
    return renamed


def merge_adapter(folder: Path, base: Stored) -> Stored:
    """`base` with the adapter in `folder` merged. Raises `MissingError` or `CheckpointError`."""
    scale, rank = _scale_and_rank(folder / ADAPTER_CONFIG)
    pairs: dict[str, dict[str, StoredTensor]] = {}
    merged = dict(base)
    for name, tensor in _open_adapter(folder).items():
        match = _LORA.match(name)
        if not match:
            merged[classic_name(_strip_prefixes(name))] = tensor
            continue
        pairs.setdefault(classic_name(_strip_prefixes(match[1] + ".weight")), {})[match[2]] = tensor
    if (folder / NON_LORA).is_file():
        full_tensors = {_strip_prefixes(name): tensor for name, tensor in open_file(folder / NON_LORA).items()}
        merged |= rename_tensors(folder, full_tensors)
    for name, pair in pairs.items():
        merged[name] = _merged_tensor(folder, name, merged.get(name), pair, scale, rank)
    return merged


def _open_adapter(folder: Path) -> Stored:
    for name in ADAPTERS:
        if (folder / name).is_file():
            return open_file(folder / name)
    raise MissingError(f"{folder} has {ADAPTER_CONFIG} but no weights; expected {' or '.join(ADAPTERS)}.")


def _scale_and_rank(path: Path) -> tuple[float, int]:
    """alpha / r, or alpha / sqrt(r) for rank-stabilised adapters, and r. Adapters of other formulas are refused."""
    raw = read_json(path)
    kind = str(raw.get("peft_type", "LORA")).upper()
    unsupported = [key for key in _UNSUPPORTED if raw.get(key)]
    if kind != "LORA" or unsupported:
        unsupported_kind = f"{kind} adapters" if kind != "LORA" else f"adapters with {unsupported[0]}"
        raise CheckpointError(
            f"{path}: {unsupported_kind} are not supported, only plain LoRA. Merge it with peft and export the result."
        )
    initial = raw.get("init_lora_weights", True)
    if not isinstance(initial, bool) and initial not in _BASE_UNCHANGED:
        raise CheckpointError(
            f"{path}: adapters that begin as {initial!r} change the base's weights, which are not here. "
            "Convert it with peft's path_initial_model_for_weight_conversion, or merge it with peft and export that."
        )
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise CheckpointError(f"{path} should give r and lora_alpha as numbers, has {rank!r} and {alpha!r}.")
    return float(alpha) / (math.sqrt(rank) if raw.get("use_rslora") else rank), rank


def _strip_prefixes(name: str) -> str:
    """Strip what peft's wrappers put into names, and the extra prefix of LLaVA's trainer (llava/model/builder.py)."""
    name = re.sub(r"^base_model\.(model\.)?", "", name).replace(".base_layer.", ".")
    return re.sub(r"^model\.model\.", "model.", name)


def _merged_tensor(
    folder: Path, name: str, base: StoredTensor | None, pair: Mapping[str, StoredTensor], scale: float, rank: int
) -> StoredTensor:
    if base is None:
        raise CheckpointError(f"{folder} adapts {name}, which the base model does not have; is it the right base?")
    if pair.keys() != {"A", "B"}:
        raise CheckpointError(f"{folder} has only one of the two matrices that adapt {name}; it is incomplete.")
    a, b = pair["A"], pair["B"]
    if (b.shape[0], a.shape[-1]) != base.shape or b.shape[-1] != a.shape[0]:
        raise CheckpointError(
            f"{folder} adapts {name} with {b.shape} times {a.shape}, the base has {base.shape}; is it the right base?"
        )
    if a.shape[0] != rank:  # its scale would be wrong
        raise CheckpointError(
            f"{folder} adapts {name} with rank {a.shape[0]}, but its {ADAPTER_CONFIG} says {rank}; "
            "they are of two adapters."
        )

    def read() -> np.ndarray[Any, Any]:
        merged: np.ndarray[Any, Any] = base.read() + scale * (b.read() @ a.read())
        return merged

    return StoredTensor(base.shape, read)


def merge_delta(folder: Path, delta: Stored, base: Stored) -> Stored:
    """`delta` added to `base`. Tensors that only the delta has (the projector) are taken unchanged."""
    missing = sorted(base.keys() - delta.keys())
    if missing:
        raise CheckpointError(f"{folder} has no difference for {missing[0]} ({len(missing)} in all); is it a delta?")
    return {
        name: _sum_tensor(folder, name, tensor, base[name]) if name in base else tensor
        for name, tensor in delta.items()
    }


def _sum_tensor(folder: Path, name: str, delta: StoredTensor, base: StoredTensor) -> StoredTensor:
    rows = base.shape[0]
    has_added_rows = name in (EMBEDDINGS, HEAD) and delta.shape[0] >= rows and delta.shape[1:] == base.shape[1:]
    if delta.shape != base.shape and not has_added_rows:
        raise CheckpointError(f"{folder}: {name} is {delta.shape}, the base has {base.shape}; is it the right base?")

    def read() -> np.ndarray[Any, Any]:
        total = delta.read().astype(np.float16)
        total[:rows] += base.read().astype(np.float16)
        return total.astype(np.float32)

    return StoredTensor(delta.shape, read)
