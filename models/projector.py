"""The projector: CLIP features (.., vision width) -> language embeddings (.., hidden size).

`linear` is one Linear (LLaVA v1); `mlpNx_gelu` is Linear then N-1 times [GELU, Linear] (v1.5 has N = 2).
The GELU is the exact erf form. Names are Hugging Face's `linear_1`, `linear_2`, ...
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from llava_edge.models.config import LlavaConfig


class Projector(nn.Module):
    """The projector of llava/model/multimodal_projector/builder.py."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        width, hidden = config.vision.hidden_size, config.text.hidden_size
        self.depth = config.projector_layers
        for i in range(self.depth):
            self.add_module(f"linear_{i + 1}", nn.Linear(width if i == 0 else hidden, hidden))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.depth):
            x = self.get_submodule(f"linear_{i + 1}")(F.gelu(x) if i else x)
        return x
