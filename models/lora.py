"""Low-rank adapters (LoRA) on every Linear of the language model's blocks: W x + (alpha / r) B A x.

The large weights stay frozen, in bfloat16, which the processor multiplies fastest; A and B are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llava_edge.models.llama import Llama


class LoraLinear(nn.Module):
    """A frozen Linear with a trainable low-rank update that starts at zero."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = base.weight  # (out, in), frozen
        self.scale = alpha / rank
        bound = base.in_features**-0.5
        self.lora_A = nn.Parameter((torch.rand(rank, base.in_features, generator=generator) * 2 - 1) * bound)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + F.linear(F.linear(x, self.lora_A), self.lora_B * self.scale)


def add_lora(model: Llama, rank: int, alpha: float, seed: int) -> None:
    """Replace every Linear of the blocks by a `LoraLinear`, in place."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        for parent in (layer.get_submodule("self_attn"), layer.get_submodule("mlp")):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, LoraLinear(child, rank, alpha, generator))


def lora_modules(model: nn.Module) -> dict[str, LoraLinear]:
    """Adapters by the name of the Linear they replace."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Merge every adapter into its weight, which becomes a plain Linear again."""
    for name, adapter in lora_modules(model).items():
        parent, _, child = name.rpartition(".")
        out_features, in_features = adapter.weight.shape
        linear = nn.Linear(in_features, out_features, bias=False)
        linear.weight = nn.Parameter(adapter.weight.float() + adapter.scale * adapter.lora_B @ adapter.lora_A, False)
        setattr(model.get_submodule(parent), child, linear)
