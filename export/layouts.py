"""Detects the layout of a checkpoint folder from its content, and gathers its parts.

    huggingface  config.json with text_config and vision_config; classic, >= 4.52 and v5 names
    original     haotian-liu/LLaVA, merged; CLIP inside or in a folder of its own (--vision-tower)
    lora         adapter_config.json and adapter_model.*; with non_lora_trainables.bin for the projector (--base)
    projector    mm_projector.bin alone (--base)
    delta        differences to LLaMA, as in the first releases (--base)

Folder names are ignored. Errors about missing parts name the option that provides them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llava_edge.errors import CheckpointError, MissingError, UsageError
from llava_edge.export import merge, original
from llava_edge.export.merge import Stored
from llava_edge.export.tensors import has_weights, open_file, open_folder, read_json
from llava_edge.models.shapes import EMBEDDINGS, FINAL_NORM, NEWLINE, VISION_PREFIX

Layout = Literal["huggingface", "original", "lora", "projector", "delta", "language model"]

PROJECTOR_FILE = "mm_projector.bin"  # llava/train/llava_trainer.py
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")

# A LLaMA's final norm has a mean absolute weight above 1; the difference of two fine-tunes has hundredths.
_DELTA_NORM = 0.2


@dataclass(frozen=True)
class Source:
    """A checkpoint in one form, whatever its layout. `raw` is config.json as Hugging Face would write it."""

    config_path: Path
    raw: dict[str, Any]
    stored: Stored  # under classic names
    tokenizer: Path  # the folder with it
    processors: tuple[Path, ...]  # folders that may have an image processor, in order of precedence
    notes: tuple[str, ...] = ()  # assumptions made, one sentence each
    guessed: bool = False  # whether the prompt layout is guessed, so that a chat template decides


def detect_layout(folder: Path) -> Layout:
    """The layout, from the files in `folder`, its config.json and, for deltas, one small tensor."""
    if not folder.is_dir():
        raise MissingError(f"{folder} is not a folder; expected a LLaVA checkpoint folder.")
    if (folder / merge.ADAPTER_CONFIG).is_file():
        return "lora"
    if not (folder / "config.json").is_file():
        raise MissingError(f"{folder} has no config.json; expected a LLaVA checkpoint folder.")
    if not has_weights(folder) and (folder / PROJECTOR_FILE).is_file():
        return "projector"
    raw = read_json(folder / "config.json")
    return "huggingface" if _is_huggingface(raw) else _detect_from_weights(folder, raw)


def _is_huggingface(raw: Mapping[str, Any]) -> bool:
    return "text_config" in raw or "vision_config" in raw


# Ends of the names of what bitsandbytes, GPTQ, AWQ, float8 and compressed-tensors store beside their integers.
_QUANTIZED = (".absmax", ".SCB", ".qweight", ".weight_scale", ".weight_scale_inv", ".weight_packed")


def _open_weights(folder: Path) -> Stored:
    stored = open_folder(folder)
    quantized = next((name for name in stored if name.endswith(_QUANTIZED)), None)
    if quantized:
        raise CheckpointError(
            f"{folder} holds quantized weights ({quantized}); expected float16, bfloat16 or float32. "
            "Export the model that it was quantized from."
        )
    return merge.rename_tensors(folder, stored)


def _has_projector(stored: Stored) -> bool:
    return any(name.startswith("multi_modal_projector.") for name in stored)


def _detect_from_weights(folder: Path, raw: Mapping[str, Any]) -> Layout:
    stored = _open_weights(folder)
    norm = stored.get(FINAL_NORM)
    has_projector = _has_projector(stored)
    if norm is not None and has_projector and float(np.abs(norm.read()).mean()) < _DELTA_NORM:
        return "delta"
    if has_projector or original.is_original(raw):
        return "original"
    if norm is not None:
        return "language model"
    raise CheckpointError(
        f"{folder} holds neither a LLaVA nor a part of one: its config.json has no vision_config or mm_vision_tower."
    )


# Layouts that are not a complete model: what they contain, and what to pass as --base.
_PARTIAL = {
    "lora": ("low-rank changes (LoRA), not a whole model", "the model it was trained on"),
    "projector": ("a projector only", "the language model it was trained for"),
    "delta": ("differences to another model, not weights", "the original LLaMA in Hugging Face format"),
}


def read_source(folder: Path, base: Path | None, vision_tower: Path | None) -> Source:
    """Gather all parts, without reading large tensors. Raises `MissingError`, `UsageError` or `CheckpointError`."""
    layout = detect_layout(folder)
    if layout == "language model":
        raise CheckpointError(f"{folder} is a language model without a projector; it can only be a LLaVA's --base.")
    if base and layout not in _PARTIAL:
        raise UsageError(f"{folder} is a whole model ({layout} layout) and needs no --base.")
    if not base and layout in _PARTIAL:
        content, base_model = _PARTIAL[layout]
        raise UsageError(f"{folder} holds {content}. Pass {base_model} with --base FOLDER.")
    folders = (folder, base) if base else (folder,)
    stored = _apply_to_base(folder, layout, base) if base else _open_weights(folder)
    path = next(candidate for candidate in folders if (candidate / "config.json").is_file()) / "config.json"
    tokenizer = next(filter(_has_tokenizer, folders), folders[-1])
    raw = read_json(path)
    text = raw.get("text_config")
    if layout == "lora" and isinstance(text, dict) and EMBEDDINGS in stored:
        text["vocab_size"] = stored[EMBEDDINGS].shape[0]  # an adapter that was trained with added tokens has more
    source = Source(path, raw, stored, tokenizer, folders)
    return (_complete_huggingface if _is_huggingface(source.raw) else _complete_original)(source, vision_tower)


def _apply_to_base(folder: Path, layout: Layout, base: Path) -> Stored:
    base_layout = detect_layout(base)
    if base_layout not in ("language model", "huggingface", "original"):
        raise UsageError(f"--base {base} is not a whole model itself (it has the {base_layout} layout).")
    stored = _open_weights(base)
    if layout == "lora":
        merged = merge.merge_adapter(folder, stored)
        if not _has_projector(merged):  # as in the checkpoint-N folders of LLaVA's trainer
            raise MissingError(
                f"Neither {folder} nor {base} holds a projector; expected {merge.NON_LORA}, which LLaVA's trainer "
                f"writes beside {merge.ADAPTER_CONFIG} when it finishes."
            )
        return merged
    if layout == "projector":
        return stored | merge.rename_tensors(folder, open_file(folder / PROJECTOR_FILE))
    return merge.merge_delta(folder, _open_weights(folder), stored)


def _complete_huggingface(source: Source, vision_tower: Path | None) -> Source:
    if vision_tower:
        folder = source.processors[-1]
        raise UsageError(f"{folder} is a Hugging Face LLaVA with CLIP inside; leave --vision-tower out.")
    if original.names_template(source.raw):
        return source
    note = "The prompt template follows from the language model; --template overrides it."
    return replace(source, notes=(note,), guessed=True)


def _complete_original(source: Source, vision_tower: Path | None) -> Source:
    path, raw, stored, processors = source.config_path, source.raw, source.stored, source.processors
    if not original.is_original(raw):
        raise CheckpointError(f"{path} describes no LLaVA: it has no vision_config, mm_vision_tower or mm_hidden_size.")
    original.check_supported(path, raw)
    name, reason = original.guess_template(raw)
    notes = [f"Prompt template {name}: {reason}. --template overrides it."]
    if any(key.startswith(VISION_PREFIX) for key in stored):
        if vision_tower:
            vision, basis = original.vision_from_folder(vision_tower), f"its settings are read from {vision_tower}"
            processors = (*processors, vision_tower)
        else:
            vision, basis = original.vision_from_shapes(path, raw, stored), "its sizes are read off its tensors"
        notes.append(f"CLIP is inside the checkpoint; {basis}.")
    else:
        tower = vision_tower or _default_vision_tower(path, raw)
        vision = original.vision_from_folder(tower)
        _check_tower(path, raw, tower, vision)
        processors = (*processors, tower)
        tower_tensors = _open_weights(tower)
        stored = stored | {key: value for key, value in tower_tensors.items() if key.startswith(VISION_PREFIX)}
        notes.append(f"CLIP is taken from {tower}.")
    raw = original.to_huggingface(path, raw, vision)
    if raw["llava_edge"]["square"] != "anyres":  # LLaVA ignores one left by the base of a fine-tune without tiles
        stored = {key: value for key, value in stored.items() if key != NEWLINE}
    return replace(source, raw=raw, stored=stored, processors=processors, notes=tuple(notes))


def _default_vision_tower(path: Path, raw: Mapping[str, Any]) -> Path:
    tower_name = str(raw.get("mm_vision_tower") or "CLIP")
    if Path(tower_name).is_absolute() and Path(tower_name).is_dir():
        return Path(tower_name)
    if "siglip" in tower_name.lower():  # before gigabytes are downloaded in vain
        raise CheckpointError(f"{path} was trained with {tower_name}, which is not CLIP; only CLIP is supported.")
    raise UsageError(
        f"{path.parent} has no CLIP weights; it was trained with {tower_name}. Download that folder and pass it with "
        "--vision-tower FOLDER."
    )


# Image sizes of OpenAI's towers, in pixels.
_IMAGE_SIZES = {"clip-vit-large-patch14-336": 336, "clip-vit-large-patch14": 224, "clip-vit-base-patch16": 224}


def _check_tower(path: Path, raw: Mapping[str, Any], tower: Path, vision: Mapping[str, Any]) -> None:
    """Raise `UsageError` for a CLIP of another image size than the one named: the tensors alone may fit."""
    tower_name = str(raw.get("mm_vision_tower", "")).rstrip("/")
    size = next((size for end, size in _IMAGE_SIZES.items() if tower_name.endswith(end)), None)
    if size and vision.get("image_size", size) != size:
        raise UsageError(
            f"{path} was trained with {tower_name}, for pictures of {size} pixels; "
            f"{tower} is a CLIP for {vision['image_size']}. Pass the one it was trained with as --vision-tower."
        )


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)
