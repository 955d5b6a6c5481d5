"""`config.json` of haotian-liu/LLaVA -> the dictionary in Hugging Face's format.

The language model's numbers are at the top level; CLIP is only named (`mm_vision_tower`), so its numbers come
from its own folder or from the shapes of its tensors. Names and defaults: llava/model/llava_arch.py and builder.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llava_edge.errors import CheckpointError, MissingError, UsageError
from llava_edge.export.tensors import StoredTensor, read_json
from llava_edge.models import trained_layout
from llava_edge.models.config import VisionConfig
from llava_edge.models.shapes import VISION_PREFIX

MARKERS = ("<im_start>", "<im_end>")  # llava/constants.py

_TEXT_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "hidden_act"),
    *("max_position_embeddings", "partial_rotary_factor", "tie_word_embeddings", "attention_bias", "mlp_bias"),
    *("bos_token_id", "eos_token_id"),
)
_SELECT_STRATEGIES = {"patch": "default", "cls_patch": "full"}
_CLIP = "clip_vision_model"
_HEAD_WIDTH = 64  # in every CLIP that OpenAI published
_MAX_WIDTH = 1024  # of those; the heads of ViT-H, by others, are 80 wide

# The language model of each of the repository's classes.
_LANGUAGE_MODELS = {"LlavaLlamaForCausalLM": "llama", "LlamaForCausalLM": "llama", "LlavaMistralForCausalLM": "mistral"}

_SQUARES = {"square": "crop", "pad": "pad", "anyres": "anyres"}

# Settings with which relatives of LLaVA, under the same classes, see pictures otherwise; the values that LLaVA has.
_VALUES: dict[str, tuple[str | None, ...]] = {
    "image_aspect_ratio": (None, *_SQUARES),
    "mm_image_tower": (None,),  # Video-LLaVA has LanguageBind's, whose sizes are CLIP's
    "mm_video_tower": (None,),
    "mm_resampler_type": (None, "identity"),  # LLaVA-NeXT-Video pools
}


def is_original(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json that is not Hugging Face's is in this layout; both use `model_type` "llava"."""
    return "mm_vision_tower" in raw or "mm_hidden_size" in raw


def names_template(raw: Mapping[str, Any]) -> bool:
    """Whether a Hugging Face config.json names the prompt layout, as our trainer writes it."""
    section = raw.get("llava_edge")
    return isinstance(section, Mapping) and "template" in section


def check_supported(path: Path, raw: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` for a relative of LLaVA, before anything is downloaded for it in vain."""
    architecture = _architecture(raw)
    if not isinstance(architecture, str) or architecture not in _LANGUAGE_MODELS:
        known = ", ".join(_LANGUAGE_MODELS)
        raise CheckpointError(f"{path} is for {architecture!r}, which is not supported; expected one of {known}.")
    for key, values in _VALUES.items():
        if raw.get(key) not in values:
            expected = " or ".join(map(json.dumps, values))
            raise CheckpointError(
                f"{path} sets {key} to {raw[key]!r}; expected {expected}. Only LLaVA is supported, not its relatives."
            )


def _architecture(raw: Mapping[str, Any]) -> Any:
    value = raw.get("architectures") or "LlavaLlamaForCausalLM"
    return value if isinstance(value, str) else value[0]


def to_huggingface(path: Path, raw: Mapping[str, Any], vision: Mapping[str, Any]) -> dict[str, Any]:
    """Convert `raw`. `vision` is CLIP's vision_config. Raises `CheckpointError` naming an unsupported setting."""
    if "mm_vision_select_layer" not in raw:
        raise CheckpointError(f"{path} does not say which CLIP layer to read; set mm_vision_select_layer (LLaVA: -2).")
    feature = raw.get("mm_vision_select_feature", "patch")
    if not isinstance(feature, str) or feature not in _SELECT_STRATEGIES:
        raise CheckpointError(f"{path} sets mm_vision_select_feature to {feature!r}; expected patch or cls_patch.")
    text = {key: raw[key] for key in _TEXT_KEYS if raw.get(key) is not None}
    if "sliding_window" in raw:  # null means none; if missing, Mistral's default applies
        text["sliding_window"] = raw["sliding_window"]
    if (text.get("bos_token_id"), text.get("eos_token_id")) == (0, 1):
        text |= {"bos_token_id": 1, "eos_token_id": 2}  # a known bug of converted LLaMA-1; its tokenizer is right
    context = [raw[key] for key in ("tokenizer_model_max_length", "max_sequence_length") if raw.get(key)]
    if context and "max_position_embeddings" in text:
        text["max_position_embeddings"] = min(text["max_position_embeddings"], *context)
    square = raw.get("image_aspect_ratio") or "square"
    return {
        "model_type": "llava_next" if square == "anyres" else "llava",
        "image_grid_pinpoints": _grids(path, raw) if square == "anyres" else [],
        "text_config": {**text, "model_type": _LANGUAGE_MODELS[_architecture(raw)]},
        "vision_config": dict(vision),
        "vision_feature_layer": raw["mm_vision_select_layer"],
        "vision_feature_select_strategy": _SELECT_STRATEGIES[feature],
        "image_token_index": raw.get("vocab_size", 32000),
        "llava_edge": {
            "projector_type": raw.get("mm_projector_type") or "linear",
            "square": _SQUARES[square],
            "merge": (raw.get("mm_patch_merge_type") if square == "anyres" else None) or "flat",
            "template": guess_template(raw)[0],
            "image_markers": list(MARKERS) if raw.get("mm_use_im_start_end") else [],
        },
    }


def _grids(path: Path, raw: Mapping[str, Any]) -> list[list[int]]:
    """LLaVA's (width, height) pairs, sometimes a string, in Hugging Face's order (height, width)."""
    value = raw.get("image_grid_pinpoints")
    try:
        pairs = json.loads(value.replace("(", "[").replace(")", "]")) if isinstance(value, str) else list(value or ())
        return [[int(height), int(width)] for width, height in pairs]
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} should give image_grid_pinpoints as pairs of pixels, has {value!r}.") from error


def guess_template(raw: Mapping[str, Any]) -> tuple[str, str]:
    """The prompt layout the model was trained with, guessed from its config, and the reason. No config names it."""
    rows = raw.get("vocab_size", 0)
    if raw.get("mm_use_im_start_end"):
        if rows >= 32004:
            return "multimodal", f"image markers and a padding token ({rows} rows) are those of the first release (v0)"
        return "llava_v1_1", "it has image markers, as the v1-1 checkpoints of July 2023"
    mistral = "LlavaMistralForCausalLM" in (raw.get("architectures") or [])
    unlimited = mistral and raw.get("sliding_window", 4096) is None
    return trained_layout.guess_template(hidden_size=raw.get("hidden_size"), unlimited_mistral=unlimited)


def vision_from_folder(folder: Path) -> dict[str, Any]:
    """vision_config of a CLIP folder: nested in a full CLIP's config, flat in a vision model's."""
    if not (folder / "config.json").is_file():
        raise MissingError(f"{folder} has no config.json; expected a CLIP folder for --vision-tower.")
    raw = read_json(folder / "config.json")
    vision = raw.get("vision_config", raw)
    if not isinstance(vision, dict) or "patch_size" not in vision:
        raise CheckpointError(f"{folder / 'config.json'} does not describe a CLIP vision tower.")
    kind = vision.get("model_type", _CLIP)
    if kind != _CLIP:
        raise CheckpointError(
            f"{folder} holds a vision tower of the type {kind!r}; only CLIP, {_CLIP!r}, is supported."
        )
    return {**vision, "model_type": _CLIP}


def vision_from_shapes(path: Path, raw: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """vision_config of a tower inside a checkpoint, from its shapes; assumes one of OpenAI's unless named otherwise.

    Raises `CheckpointError` if it is incomplete, `UsageError` if it is known not to be OpenAI's.
    """
    tower_name = str(raw.get("mm_vision_tower", ""))
    shapes = {name.removeprefix(VISION_PREFIX): tensor.shape for name, tensor in stored.items()}
    if "embeddings.class_embedding" not in shapes:
        raise CheckpointError(
            f"{path}: the vision tower inside the checkpoint{f' ({tower_name})' if tower_name else ''} has no class "
            "token, so it is not CLIP, the only one that is supported."
        )
    try:
        width, _, patch, _ = shapes["embeddings.patch_embedding.weight"]
        grid = round((shapes["embeddings.position_embedding.weight"][0] - 1) ** 0.5)
        mlp_width = shapes["encoder.layers.0.mlp.fc1.weight"][0]
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: the CLIP tower inside the checkpoint is incomplete ({error}).") from error
    if width > _MAX_WIDTH or any(vendor in tower_name.lower() for vendor in ("laion", "openclip", "open_clip")):
        raise UsageError(
            f"{path} has the tower {tower_name} inside, whose heads and activation cannot be told from its tensors. "
            "Pass a folder with its config.json as --vision-tower FOLDER."
        )
    blocks = {int(name.split(".")[2]) for name in shapes if name.startswith("encoder.layers.")}
    sizes = VisionConfig(
        image_size=grid * patch,
        patch_size=patch,
        hidden_size=width,
        intermediate_size=mlp_width,
        num_hidden_layers=max(blocks) + 1,
        num_attention_heads=max(1, width // _HEAD_WIDTH),
    )
    return {**asdict(sizes), "model_type": _CLIP}
