"""Tensor names of every published layout -> the classic ones of Hugging Face.

| classic                       | since transformers 4.52 / 5         | haotian-liu/LLaVA                            |
|-------------------------------|-------------------------------------|----------------------------------------------|
| language_model.model.layers.N | model.language_model.layers.N       | model.layers.N                               |
| language_model.lm_head        | lm_head                             | lm_head                                      |
| multi_modal_projector.linear_ | model.multi_modal_projector.linear_ | model.mm_projector.{0,2}, model.mm_projector |
| vision_tower.vision_model     | model.vision_tower[.vision_model]   | model.vision_tower.vision_tower.vision_model |

A CLIP folder of its own has `vision_model.*` beside a text tower; a vision tower alone has no prefix since 5.
No two layouts give one name two meanings.
"""

from __future__ import annotations

import re

from llava_edge.models.shapes import NEWLINE, TEXT_PREFIX, VISION_PREFIX

_BUFFERS = re.compile(r"rotary_emb\.inv_freq$|embeddings\.position_ids$")  # older transformers saved them
_RENAMED = (
    (re.compile(r"^model\.language_model\."), TEXT_PREFIX),
    (re.compile(r"^model\.(?=layers\.|embed_tokens\.|norm\.)"), TEXT_PREFIX),
    (re.compile(r"^lm_head\."), "language_model.lm_head."),
    (re.compile(r"^model\.multi_modal_projector\."), "multi_modal_projector."),
    (re.compile(r"^(model\.)?(vision_tower\.){1,2}(vision_model\.)?"), VISION_PREFIX),
    (re.compile(r"^vision_model\."), VISION_PREFIX),
    (
        re.compile(r"^(?=embeddings\.(class|patch|position)_|encoder\.layers\.|(pre_layrnorm|post_layernorm)\.)"),
        VISION_PREFIX,
    ),
    (re.compile(r"^model\.image_newline$"), NEWLINE),
)
_PROJECTOR = re.compile(r"^(?:model\.)?mm_projector\.(?:(\d+)\.)?(weight|bias)$")


def classic_name(name: str) -> str:
    """The classic name; names of no known layout are returned unchanged."""
    projector = _PROJECTOR.match(name)
    if projector:  # the modules of LLaVA's nn.Sequential: Linear 0, GELU 1, Linear 2, ...
        return f"multi_modal_projector.linear_{int(projector[1] or 0) // 2 + 1}.{projector[2]}"
    for pattern, replacement in _RENAMED:
        if pattern.match(name):
            return pattern.sub(replacement, name)
    return name


def is_buffer(name: str) -> bool:
    """Whether a stored tensor is a buffer computed from the configuration, which is never read."""
    return _BUFFERS.search(name) is not None
