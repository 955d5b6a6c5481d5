"""Hyperparameters of a LLaVA, read from and written to Hugging Face's `config.json`. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from llava_edge.bundle import Merge, Square
from llava_edge.errors import CheckpointError
from llava_edge.models.trained_layout import guess_template
from llava_edge.prompt import AfterControl

_Part = TypeVar("_Part", "VisionConfig", "TextConfig")

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # preprocessor_config.json of openai/clip-vit-*
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class VisionConfig:
    """A CLIP vision transformer; defaults are ViT-L/14 at 336 px."""

    image_size: int = 336
    patch_size: int = 14
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class TextConfig:
    """A LLaMA; defaults are 7B."""

    vocab_size: int = 32064
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = False
    bos_token_id: int = 1
    eos_token_id: int = 2

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class LlavaConfig:
    """CLIP + projector + LLaMA, and how they are joined.

    vision_feature_layer: index into CLIP's hidden states; 0 is the output of pre_layrnorm, -2 the second-to-last block.
    feature: "patch" drops the class token (HF calls it "default"), "cls_patch" keeps it ("full").
    projector_type: "linear" or "mlpNx_gelu" (N >= 1; GELU is the exact erf form).
    square: how a picture is made square: "pad" with the mean colour (LLaVA-1.5), "crop" the centre (v1), or "anyres":
        the whole picture plus tiles of it (v1.6).
    grids: for "anyres", the resolutions in pixels (width, height) that a picture may be tiled at; otherwise empty.
    merge: how tiles are merged: "spatial_unpad" as one grid without its padding, each row ended by the learned
        `image_newline`; "flat" one after the other.
    image_pool: side of the square of neighbouring patches whose features are averaged; 1 keeps every patch.
    template: name of the prompt layout in `llava_edge.templates`.
    image_markers: names of the two control tokens around every picture (mm_use_im_start_end), or empty.
    after_control: how text after a control token is tokenized (`prompt.AfterControl`); empty: as in
        tokenizer_config.json.
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    vision_feature_layer: int = -2
    feature: Literal["patch", "cls_patch"] = "patch"
    projector_type: str = "mlp2x_gelu"
    square: Square = "pad"
    grids: tuple[tuple[int, int], ...] = ()
    merge: Merge = "flat"
    image_pool: int = 1
    template: str = "vicuna_v1"
    image_token_index: int = 32000
    image_markers: tuple[str, ...] = ()
    after_control: AfterControl | Literal[""] = ""

    @property
    def vision_blocks(self) -> int:
        """Number of CLIP blocks needed for the selected layer."""
        layer, depth = self.vision_feature_layer, self.vision.num_hidden_layers
        return layer if layer >= 0 else depth + 1 + layer

    @property
    def image_tokens(self) -> int:
        """Positions one crop takes in the language model; a picture has one crop, or with "anyres" several."""
        side = self.vision.grid // self.image_pool
        return side * side + (self.feature == "cls_patch")

    @property
    def projector_layers(self) -> int:
        """Number of Linear layers in the projector."""
        if self.projector_type == "linear":
            return 1
        digits = self.projector_type.removeprefix("mlp").removesuffix("x_gelu")
        if not digits.isdecimal() or int(digits) < 1:
            raise CheckpointError(
                f"Projector type {self.projector_type!r} is not supported; expected linear or mlpNx_gelu."
            )
        return int(digits)


def from_hf(raw: dict[str, Any]) -> LlavaConfig:
    """Build from the contents of a Hugging Face `config.json`; omitted values are transformers' defaults."""
    if not isinstance(raw.get("text_config"), dict) or not isinstance(raw.get("vision_config"), dict):
        raise CheckpointError(
            "config.json has no text_config and vision_config, so it is not a Hugging Face LLaVA; "
            "expected the layout of llava-hf/llava-1.5-7b-hf."
        )
    if raw.get("model_type", "llava") not in ("llava", "llava_next"):
        raise CheckpointError(f"model_type {raw['model_type']!r} is not supported; expected llava or llava_next.")
    text, vision = ({key: value for key, value in raw[part].items() if value is not None} for part in _PARTS)
    text = _language_defaults(raw["text_config"]) | text
    if isinstance(text.get("eos_token_id"), list):  # the tokenizer's own comes first
        text["eos_token_id"] = text["eos_token_id"][0]
    rope = text.get("rope_parameters") or {}
    if "rope_theta" in rope:  # transformers 5
        text["rope_theta"] = rope["rope_theta"]
    _check_rope(text, rope)
    window = _sliding_window(raw["text_config"])
    if window is not None:  # up to this length, sliding-window attention equals full attention
        text["max_position_embeddings"] = min(text["max_position_embeddings"], window)
    strategy = raw.get("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        raise CheckpointError(f"vision_feature_select_strategy {strategy!r} is unknown; expected default or full.")
    unlimited = text.get("model_type") == "mistral" and window is None
    template, _ = guess_template(hidden_size=text.get("hidden_size"), unlimited_mistral=unlimited)
    extra = raw.get("llava_edge") or {}
    tiled = raw.get("model_type") == "llava_next"
    grids = (raw.get("image_grid_pinpoints") or _GRIDS) if tiled else ()
    return LlavaConfig(
        vision=_build(VisionConfig, {**_CLIP_DEFAULTS, **vision}),
        text=_build(TextConfig, text),
        vision_feature_layer=_feature_layer(raw.get("vision_feature_layer", -2)),
        feature="patch" if strategy == "default" else "cls_patch",
        projector_type=extra.get("projector_type", "mlp2x_gelu"),
        square=extra.get("square", "anyres" if tiled else "pad"),
        grids=tuple((int(width), int(height)) for height, width in grids),
        merge=extra.get("merge", "spatial_unpad" if tiled else "flat"),
        image_pool=extra.get("image_pool", 1),
        template=extra.get("template", template),
        image_token_index=raw.get("image_token_index", raw.get("image_token_id", 32000)),
        image_markers=tuple(extra.get("image_markers", ())),
        after_control=extra.get("after_control", ""),
    )


def _feature_layer(value: Any) -> int:
    """Newer files may list several layers, whose features are concatenated; LLaVA has one."""
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    if type(value) is not int:
        raise CheckpointError(f"vision_feature_layer is {value!r}; expected one integer.")
    return value


def _check_rope(text: dict[str, Any], parameters: dict[str, Any]) -> None:
    """Refuse scaled or partial rotary embeddings. `parameters`: transformers 5's `rope_parameters`; 4 uses `text`.

    A `rope_scaling` that only names the type "default" scales nothing.
    """
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    scaled = any(value != "default" for value in text.get("rope_scaling", {}).values())
    if scaled or kind != "default":
        name = "rope_scaling" if scaled else f"rope_type {kind!r}"
        raise CheckpointError(f"{name} is set in text_config; scaled rotary embeddings are not supported.")
    if parameters.get("partial_rotary_factor", text.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise CheckpointError("partial_rotary_factor is set in text_config; partial rotary embeddings are unsupported.")


def _sliding_window(text: dict[str, Any]) -> int | None:
    """Length of a Mistral's attention window in positions; None without a limit."""
    if text.get("model_type") != "mistral":
        return None
    window = text.get("sliding_window", 4096)  # MistralConfig's default; newer files say null
    return None if window is None else int(window)


def _language_defaults(text: dict[str, Any]) -> dict[str, Any]:
    """Defaults of a text_config. Up to its sliding window, a Mistral is a LLaMA with other defaults."""
    kind = text.get("model_type", "llama")
    if kind == "mistral":
        return _MISTRAL_DEFAULTS
    if kind != "llama":
        raise CheckpointError(f"Language model {kind!r} is not supported; expected llama or mistral.")
    return {**_LLAMA_DEFAULTS, "num_key_value_heads": text.get("num_attention_heads", TextConfig.num_attention_heads)}


def to_hf(config: LlavaConfig) -> dict[str, Any]:
    """The contents of `config.json`; settings that Hugging Face lacks go under "llava_edge"."""
    tiled = config.square == "anyres"
    grids = {"image_grid_pinpoints": [[height, width] for width, height in config.grids]}
    return {
        "architectures": [f"Llava{'Next' if tiled else ''}ForConditionalGeneration"],
        "model_type": "llava_next" if tiled else "llava",
        **(grids if tiled else {}),
        "image_token_index": config.image_token_index,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": "default" if config.feature == "patch" else "full",
        "image_seq_length": config.image_tokens,
        "tie_word_embeddings": config.text.tie_word_embeddings,
        "text_config": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **asdict(config.text)},
        "vision_config": {"model_type": "clip_vision_model", **asdict(config.vision)},
        "llava_edge": {
            "projector_type": config.projector_type,
            "square": config.square,
            "merge": config.merge,
            "image_pool": config.image_pool,
            "template": config.template,
            "image_markers": list(config.image_markers),
            "after_control": config.after_control,
        },
    }


def write_settings(folder: Path, config: LlavaConfig, tokenizer: dict[str, Any]) -> None:
    """Write config.json, and `tokenizer` as tokenizer.json, into a folder, which is created if necessary."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_hf(config), indent=2), "utf-8")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), "utf-8")


# transformers' defaults, which a config.json may omit: LlamaConfig, MistralConfig, LlavaNextConfig ((height, width))
# and CLIPVisionConfig (ViT-B/32).
_LLAMA_DEFAULTS = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "vocab_size": 32000}
_MISTRAL_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131072,
    "vocab_size": 32000,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
}
_PARTS = ("text_config", "vision_config")
_GRIDS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
_CLIP_DEFAULTS = {
    "image_size": 224,
    "patch_size": 32,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}


def _build(kind: type[_Part], raw: dict[str, Any]) -> _Part:
    return kind(**{field.name: raw[field.name] for field in fields(kind) if raw.get(field.name) is not None})
