"""`DinoWm.predict` as DINO-WM's code has it, attention weights written out under a mask: what ours is measured against, and checked by."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from wmcache.trainer.models.attention import gated, modulated, rotate


def explicit_predict(model: Any, tokens: Tensor, code: Tensor, action: Tensor, pool: int = 1) -> tuple[Tensor, Tensor]:
    """`DinoWm.predict` with attention weights written out, under a mask, as the reference has it (models/vit.py)."""
    x, condition = model._join(tokens, code, action)
    x = x + model._position(range(tokens.shape[1]), pool)
    frame = torch.arange(x.shape[1], device=x.device).repeat_interleave(x.shape[2])
    age = frame[:, None] - frame[None, :]
    mask = (age >= 0) & (age < model.shape.history)
    for block in model.blocks:
        x = explicit_block(block, x, mask, condition)
    following: tuple[Tensor, Tensor] = model._split(x, tokens, code)
    return following


def explicit_block(block: Any, x: Tensor, mask: Tensor, condition: Tensor | None) -> Tensor:
    """A `Block` by the book: all queries meet all keys, and the mask takes back what they should not have seen."""
    frames = x.shape[1]
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = block._modulation(condition)
    normed = modulated(block.norm_attention(x), shift, scale)
    q, k, v = rearrange(block.qkv(normed), "b t n (three h c) -> three b h (t n) c", three=3, h=block.heads)
    if block.rotary:
        q, k = rotate(q, 0, frames), rotate(k, 0, frames)
    weights = torch.matmul(q, k.transpose(-1, -2)) * block.head_dim**-0.5
    attended = torch.matmul(weights.masked_fill(~mask, float("-inf")).softmax(-1), v)
    x = x + gated(block.out(rearrange(attended, "b h (t n) c -> b t n (h c)", t=frames)), gate)
    return x + gated(block.mlp(modulated(block.norm_mlp(x), shift_mlp, scale_mlp)), gate_mlp)
