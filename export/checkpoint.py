"""A LLaVA checkpoint of any layout -> one in-memory form: its hyperparameters, and tensors under classic names.

`layouts.py` gathers the parts. Here everything is checked before anything is converted: missing, misshapen, unknown and
unsupported parts are reported at once, and nothing that would change an answer is ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from llava_edge import gguf, templates
from llava_edge.bundle import MAX_IMAGE_SIZE, Merge, Square, tiling_problem
from llava_edge.errors import CheckpointError, UsageError
from llava_edge.export import chat_template, layouts, normalisation
from llava_edge.export.layouts import Source
from llava_edge.export.normalisation import Normalisation
from llava_edge.export.tensors import StoredTensor
from llava_edge.models.config import LlavaConfig, from_hf
from llava_edge.models.shapes import EMBEDDINGS, HEAD, VISION_PREFIX, Shapes, tensor_shapes
from llava_edge.prompt import AfterControl
from llava_edge.runtimes.projector import MAX_LAYERS
from llava_edge.templates import TEMPLATES

_MAX_NAMES = 12  # tensor names listed in a message


class Tensors(Mapping[str, np.ndarray]):
    """Tensors by classic name; each look-up reads float32 values from disk. Raises `CheckpointError` on NaN."""

    def __init__(self, stored: dict[str, StoredTensor]) -> None:
        self._stored = stored

    def __getitem__(self, name: str) -> np.ndarray:
        array = self._stored[name].read()
        if not np.isfinite(array).all():
            raise CheckpointError(f"The tensor {name} holds NaN or infinite values; the checkpoint is damaged.")
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape without reading the values."""
        return self._stored[name].shape


@dataclass(frozen=True)
class LanguageFile:
    """A GGUF that is copied into the bundle, and the name of its quantization.

    new_controls: ids of tokens that become control tokens in the copy; nothing else in it changes.
    """

    path: Path
    quantization: str
    new_controls: tuple[int, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """The input of the other export steps.

    tokenizer: the folder with the tokenizer. notes: assumptions made where the source says nothing, as sentences.
    language_file: set if the language model is a finished GGUF, which is copied instead of written and quantized.
    normalisation: mean and standard deviation of pixels.
    """

    folder: Path
    config: LlavaConfig
    tensors: Tensors
    tokenizer: Path
    normalisation: Normalisation
    notes: tuple[str, ...] = ()
    language_file: LanguageFile | None = None


def open_checkpoint(
    folder: Path,
    *,
    base: Path | None = None,
    vision_tower: Path | None = None,
    template: str | None = None,
    square: Square | None = None,
) -> Checkpoint:
    """Read and check a folder, without reading large weights yet.

    base: the model that a LoRA, a delta or a projector alone belongs to. vision_tower: a CLIP folder, for checkpoints
    without CLIP. template, square: the prompt layout and how pictures are made square, instead of what the checkpoint
    suggests.
    Raises `MissingError`, `UsageError` or `CheckpointError`.
    """
    if template:
        templates.get_template(template)
    try:
        source = layouts.read_source(folder, base, vision_tower)
        if square:
            check_square(source.config_path, tiled=source.raw.get("model_type") == "llava_next")
        source = _with_settings(source, template=template, square=square)
        config = from_hf(source.raw)
        _check_supported(source.config_path, source.raw, config)
    except (TypeError, ValueError, OverflowError, AttributeError, KeyError, IndexError) as error:
        message = f"config.json of {folder}, or of its base or vision tower, has a value of the wrong type: {error}."
        raise CheckpointError(message) from error
    if HEAD not in source.stored and source.raw.get("tie_word_embeddings") is True:  # what transformers 5 goes by
        config = replace(config, text=replace(config.text, tie_word_embeddings=True))
    tensors = _match_tensors(folder, config, dict(source.stored))
    notes = () if template else source.notes
    if source.guessed and not template:
        text = chat_template.read_chat_template(source.tokenizer)
        template_name = chat_template.resolve_template(text, config.template, source.tokenizer)
        if template_name != config.template:
            config = replace(config, template=template_name)
            notes = (f"Prompt template {template_name}: the chat template of {source.tokenizer} shows it.",)
    if config.square == "pad" and not _states_square(source):
        notes += ("Pictures are padded to a square, as LLaVA v1.5 was trained; --square crop crops them instead.",)
    pixels = normalisation.read_normalisation(
        source.processors, config.vision.image_size, squared=_squared(source, config)
    )
    return Checkpoint(folder, config, tensors, source.tokenizer, pixels, notes)


def _with_settings(source: Source, **given: str | None) -> Source:
    """The source with those of our own settings that are given, in place of what its config.json says."""
    section = {**(source.raw.get("llava_edge") or {}), **{name: value for name, value in given.items() if value}}
    return replace(source, raw={**source.raw, "llava_edge": section})


def check_square(path: Path, *, tiled: bool) -> None:
    """Raise `UsageError` if --square is given for a model that sees pictures in tiles."""
    if tiled:
        raise UsageError(
            f"{path} is of a LLaVA that sees pictures in tiles, neither padded nor cropped; omit --square."
        )


def _states_square(source: Source) -> bool:
    return "square" in (source.raw.get("llava_edge") or {})


def _squared(source: Source, config: LlavaConfig) -> bool:
    """Whether pictures are known to be square when the image processor gets them."""
    return config.square == "anyres" or (_states_square(source) and config.square == "pad")


def _match_tensors(folder: Path, config: LlavaConfig, found: dict[str, StoredTensor]) -> Tensors:
    """Refuse missing, misshapen and unknown tensors; leave out those LLaVA never reads."""
    if config.text.tie_word_embeddings and HEAD in found:
        _check_tied(folder, found)
        del found[HEAD]
    shapes = tensor_shapes(config)
    needed = {name: shape for name, shape in shapes.items() if not _unused(name, config)}
    relevant = {name: tensor.shape for name, tensor in found.items() if name in needed or name not in shapes}
    mismatches = tensor_mismatches(relevant, needed)
    if needed.keys() - found.keys() == {HEAD}:
        mismatches += "; if the output head is tied to the embeddings, set text_config.tie_word_embeddings to true"
    if mismatches:
        raise CheckpointError(f"{folder} does not fit its config.json: {mismatches}.")
    return Tensors({name: found[name] for name in needed})


def tensor_mismatches(found: Shapes, expected: Shapes) -> str:
    """Which tensors are missing, unknown or misshapen, in words; empty if none is."""
    problems = {
        "missing": [name for name in expected if name not in found],
        "unknown": [name for name in found if name not in expected],
        "of the wrong shape": [
            f"{name} {found[name]} instead of {shape}"
            for name, shape in expected.items()
            if found.get(name, shape) != shape
        ],
    }
    return "; ".join(_summarize(title, names) for title, names in problems.items() if names)


def _unused(name: str, config: LlavaConfig) -> bool:
    """Whether LLaVA never reads a tensor: CLIP's last norm and the blocks after the selected layer."""
    block = re.match(rf"{re.escape(VISION_PREFIX)}encoder\.layers\.(\d+)\.", name)
    return f"{VISION_PREFIX}post_layernorm." in name or (block is not None and int(block[1]) >= config.vision_blocks)


def _check_tied(folder: Path, found: dict[str, StoredTensor]) -> None:
    if EMBEDDINGS in found and not np.array_equal(found[HEAD].read(), found[EMBEDDINGS].read()):
        raise CheckpointError(
            f"{folder} ties the output head to the embeddings, but holds a different {HEAD}; "
            "set tie_word_embeddings in config.json's text_config to what the model was trained with."
        )


def _summarize(title: str, names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return f"{len(names)} {title} ({', '.join(names[:_MAX_NAMES])}{more})"


def _check_supported(path: Path, raw: dict[str, Any], config: LlavaConfig) -> None:
    """Refuse settings that the exporter would otherwise ignore."""
    _check_numbers(path, config)
    text, vision = raw["text_config"], raw["vision_config"]
    fixed = (
        ("projector_hidden_act", raw.get("projector_hidden_act", "gelu"), "gelu"),
        ("multimodal_projector_bias", raw.get("multimodal_projector_bias", True), True),
        ("vision_config.model_type", vision.get("model_type", "clip_vision_model"), "clip_vision_model"),
        ("vision_config.hidden_act", config.vision.hidden_act, "quick_gelu"),
        ("text_config.hidden_act", text.get("hidden_act", "silu"), "silu"),
        ("text_config.attention_bias", text.get("attention_bias", False), False),
        ("text_config.mlp_bias", text.get("mlp_bias", False), False),
        ("text_config.head_dim", text.get("head_dim") or config.text.head_dim, config.text.head_dim),
    )
    choices: tuple[tuple[str, str, tuple[str, ...]], ...] = (
        ("square", config.square, get_args(Square)),
        ("merge", config.merge, get_args(Merge)),
        ("template", config.template, tuple(TEMPLATES)),
        ("after_control", config.after_control or "prefix", get_args(AfterControl)),
    )
    for name, choice, allowed in choices:
        if choice not in allowed:
            raise CheckpointError(f"{path} sets llava_edge.{name} to {choice!r}; expected one of {', '.join(allowed)}.")
    for name, value, expected in fixed:
        if value != expected:
            raise CheckpointError(f"{path} sets {name} to {value!r}; only {expected!r} is supported.")
    fault = tiling_problem(config.vision.image_size, config.square, config.grids, config.merge, config.image_tokens)
    if fault:
        raise CheckpointError(f"{path} cannot be right: {fault}.")


# llama.cpp's limits (`gguf.check_language`) and the bundle's; anything not listed is limited like a vocabulary, to
# 1 << 22.
_MAX_VALUES = {
    "num_hidden_layers": gguf.MAX_NUMBERS["block_count"],
    "num_attention_heads": gguf.MAX_NUMBERS["head_count"],
    "num_key_value_heads": gguf.MAX_NUMBERS["head_count"],
    "hidden_size": gguf.MAX_NUMBERS["embedding_length"],
    "intermediate_size": gguf.MAX_NUMBERS["feed_forward_length"],
    "image_size": MAX_IMAGE_SIZE,
    "max_position_embeddings": gguf.MAX_NUMBERS["context_length"],
    "rope_theta": 1e12,
    "rms_norm_eps": 1.0,
    "layer_norm_eps": 1.0,
}
_MAY_BE_ZERO = ("bos_token_id", "eos_token_id")


def _check_numbers(path: Path, config: LlavaConfig) -> None:
    v, t = config.vision, config.text
    for part, values in (("vision_config", v), ("text_config", t)):
        for item in fields(values):
            value = getattr(values, item.name)
            if item.type in ("int", "float"):
                number = isinstance(value, int | (float if item.type == "float" else int)) and value is not True
                # NaN is not in any range.
                least = 0 if item.name in _MAY_BE_ZERO else 1e-12
                if not number or not least <= value <= _MAX_VALUES.get(item.name, 1 << 22):
                    raise CheckpointError(f"{path} sets {part}.{item.name} to {value!r}, which cannot be right.")
    width, heads = t.hidden_size, t.num_attention_heads
    layer = config.vision_feature_layer
    rules = {
        "vision_config.hidden_size must be a multiple of its heads": v.hidden_size % v.num_attention_heads == 0,
        "text_config.hidden_size must be an even multiple of its heads": width % (2 * heads) == 0,
        "text_config's heads must be a multiple of its kv heads": heads % t.num_key_value_heads == 0,
        "image_size must hold at least one patch": v.grid >= 1,
        f"vision_feature_layer {layer!r} is not an integer": type(layer) is int,
        f"the projector can have {MAX_LAYERS} layers at most": config.projector_layers <= MAX_LAYERS,
        f"vision_feature_layer {layer} is outside the tower's {v.num_hidden_layers} blocks": (
            0 <= config.vision_blocks <= v.num_hidden_layers
        ),
        f"image_pool {config.image_pool} must divide the patch grid of {v.grid}": (
            config.image_pool >= 1 and v.grid % config.image_pool == 0
        ),
        "image_markers must be two names or none": len(config.image_markers) in (0, 2),
        "pooled patches need the class token dropped": config.image_pool == 1 or config.feature == "patch",
    }
    for rule, good in rules.items():
        if not good:
            raise CheckpointError(f"{path} cannot be right: {rule}.")
