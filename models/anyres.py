"""Arrange the embeddings of a picture's crops as one sequence, in PyTorch, the way haotian-liu/LLaVA does.

Independent of `llava_edge.anyres`, which works on row numbers, so that each can be tested against the other.
Source: llava/model/llava_arch.py, prepare_inputs_labels_for_multimodal and unpad_image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_edge.anyres import best_grid
from llava_edge.models.config import LlavaConfig


def arrange(embeds: Tensor, newline: Tensor | None, config: LlavaConfig, size: tuple[int, int]) -> Tensor:
    """(crops, tokens, D) of one picture -> (positions, D): the whole picture first, then the grid of its tiles.

    newline (D,): ends each row of the grid; None with merge "flat".
    """
    if newline is None:
        return embeds.flatten(0, 1)
    width, height = (side // config.vision.image_size for side in best_grid(size, config.grids))
    side = config.vision.grid // config.image_pool
    tiles = embeds[1:].view(height, width, side, side, -1).permute(4, 0, 2, 1, 3)
    features = unpad(tiles.flatten(1, 2).flatten(2, 3), size)
    features = torch.cat([features, newline[:, None, None].expand(*features.shape[:-1], 1)], dim=-1)
    return torch.cat([embeds[0], features.flatten(1, 2).T])


def unpad(features: Tensor, size: tuple[int, int]) -> Tensor:
    """(D, H, W) of a padded picture of `size` -> the part inside the padding."""
    (width, height), (rows, columns) = size, features.shape[1:]
    if width / height > columns / rows:
        padding = (rows - int(height * (columns / width))) // 2
        return features[:, padding : rows - padding, :]
    padding = (columns - int(width * (rows / height))) // 2
    return features[:, :, padding : columns - padding]
