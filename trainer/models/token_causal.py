"""A transformer over a sequence of tokens, each of which sees itself and those before it, with keys and values that are kept."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wmcache.trainer.models.attention import ROTARY_BASE, KeysValues, attend_all


class Kept(NamedTuple):
    """What later tokens see of those before them.

    Attributes:
        layers: keys and values of each block, [B, heads, n, head_dim].
        known: bool [B, n], false for padding, which is not seen; None: all.
    """

    layers: tuple[KeysValues, ...]
    known: Tensor | None = None

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.layers[0].keys.shape[2]

    def newest(self, count: int) -> Kept:
        """Keep this many of the newest tokens."""
        first = max(0, self.length - count)
        layers = tuple(KeysValues(keys[:, :, first:], values[:, :, first:]) for keys, values in self.layers)
        return Kept(layers, None if self.known is None else self.known[:, first:])


class CausalBlock(nn.Module):
    """Attention and MLP of a pre-norm transformer; queries and keys are rotated by the time of their token (arXiv 2104.09864)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        """Take sizes; `heads` divides the width into even parts."""
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor], past: KeysValues | None, mask: Tensor | None
    ) -> tuple[Tensor, KeysValues]:
        """Run the block on tokens [B, L, width] that follow those of `past`; returns also keys and values of all of them.

        Args:
            turn: cosine and sine of the angles of the tokens, see `angles`.
            mask: see `attend_all`.
        """
        q, k, v = rearrange(self.qkv(self.norm_attention(x)), "b l (three h c) -> three b h l c", three=3, h=self.heads)
        q, k = turned(q, turn), turned(k, turn)
        if past is not None:
            k, v = torch.cat([past.keys.to(k.dtype), k], 2), torch.cat([past.values.to(v.dtype), v], 2)
        dropout = self.dropout if self.training else 0.0
        attended = rearrange(attend_all(q.contiguous(), k, v.contiguous(), dropout, mask), "b h l c -> b l (h c)")
        x = x + F.dropout(self.out(attended), self.dropout, self.training)
        return x + self.mlp(self.norm_mlp(x)), KeysValues(k, v)


class CausalTransformer(nn.Module):
    """Blocks and a final norm."""

    def __init__(self, width: int, depth: int, heads: int, dropout: float) -> None:
        """Take sizes."""
        super().__init__()
        self.depth, self.heads, self.head_dim = depth, heads, width // heads
        self.blocks = nn.ModuleList(CausalBlock(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, times: Tensor, past: Kept | None = None) -> tuple[Tensor, Kept]:
        """Run tokens [B, L, width] that follow those of `past`.

        Args:
            times: [B or 1, L]; attention depends on their differences.

        Returns:
            Outputs [B, L, width], and what later tokens see.
        """
        before = 0 if past is None else past.length
        known = None if past is None else past.known
        if known is not None:
            known = torch.cat([known, known.new_ones(x.shape[:2])], 1)
        mask = visible(x.shape[1], before, known, x.device)
        turn = angles(times, self.head_dim)
        layers = []
        for number, block in enumerate(self.blocks):
            x, seen = block(x, turn, None if past is None else past.layers[number], mask)
            layers.append(seen)
        return self.norm(x), Kept(tuple(layers), known)


def visible(new: int, before: int, known: Tensor | None, device: torch.device) -> Tensor | None:
    """Return a mask [B or 1, 1, new, before + new] of what new tokens see; None where that is all."""
    if new == 1:
        return None if known is None else known[:, None, None]
    causal = torch.ones(new, before + new, dtype=torch.bool, device=device).tril(before)[None, None]
    return causal if known is None else causal & known[:, None, None]


def angles(times: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Return cosine and sine [B, 1, L, head_dim / 2] of the angles of times [B, L]."""
    half = head_dim // 2
    frequency = ROTARY_BASE ** (-torch.arange(half, device=times.device, dtype=torch.float32) / half)
    angle = (times.float()[..., None] * frequency)[:, None]
    return angle.cos(), angle.sin()


def turned(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate [B, heads, L, head_dim]."""
    (first, second), (cosine, sine) = x.chunk(2, -1), (part.to(x.dtype) for part in turn)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)
