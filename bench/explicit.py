"""`DinoWm.predict` as DINO-WM's code computes it, attention weights under a mask: the baseline of benchmarks, and a check."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from wmcache.trainer.models.attention import Block, gated, modulated, rotate
from wmcache.trainer.models.dino_wm import DinoWm


def explicit_predict(
    model: DinoWm, tokens: Tensor, embedding: Tensor, action: Tensor, pool: int = 1
) -> tuple[Tensor, Tensor]:
    """See `DinoWm.predict`; all queries meet all keys under a mask (models/vit.py)."""
    x, condition = model.join(tokens, embedding, action)
    x = x + model.position_of(range(tokens.shape[1]), pool)
    frame = torch.arange(x.shape[1], device=x.device).repeat_interleave(x.shape[2])
    age = frame[:, None] - frame[None, :]
    mask = (age >= 0) & (age < model.shape.history)
    for block in model.blocks:
        assert isinstance(block, Block)
        x = explicit_block(block, x, mask, condition)
    return model.split(x, tokens, embedding)


def explicit_block(block: Block, x: Tensor, mask: Tensor, condition: Tensor | None) -> Tensor:
    """See `Block.forward`; attention weights [B, heads, T * tokens, T * tokens] are computed and then masked."""
    frames = x.shape[1]
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = block.modulation(condition)
    normed = modulated(block.norm_attention(x), shift, scale)
    q, k, v = rearrange(block.qkv(normed), "b t n (three h c) -> three b h (t n) c", three=3, h=block.heads)
    if block.rotary:
        q, k = rotate(q, 0, frames), rotate(k, 0, frames)
    weights = torch.matmul(q, k.transpose(-1, -2)) * block.head_dim**-0.5
    attended = torch.matmul(weights.masked_fill(~mask, float("-inf")).softmax(-1), v)
    x = x + gated(block.out(rearrange(attended, "b h (t n) c -> b t n (h c)", t=frames)), gate)
    return x + gated(block.mlp(modulated(block.norm_mlp(x), shift_mlp, scale_mlp)), gate_mlp)
