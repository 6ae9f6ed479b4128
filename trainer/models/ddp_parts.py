"""The parts of DDP-WM (arXiv 2602.01780; models/ddp_predictor.py at 14aa459); `ddp_wm.py` says how they go together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmcache.trainer.models.attention import Block, CrossAttention, KeysValues
from wmcache.trainer.models.base import DataShape

CELLS = 4
"""Of a patch, 2 x 2."""


class Vit(nn.Module):
    """Blocks over tokens of one frame, each of which knows its place (DINO-WM, models/vit.py)."""

    def __init__(
        self, tokens: int, width: int, depth: int, heads: int, head_dim: int, mlp: int, dropout: float, deviation: float
    ) -> None:
        """Args: as of `Block`; `tokens` of a frame, `deviation` of the first positions."""
        super().__init__()
        self.position = nn.Parameter(torch.randn(tokens, width) * deviation)
        self.blocks = nn.ModuleList(Block(width, heads, head_dim, mlp, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, places: Tensor | None = None) -> Tensor:
        """[B, n, width] at some places [B, n] of a frame, or at all -> [B, n, width]."""
        x = (x + (self.position if places is None else self.position[places]))[:, None]
        for block in self.blocks:
            x, _ = block(x, window=1)
        normed: Tensor = self.norm(x[:, 0])
        return normed


class Fusion(nn.Module):
    """The newest frame, with what it finds in the frames before it."""

    def __init__(self, tokens: int, width: int, history: int, heads: int, dropout: float, deviation: float) -> None:
        """Args: as of `Vit` and `CrossAttention`; `history` frames at most, the newest included."""
        super().__init__()
        self.norm = nn.LayerNorm(width)
        if history > 1:
            self.attention = CrossAttention(width, heads, dropout)
            self.query_position = nn.Parameter(torch.randn(tokens, width) * deviation)
            self.position = nn.Parameter(torch.randn(tokens, width) * deviation)
            self.age = nn.Parameter(torch.zeros(history - 1, width))

    def remember(self, frame: Tensor) -> KeysValues:
        """What later frames ask of this one [B, N, width]; the same whatever its age."""
        return self.attention.keys_values(frame + self.position, frame)

    def forward(self, frame: Tensor, past: Sequence[KeysValues]) -> Tensor:
        """[B, N, width], and the frames before it as they are remembered, the oldest first -> [B, N, width]."""
        if not past:
            alone: Tensor = self.norm(frame)
            return alone
        # Keys are linear in what tells their age, so that is added to those that are remembered.
        aged = self.attention.apart(F.linear(self.age, self.attention.k.weight)[:, None])
        keys = [one.keys + aged[age] for age, one in zip(reversed(range(len(past))), past, strict=True)]
        seen = KeysValues(torch.cat(keys, 2), torch.cat([one.values for one in past], 2))
        fused: Tensor = self.norm(frame + self.attention(frame + self.query_position, seen))
        return fused


class Localiser(nn.Module):
    """Says which cells of a fused frame are about to change."""

    def __init__(
        self,
        shape: DataShape,
        embeddings: int,
        *,
        width: int,
        depth: int,
        heads: int,
        mlp: int,
        dropout: float,
        deviation: float,
    ) -> None:
        """Args: as of `Vit`; `width` beside the `embeddings`, dimensions of those of proprio and action together."""
        super().__init__()
        self.token_dim = shape.token_dim
        self.reduce = nn.Linear(shape.token_dim, width)
        head_dim, width = width // heads, width + embeddings
        self.vit = Vit(shape.tokens, width, depth, heads, head_dim, mlp, dropout, deviation)
        self.head = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CELLS)
        )

    def forward(self, fused: Tensor) -> Tensor:
        """[B, N, width of the combined frame] -> logits [B, N, 4]."""
        reduced = self.reduce(fused[..., : self.token_dim])
        x = torch.cat([reduced, fused[..., self.token_dim :].to(reduced.dtype)], -1)
        x = self.head[:-1](self.vit(x))
        # In bfloat16 many logits would be equal, and which of them are the largest a matter of the device.
        with torch.autocast(x.device.type, enabled=False):
            logits: Tensor = self.head[-1](x.float())
        return logits


class Correction(nn.Module):
    """What the tokens that stay find in those that change."""

    def __init__(self, tokens: int, width: int, of_primary: int, heads: int, deviation: float) -> None:
        """Args: `width` of the combined frame, `of_primary` of the primary predictor; the others as of `Vit`."""
        super().__init__()
        self.project = nn.Linear(of_primary, width) if of_primary != width else nn.Identity()
        self.attention, self.norm = CrossAttention(width, heads, 0.0), nn.LayerNorm(width)
        self.position = nn.Parameter(torch.randn(tokens, width) * deviation)

    def forward(self, fused: Tensor, predicted: Tensor, places: Tensor) -> Tensor:
        """A fused frame [B, N, width], and the primary's output [B, K, of_primary] at places [B, K] -> [B, N, width]."""
        predicted = self.project(predicted)
        seen = self.attention.keys_values(predicted + self.position[places], predicted)
        corrected: Tensor = self.norm(fused + self.attention(fused + self.position, seen))
        return corrected


def take(x: Tensor, places: Tensor) -> Tensor:
    """[B, N, d] at places [B, K] -> [B, K, d]."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


def put(x: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """[B, N, d] with `values` [B, K, d] at places [B, K]."""
    return x.scatter(1, places[..., None].expand(-1, -1, x.shape[-1]), values.to(x.dtype))
