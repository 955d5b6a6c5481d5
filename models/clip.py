"""CLIP's vision transformer in PyTorch, up to the hidden state that LLaVA reads.

pixels (B, 3, S, S) float -> features (B, image_tokens, width), and on request the class token's attention to each.
Knows nothing about files or language.
Attribute names are Hugging Face's, so state dicts carry over under the prefix `vision_tower.vision_model.`.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llava_edge.models.config import LlavaConfig, VisionConfig


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI CLIP's activation, x * sigmoid(1.702 x); neither the erf nor the tanh GELU."""
    return x * torch.sigmoid(1.702 * x)


class Embeddings(nn.Module):
    """Patch convolution without bias, class token first, learned position embeddings (row 0 is the class token's)."""

    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(c.hidden_size))
        self.patch_embedding = nn.Conv2d(3, c.hidden_size, c.patch_size, stride=c.patch_size, bias=False)
        # Drawing random values on the device "meta" would import all of torch.compile, for seconds.
        positions = torch.zeros(c.grid**2 + 1, c.hidden_size)
        self.position_embedding: nn.Embedding = nn.Embedding.from_pretrained(positions, freeze=False)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, grid*grid, D), row-major
        cls = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat([cls, patches], dim=1) + self.position_embedding.weight


class Attention(nn.Module):
    """Multi-head self-attention, every projection with bias."""

    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        self.heads = c.num_attention_heads
        self.q_proj = nn.Linear(c.hidden_size, c.hidden_size)
        self.k_proj = nn.Linear(c.hidden_size, c.hidden_size)
        self.v_proj = nn.Linear(c.hidden_size, c.hidden_size)
        self.out_proj = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (
            proj(x).view(b, t, self.heads, d // self.heads).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(q, k, v)  # scales by head_dim ** -0.5
        merged: Tensor = self.out_proj(out.transpose(1, 2).reshape(b, t, d))
        return merged

    def class_attention(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T): the class token's attention to every token, averaged over the heads."""
        b, t, d = x.shape
        q, k = (proj(x).view(b, t, self.heads, d // self.heads) for proj in (self.q_proj, self.k_proj))
        scores = torch.einsum("bhd,bthd->bht", q[:, 0], k) * (d // self.heads) ** -0.5
        attention: Tensor = scores.softmax(-1).mean(1)
        return attention


class MLP(nn.Module):
    """fc1, quick-GELU, fc2."""

    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(c.hidden_size, c.intermediate_size)
        self.fc2 = nn.Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(quick_gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.self_attn = Attention(c)
        self.layer_norm2 = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class Encoder(nn.Module):
    """The blocks up to the selected layer; later ones are never built."""

    def __init__(self, c: VisionConfig, blocks: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(c) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class VisionTower(nn.Module):
    """CLIP up to the selected layer, optionally without the class token and with neighbouring patches averaged."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        _avoid_machine_code()
        c = config.vision
        self.config = config
        self.embeddings = Embeddings(c)
        self.pre_layrnorm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)  # the name's typo is CLIP's
        self.encoder = Encoder(c, config.vision_blocks)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, image_tokens, D)."""
        return self._select_tokens(self.encoder(self.pre_layrnorm(self.embeddings(pixels))))

    def forward_with_attention(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Also return the class token's attention in the last block, (B, image_tokens). Needs at least one block."""
        x = self.pre_layrnorm(self.embeddings(pixels))
        for block in self.encoder.layers[:-1]:
            x = block(x)
        last = self.encoder.layers[-1]
        assert isinstance(last, Block)
        attention = last.self_attn.class_attention(last.layer_norm1(x))
        return self._select_tokens(last(x)), self._select_tokens(attention[..., None])[..., 0]

    def _select_tokens(self, x: Tensor) -> Tensor:
        """(B, T, D) of all tokens -> (B, image_tokens, D) of those that LLaVA reads."""
        if self.config.feature == "patch":
            x = x[:, 1:]
        return pool_patches(x, self.config.vision.grid, self.config.image_pool)


def pool_patches(x: Tensor, grid: int, pool: int) -> Tensor:
    """(B, grid*grid, D) -> (B, (grid/pool)**2, D): mean over pool x pool neighbours, row-major."""
    if pool == 1:
        return x
    b, _, d = x.shape
    side = grid // pool
    return x.view(b, side, pool, side, pool, d).mean(dim=(2, 4)).reshape(b, side * side, d)


def _avoid_machine_code() -> None:
    """Let torch compute without oneDNN where no machine code may be made, as in a service with
    MemoryDenyWriteExecute."""
    try:
        mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()
    except PermissionError:
        torch.backends.mkldnn.set_flags(False)
