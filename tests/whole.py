"""A whole LLaVA in PyTorch, of the parts in `models.streamed` that exports are measured against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llava_edge.models import streamed
from llava_edge.models.config import LlavaConfig

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]


def shown(
    config: LlavaConfig, tensors: Arrays, pixels: Sequence[Array], sizes: Sequence[tuple[int, int]] = ()
) -> list[Array]:
    """(crops, 3, S, S) each -> what the language model sees, (positions, D) each. sizes: needed with "anyres"."""
    features = streamed.image_features(config, tensors, pixels)
    return streamed.arrange(config, tensors, streamed.project(config, tensors, features), sizes)


def logits(config: LlavaConfig, tensors: Arrays, ids: Sequence[int], images: Sequence[Array], start: int = 0) -> Array:
    """Ids with -200 for images -> (positions - start, vocab)."""
    return streamed.logits(config, tensors, streamed.splice(tensors, ids, images), start)


def greedy(
    config: LlavaConfig, tensors: Arrays, ids: Sequence[int], images: Sequence[Array], most: int, stop: int = -1
) -> list[int]:
    """The likeliest tokens behind a prompt, up to `stop`. Everything is computed anew for each token."""
    answer: list[int] = []
    while len(answer) < most:
        token = int(logits(config, tensors, [*ids, *answer], images)[-1].argmax())
        if token == stop:
            break
        answer.append(token)
    return answer
