"""Which layout a checkpoint folder has, seen from its content, and its parts brought together.

    huggingface  config.json with text_config and vision_config; classic, >= 4.52 and v5 names
    original     haotian-liu/LLaVA, merged; CLIP inside or in a folder of its own (--vision-tower)
    lora         adapter_config.json and adapter_model.*; with non_lora_trainables.bin for the projector (--base)
    projector    mm_projector.bin alone (--base)
    delta        differences to LLaMA, as the first releases (--base)

Names of folders are never looked at. What is missing is named together with the option that brings it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llava_edge.errors import CheckpointError, MissingError, UsageError
from llava_edge.export import merge, original
from llava_edge.export.merge import Stored
from llava_edge.export.tensors import has_weights, open_file, open_folder, read_json
from llava_edge.models.shapes import FINAL_NORM, NEWLINE, VISION_PREFIX

Layout = Literal["huggingface", "original", "lora", "projector", "delta", "language model", "gguf pair"]

PROJECTOR_FILE = "mm_projector.bin"  # llava/train/llava_trainer.py
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")

# A LLaMA's final norm has a mean absolute weight above 1; the difference of two fine-tunes has hundredths.
_DELTA_NORM = 0.2


@dataclass(frozen=True)
class Source:
    """A checkpoint in one form, whatever its layout. `raw` is config.json as Hugging Face would write it."""

    layout: Layout
    config_path: Path
    raw: dict[str, Any]
    stored: Stored  # under classic names
    tokenizer: Path  # the folder that has it
    processors: tuple[Path, ...]  # folders that may say how pixels are normalised, the first one first
    notes: tuple[str, ...] = ()  # what was decided without being asked, one sentence each
    guessed: bool = False  # whether the prompt layout is, and a chat template beside it is the LLaVA's own


def recognise(folder: Path) -> Layout:
    """The layout by the files in `folder`, their config.json and, for deltas, one small tensor."""
    if not folder.is_dir():
        raise MissingError(f"{folder} is not a folder; a LLaVA checkpoint folder was expected.")
    if (folder / merge.ADAPTER_CONFIG).is_file():
        return "lora"
    if not (folder / "config.json").is_file():
        raise MissingError(f"{folder} has no config.json; a LLaVA checkpoint folder was expected.")
    if not has_weights(folder) and (folder / PROJECTOR_FILE).is_file():
        return "projector"
    raw = read_json(folder / "config.json")
    if "text_config" in raw or "vision_config" in raw:
        return "huggingface"
    return _by_weights(folder, raw)


def _by_weights(folder: Path, raw: Mapping[str, Any]) -> Layout:
    stored = merge.classic(folder, open_folder(folder))
    norm = stored.get(FINAL_NORM)
    projects = any(name.startswith("multi_modal_projector.") for name in stored)
    if norm is not None and projects and float(np.abs(norm.read()).mean()) < _DELTA_NORM:
        return "delta"
    if projects or original.is_original(raw):
        return "original"
    if norm is not None:
        return "language model"
    raise CheckpointError(
        f"{folder} holds neither a LLaVA nor a part of one: its config.json has no vision_config or mm_vision_tower."
    )


def read(folder: Path, base: Path | None = None, vision_tower: Path | None = None) -> Source:
    """Bring everything together. Raises `MissingError`, `UsageError` or `CheckpointError`; reads no large tensor."""
    layout = recognise(folder)
    if layout == "language model":
        raise CheckpointError(f"{folder} is a language model without a projector; it can only be a LLaVA's --base.")
    if base and layout in ("huggingface", "original"):
        raise UsageError(f"{folder} is a whole model ({layout} layout) and needs no --base.")
    if not base and layout in ("lora", "projector", "delta"):
        raise UsageError(f"{_NEEDS[layout].format(folder=folder)} Pass {_BASE[layout]} with --base FOLDER.")
    if layout == "huggingface":
        return _huggingface(folder, vision_tower)
    if layout == "original":
        return _original(
            folder, merge.classic(folder, open_folder(folder)), "original", folder, (folder,), vision_tower
        )
    assert base is not None
    return _on_base(folder, layout, base, vision_tower)


_NEEDS = {
    "lora": "{folder} holds low-rank changes (LoRA), not a whole model.",
    "projector": "{folder} holds a projector only.",
    "delta": "{folder} holds differences to another model, not weights.",
}
_BASE = {
    "lora": "the model it was trained on",
    "projector": "the language model it was trained for",
    "delta": "the original LLaMA in Hugging Face format",
}


def _huggingface(folder: Path, vision_tower: Path | None) -> Source:
    if vision_tower:
        raise UsageError(f"{folder} is a Hugging Face LLaVA with CLIP inside; leave --vision-tower out.")
    path = folder / "config.json"
    raw = read_json(path)
    guessed = not original.names_template(raw)
    notes = ("The prompt template follows from the language model; --template overrides it.",) if guessed else ()
    stored = merge.classic(folder, open_folder(folder))
    return Source("huggingface", path, raw, stored, folder, (folder,), notes, guessed)


def _on_base(folder: Path, layout: Layout, base: Path, vision_tower: Path | None) -> Source:
    kind = recognise(base)
    if kind not in ("language model", "huggingface", "original"):
        raise UsageError(f"--base {base} is itself no whole model (it has the {kind} layout).")
    stored = merge.classic(base, open_folder(base))
    if layout == "lora":
        stored = merge.with_adapter(folder, stored)
    elif layout == "projector":
        stored |= merge.classic(folder, open_file(folder / PROJECTOR_FILE))
    else:
        stored = merge.with_delta(folder, merge.classic(folder, open_folder(folder)), stored)
    config_folder = folder if (folder / "config.json").is_file() else base
    tokenizer = folder if _has_tokenizer(folder) else base
    raw = read_json(config_folder / "config.json")
    if "text_config" in raw:
        if vision_tower:
            raise UsageError(f"{base} is a Hugging Face LLaVA with CLIP inside; leave --vision-tower out.")
        guessed, path = not original.names_template(raw), config_folder / "config.json"
        return Source(layout, path, raw, stored, tokenizer, (folder, base), guessed=guessed)
    return _original(config_folder, stored, layout, tokenizer, (folder, base), vision_tower)


def _original(
    folder: Path,
    stored: Stored,
    layout: Layout,
    tokenizer: Path,
    processors: tuple[Path, ...],
    vision_tower: Path | None,
) -> Source:
    path = folder / "config.json"
    raw = read_json(path)
    if not original.is_original(raw):
        raise CheckpointError(f"{path} describes no LLaVA: it has no vision_config, mm_vision_tower or mm_hidden_size.")
    name, reason = original.template(raw)
    notes = [f"Prompt template {name}: {reason}. --template overrides it."]
    if any(key.startswith(VISION_PREFIX) for key in stored):
        if vision_tower:
            vision, seen = original.vision_from_folder(vision_tower), f"what its tensors mean is read in {vision_tower}"
            processors = (*processors, vision_tower)
        else:
            vision, seen = original.vision_from_shapes(path, raw, stored), "its sizes are read off its tensors"
        notes.append(f"CLIP is inside the checkpoint; {seen}.")
    else:
        tower = vision_tower or _named_tower(path, raw)
        vision = original.vision_from_folder(tower)
        _check_tower(path, raw, tower, vision)
        processors = (*processors, tower)
        inside = merge.classic(tower, open_folder(tower))
        stored = stored | {key: value for key, value in inside.items() if key.startswith(VISION_PREFIX)}
        notes.append(f"CLIP is taken from {tower}.")
    raw = original.to_huggingface(path, raw, vision)
    if raw["llava_edge"]["square"] != "anyres":  # of the base of a fine-tune without tiles; LLaVA does not read it
        stored = {key: value for key, value in stored.items() if key != NEWLINE}
    return Source(layout, path, raw, stored, tokenizer, processors, tuple(notes))


def _named_tower(path: Path, raw: Mapping[str, Any]) -> Path:
    named = str(raw.get("mm_vision_tower", "CLIP"))
    if Path(named).is_absolute() and Path(named).is_dir():
        return Path(named)
    raise UsageError(
        f"{path.parent} has no CLIP weights; it was trained with {named}. Download that folder and pass it with "
        "--vision-tower FOLDER."
    )


# Pixels along a side, of the pictures that OpenAI's towers see.
_SIZES = {"clip-vit-large-patch14-336": 336, "clip-vit-large-patch14": 224, "clip-vit-base-patch16": 224}


def _check_tower(path: Path, raw: Mapping[str, Any], tower: Path, vision: Mapping[str, Any]) -> None:
    """Raises `UsageError` for OpenAI's CLIP of another size than the one named: their tensors may fit each other."""
    named = str(raw.get("mm_vision_tower", "")).rstrip("/")
    size = next((size for end, size in _SIZES.items() if named.endswith(end)), None)
    if size and vision.get("image_size", size) != size:
        raise UsageError(
            f"{path} was trained with {named}, for pictures of {size} pixels; "
            f"{tower} is a CLIP for {vision['image_size']}. Pass the one it was trained with as --vision-tower."
        )


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)
