"""LLaMA in PyTorch: RMSNorm, rotary embedding, grouped-query attention, SwiGLU, tied or untied head.

Works on embeddings, because LLaVA splices image features between them. Names are Hugging Face's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llava_edge.models.config import TextConfig


class RMSNorm(nn.Module):
    """x / rms(x) * weight, with the statistics in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rotary(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Positions (B, T) -> cos and sin, each (B, 1, T, head_dim) float32, in the layout of "rotate half"."""
    inverse = theta ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    angles = positions[:, None, :, None].float() * inverse
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding to (B, heads, T, head_dim)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


@dataclass(frozen=True)
class Context:
    """Rotary embedding and attention mask, shared by all layers."""

    cos: Tensor
    sin: Tensor
    mask: Tensor | None  # (B, 1, T, T) bool, True where attended; None = causal


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Unfused attention, softmax in float32: for packs of up to about 200 positions its backward pass is faster on a
    CPU than that of torch's fused kernel with a mask (one measured step of 16 packs: 6.9 s instead of 8.4 s)."""
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, -1, dtype=torch.float32).to(v.dtype) @ v


class Attention(nn.Module):
    """Causal grouped-query attention without biases."""

    def __init__(self, c: TextConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, c.hidden_size, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        b, t, _ = x.shape
        q = rotate(self.q_proj(x).view(b, t, self.heads, -1).transpose(1, 2), context.cos, context.sin)
        k = rotate(self.k_proj(x).view(b, t, self.kv_heads, -1).transpose(1, 2), context.cos, context.sin)
        v = self.v_proj(x).view(b, t, self.kv_heads, -1).transpose(1, 2)
        group = self.heads // self.kv_heads
        queries, keys = q.to(v.dtype), k.repeat_interleave(group, dim=1).to(v.dtype)
        values = v.repeat_interleave(group, dim=1)
        if context.mask is None:
            out = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        else:
            out = masked_attention(queries, keys, values, context.mask)
        merged: Tensor = self.o_proj(out.transpose(1, 2).reshape(b, t, -1))
        return merged


class MLP(nn.Module):
    """SwiGLU: down(silu(gate) * up)."""

    def __init__(self, c: TextConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, c: TextConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), context)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Decoder(nn.Module):
    """Embedding table, blocks, final norm."""

    def __init__(self, c: TextConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Llama(nn.Module):
    """The language model. `hidden` returns normalized hidden states; `logits` applies the (tied or untied) head."""

    def __init__(self, c: TextConfig) -> None:
        super().__init__()
        self.config = c
        self.model = Decoder(c)
        self.lm_head = None if c.tie_word_embeddings else nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def hidden(self, embeds: Tensor, *, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) embeddings -> (B, T, D) normalized hidden states.

        `positions` (B, T) and `mask` (B, 1, T, T) replace the causal default; the trainer uses them to evaluate
        several conversations about one shared picture.
        """
        if positions is None:
            positions = torch.arange(embeds.shape[1])[None]
        cos, sin = rotary(positions, self.config.head_dim, self.config.rope_theta)
        context = Context(cos.to(embeds.dtype), sin.to(embeds.dtype), mask)
        x = embeds
        for layer in self.model.layers:
            x = layer(x, context)
        normed: Tensor = self.model.norm(x)
        return normed

    def logits(self, states: Tensor) -> Tensor:
        """(.., D) -> (.., vocab)."""
        head = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return F.linear(states, head)
