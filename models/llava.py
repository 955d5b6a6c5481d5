"""LLaVA: CLIP tower, projector and LLaMA joined by the `<image>` splice.

What the trainer trains, and the whole that tests compare with; exports are measured against its modules in `streamed`.
State dict names are Hugging Face's classic ones (`vision_tower.vision_model.`, `multi_modal_projector.`,
`language_model.`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llava_edge.errors import CheckpointError
from llava_edge.models.anyres import arrange, crop_count
from llava_edge.models.clip import VisionTower
from llava_edge.models.config import LlavaConfig
from llava_edge.models.llama import Llama
from llava_edge.models.projector import Projector
from llava_edge.prompt import IMAGE_TOKEN_INDEX


class _Tower(nn.Module):
    """Only here to give the tower its Hugging Face name."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.vision_model = VisionTower(config)


class Llava(nn.Module):
    """The whole model."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = _Tower(config)
        self.multi_modal_projector = Projector(config)
        self.language_model = Llama(config.text)
        newline = config.merge == "spatial_unpad"
        self.image_newline = nn.Parameter(torch.zeros(config.text.hidden_size)) if newline else None

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Crops (B, 3, S, S) float32 -> CLIP features (B, image_tokens, vision width). CLIP is always frozen."""
        with torch.no_grad():
            features: Tensor = self.vision_tower.vision_model(pixels)
        return features

    def projector(self, features: Tensor) -> Tensor:
        """(.., vision width) -> (.., hidden size)."""
        embeds: Tensor = self.multi_modal_projector(features)
        return embeds

    def images(self, features: Tensor, sizes: Sequence[tuple[int, int]] = ()) -> list[Tensor]:
        """CLIP features of all crops (crops, image_tokens, vision width) -> (positions, D) for each picture.

        sizes: (width, height) of the pictures; needed with "anyres", where they decide about number and order of crops.
        """
        embeds = self.projector(features)
        if self.config.square != "anyres":
            return list(embeds)
        parts = embeds.split([crop_count(self.config, size) for size in sizes])
        return [arrange(part, self.image_newline, self.config, size) for part, size in zip(parts, sizes, strict=True)]

    def splice(self, ids: Sequence[int] | Tensor, images: Sequence[Tensor] | Tensor | None) -> Tensor:
        """Embeddings (T', D): text looked up, each IMAGE_TOKEN_INDEX replaced by one of `images` (positions, D).

        Raises `ValueError` when slots and images do not match in number.
        """
        row = torch.as_tensor(ids)
        slots = int((row == IMAGE_TOKEN_INDEX).sum())
        if slots != (0 if images is None else len(images)):
            raise ValueError(f"{slots} image slots but {0 if images is None else len(images)} images.")
        parts, start = [], 0
        for n, at in enumerate((row == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist()):
            assert images is not None
            parts += [self.language_model.model.embed_tokens(row[start:at]), images[n]]
            start = at + 1
        parts.append(self.language_model.model.embed_tokens(row[start:]))
        return torch.cat(parts)

    def forward(
        self, ids: Sequence[int] | Tensor, pixels: Tensor | None = None, sizes: Sequence[tuple[int, int]] = ()
    ) -> Tensor:
        """One sequence of ids with -200 for images, crops (n, 3, S, S) -> logits (T', vocab). `sizes`: see `images`."""
        images = None if pixels is None else self.images(self.encode_image(pixels), sizes)
        states = self.language_model.hidden(self.splice(ids, images)[None])
        return self.language_model.logits(states[0])

    @torch.no_grad()
    def generate_greedy(
        self,
        ids: Sequence[int],
        features: Tensor | None,
        max_tokens: int,
        stop_ids: Sequence[int] = (),
        sizes: Sequence[tuple[int, int]] = (),
    ) -> list[int]:
        """Greedy continuation of one prompt; `features` and `sizes` as `images` has them. Stop id not included.

        Everything is computed anew for each token: to compare with, not to use.
        """
        images = None if features is None else self.images(features, sizes)
        answer: list[int] = []
        while len(answer) < max_tokens:
            states = self.language_model.hidden(self.splice([*ids, *answer], images)[None])
            token = int(self.language_model.logits(states[0, -1]).argmax())
            if token in stop_ids:
                break
            answer.append(token)
        return answer


def from_state(config: LlavaConfig, tensors: Mapping[str, Any]) -> Llava:
    """Build in float32 from tensors or arrays under classic Hugging Face names; unused ones (later CLIP blocks,
    post_layernorm) are ignored. Raises `CheckpointError` listing everything missing or misshapen."""
    with torch.device("meta"):
        model = Llava(config)
    state, wrong = {}, []
    for name, parameter in model.state_dict().items():
        if name not in tensors:
            wrong.append(f"{name} missing")
            continue
        given = tensors[name]
        # A copy: arrays read from files may be read-only, which torch cannot represent.
        tensor = (given if isinstance(given, Tensor) else torch.tensor(given)).to(torch.float32)
        if tensor.shape != parameter.shape:
            wrong.append(f"{name} is {tuple(tensor.shape)}, expected {tuple(parameter.shape)}")
        state[name] = tensor
    if wrong:
        raise CheckpointError(f"The checkpoint does not fit its config: {'; '.join(wrong[:20])} ({len(wrong)} in all).")
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)
