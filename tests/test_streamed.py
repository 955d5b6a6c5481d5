"""The reference that holds one part at a time computes what the whole model does."""

from __future__ import annotations

from collections import UserDict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from llava_edge.models import micro, streamed
from llava_edge.models.llava import from_state
from llava_edge.prompt import IMAGE_TOKEN_INDEX

Array = np.ndarray[Any, Any]


class Counting(UserDict[str, Array]):
    """Tensors that remember what was read."""

    def __init__(self, tensors: dict[str, Array]) -> None:
        super().__init__(tensors)
        self.read: list[str] = []

    def __getitem__(self, name: str) -> Array:
        self.read.append(name)
        return self.data[name]


@pytest.mark.parametrize("tied", [False, True])
def test_it_computes_the_whole_models_logits(tied: bool) -> None:
    config = replace(micro.CONFIG, text=replace(micro.CONFIG.text, tie_word_embeddings=tied))
    tensors = Counting(micro.random_tensors(config))
    pixels = np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)
    before, after = [5, 9, 3], [7, 8]
    [features] = streamed.image_features(config, tensors, [pixels])
    [image] = streamed.arrange(config, tensors, streamed.project(config, tensors, [features]), [(32, 32)])
    text = streamed.embed_tokens(tensors, before + after)
    embeds = np.concatenate([text[:3], image, text[3:]])
    ours = streamed.logits(config, tensors, embeds, start=2)
    assert max(tensors.read.count(name) for name in tensors if ".layers." in name) == 1
    with torch.no_grad():
        model = from_state(config, tensors.data)
        whole = model([*before, IMAGE_TOKEN_INDEX, *after], torch.from_numpy(pixels))
    np.testing.assert_allclose(ours, whole.numpy()[2:], atol=2e-5)
