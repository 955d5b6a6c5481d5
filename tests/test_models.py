"""Our PyTorch LLaVA against Hugging Face transformers on tiny random configurations."""

from __future__ import annotations

from collections import Counter, UserDict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import whole
from hugging_face import in_memory

from llava_edge.errors import CheckpointError
from llava_edge.models import micro, streamed
from llava_edge.models.clip import pool_patches
from llava_edge.models.config import LlavaConfig, TextConfig, VisionConfig, from_hf, to_hf
from llava_edge.models.shapes import EMBEDDINGS, VISION_PREFIX
from llava_edge.prompt import IMAGE_TOKEN_INDEX

TINY = LlavaConfig(
    vision=VisionConfig(
        image_size=28, patch_size=7, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4
    ),
    text=TextConfig(
        vocab_size=100,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=256,
    ),
    image_token_index=99,
)
VARIANTS = {
    "llava-1.5": TINY,
    "no grouped queries": replace(TINY, text=replace(TINY.text, num_key_value_heads=6)),
    "tied head": replace(TINY, text=replace(TINY.text, tie_word_embeddings=True, rope_theta=1e6)),
    "last layer": replace(TINY, vision_feature_layer=-1),
    "positive layer": replace(TINY, vision_feature_layer=2),
    "class token kept": replace(TINY, feature="cls_patch"),
}
IDS = [1, 5, 17, IMAGE_TOKEN_INDEX, 8, 42, 77]


def hugging_face(config: LlavaConfig, tensors: dict[str, np.ndarray]) -> Any:
    """The same weights in transformers' LlavaForConditionalGeneration."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    raw = to_hf(config)
    text = {key: value for key, value in raw["text_config"].items() if key not in ("model_type", "architectures")}
    vision = {key: value for key, value in raw["vision_config"].items() if key != "model_type"}
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**vision),
            text_config=LlamaConfig(**text),
            image_token_index=config.image_token_index,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=raw["vision_feature_select_strategy"],
            image_seq_length=config.image_tokens,
            tie_word_embeddings=config.text.tie_word_embeddings,
        )
    ).eval()
    missing, unexpected = model.load_state_dict(in_memory(tensors, model), strict=False)
    assert not unexpected
    assert all("position_ids" in name or (config.text.tie_word_embeddings and "lm_head" in name) for name in missing)
    model.tie_weights()
    return model


def pixels(config: LlavaConfig, seed: int = 0) -> torch.Tensor:
    size = config.vision.image_size
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(seed))


def their_ids(config: LlavaConfig, ids: list[int]) -> torch.Tensor:
    """transformers wants the image token repeated once a position."""
    expanded = [[config.image_token_index] * config.image_tokens if i == IMAGE_TOKEN_INDEX else [i] for i in ids]
    return torch.tensor([[token for group in expanded for token in group]])


class Counting(UserDict[str, np.ndarray]):
    """Tensors that remember how often each was read."""

    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        super().__init__(tensors)
        self.times = Counter[str]()

    def __getitem__(self, name: str) -> np.ndarray:
        self.times[name] += 1
        return self.data[name]


def unused(name: str, config: LlavaConfig) -> bool:
    """CLIP's last norm and the blocks behind the chosen layer."""
    late = [f"{VISION_PREFIX}encoder.layers.{n}." for n in range(config.vision_blocks, config.vision.num_hidden_layers)]
    return name.startswith((f"{VISION_PREFIX}post_layernorm", *late))


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_and_greedy_tokens_equal_transformers(config: LlavaConfig) -> None:
    tensors = micro.random_tensors(config, seed=3)
    reference, read = hugging_face(config, tensors), Counting(tensors)
    image = pixels(config)
    with torch.no_grad():
        theirs = reference(input_ids=their_ids(config, IDS), pixel_values=image).logits[0]
    shown = whole.shown(config, read, [image.numpy()])
    mine = whole.logits(config, read, IDS, shown)
    assert mine.shape == theirs.shape
    assert np.abs(mine - theirs.numpy()).max() <= 1e-4
    assert np.array_equal(whole.logits(config, tensors, IDS, shown, start=2), mine[2:])
    assert set(read.times) == {name for name in tensors if not unused(name, config)}
    assert {read.times[name] for name in read.times if ".layers." in name} == {1}
    generated = reference.generate(
        input_ids=their_ids(config, IDS), pixel_values=image, max_new_tokens=12, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    answer = whole.greedy(config, tensors, IDS, shown, 12)
    assert answer == generated[0, theirs.shape[0] :].tolist()


def test_pooling_averages_square_neighbourhoods() -> None:
    features = torch.randn(2, 16, 5)
    pooled = pool_patches(features, grid=4, pool=2)
    assert pooled.shape == (2, 4, 5)
    torch.testing.assert_close(pooled[:, 1], features[:, [2, 3, 6, 7]].mean(1))


def test_images_and_slots_must_match() -> None:
    tensors = micro.random_tensors(TINY)
    image = np.zeros((2, TINY.text.hidden_size), np.float32)
    two = streamed.splice(tensors, [1, IMAGE_TOKEN_INDEX, IMAGE_TOKEN_INDEX, 7], [image, image + 1])
    table = tensors[EMBEDDINGS]
    assert np.array_equal(two, np.stack([table[1], *image, *(image + 1), table[7]]))
    for images in ([], [image, image]):
        with pytest.raises(ValueError, match=r"shorter|longer"):
            streamed.splice(tensors, IDS, images)


def test_config_survives_hugging_face_form() -> None:
    config = replace(TINY, image_pool=2, square="crop", projector_type="mlp3x_gelu", template="chatml")
    config = replace(config, image_markers=("<im_start>", "<im_end>"), after_control="cut")
    assert from_hf(to_hf(config)) == config


def test_config_takes_transformers_defaults_where_a_file_is_silent() -> None:
    """llava-hf/llava-1.5-7b-hf's text_config leaves most sizes out."""
    raw = {
        "model_type": "llava",
        "text_config": {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
                        "vocab_size": 32064},
        "vision_config": {"hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "num_attention_heads": 16,
                          "num_hidden_layers": 24, "patch_size": 14},
        "image_token_index": 32000,
    }  # fmt: skip
    config = from_hf(raw)
    assert config == LlavaConfig()
    assert (config.vision_blocks, config.image_tokens) == (23, 576)


def test_what_is_not_a_llava_is_refused() -> None:
    with pytest.raises(CheckpointError, match="text_config"):
        from_hf({"model_type": "llama"})
    with pytest.raises(CheckpointError, match="mlpNx_gelu"):
        _ = replace(TINY, projector_type="resampler").projector_layers
