"""The parts of DDP-WM (arXiv 2602.01780; models/ddp_predictor.py at 14aa459); `model.py` connects them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmcache.trainer.models import DataShape
from wmcache.trainer.models.attention import Block, CrossAttention, KeysValues

CELLS = 4  # of a patch, 2 x 2


class Vit(nn.Module):
    """Blocks over tokens of one frame with learned positions (DINO-WM, models/vit.py)."""

    def __init__(
        self, tokens: int, width: int, depth: int, heads: int, head_dim: int, mlp: int, dropout: float, std: float
    ) -> None:
        """Build the blocks, see `Block`; positions of `tokens` patches start with standard deviation `std`."""
        super().__init__()
        self.position = nn.Parameter(torch.randn(tokens, width) * std)
        self.blocks = nn.ModuleList(Block(width, heads, head_dim, mlp, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, patches: Tensor | None = None) -> Tensor:
        """[B, n, width] -> [B, n, width]; `patches` as for `placed`."""
        x = placed(x, self.position, patches)[:, None]
        for block in self.blocks:
            x, _ = block(x, window=1)
        normed: Tensor = self.norm(x[:, 0])
        return normed


class Fusion(nn.Module):
    """The newest frame attends to the frames before it."""

    def __init__(self, tokens: int, width: int, history: int, heads: int, dropout: float, std: float) -> None:
        """Build it for at most `history` frames, the newest included; see `Vit` for the other arguments."""
        super().__init__()
        self.norm = nn.LayerNorm(width)
        if history > 1:
            self.attention = CrossAttention(width, heads, dropout)
            self.query_position = nn.Parameter(torch.randn(tokens, width) * std)
            self.position = nn.Parameter(torch.randn(tokens, width) * std)
            self.age = nn.Parameter(torch.zeros(history - 1, width))

    def remember(self, frame: Tensor, patches: Tensor | None = None) -> KeysValues:
        """Return the keys and values of a frame [B, N, width]; they do not depend on its age. `patches` as for `placed`."""
        return self.attention.keys_values(placed(frame, self.position, patches), frame)

    def forward(self, frame: Tensor, past: Sequence[KeysValues], patches: Tensor | None = None) -> Tensor:
        """[B, N, width], and what was remembered of the frames before it, the oldest first -> [B, N, width]."""
        if not past:
            alone: Tensor = self.norm(frame)
            return alone
        # Keys are linear, so the part that depends on the age is added to those that are remembered.
        aged = self.attention.apart(F.linear(self.age, self.attention.k.weight)[:, None])
        keys = [one.keys + aged[age] for age, one in zip(reversed(range(len(past))), past, strict=True)]
        seen = KeysValues(torch.cat(keys, 2), torch.cat([one.values for one in past], 2))
        fused: Tensor = self.norm(frame + self.attention(placed(frame, self.query_position, patches), seen))
        return fused


class Localizer(nn.Module):
    """Predicts which cells of a fused frame are about to change."""

    def __init__(self, shape: DataShape, width: int, embeddings: int, vit: Callable[[int, int], Vit]) -> None:
        """Build it with `width` beside the dimensions of all `embeddings`; `vit` builds the blocks for so many tokens and width."""
        super().__init__()
        self.token_dim = shape.token_dim
        self.reduce = nn.Linear(shape.token_dim, width)
        width += embeddings
        self.vit = vit(shape.tokens, width)
        layers = [nn.Linear(width, out) for out in (width, width, CELLS)]
        self.head = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

    def forward(self, fused: Tensor, patches: Tensor | None = None) -> Tensor:
        """[B, N, width of the combined frame] -> logits [B, N, 4]; `patches` as for `placed`."""
        reduced = self.reduce(fused[..., : self.token_dim])
        x = torch.cat([reduced, fused[..., self.token_dim :].to(reduced.dtype)], -1)
        x = self.head[:-1](self.vit(x.float() if self.training else x, patches))
        # In bfloat16 many logits are equal, and the order of the largest would depend on the device.
        with torch.autocast(x.device.type, enabled=False):
            logits: Tensor = self.head[-1](x.float())
        return logits


class Correction(nn.Module):
    """The tokens that stay attend to those that change."""

    def __init__(self, tokens: int, width: int, primary_width: int, heads: int, std: float) -> None:
        """Build it for combined frames of `width`; see `Vit` for the other arguments."""
        super().__init__()
        self.project = nn.Linear(primary_width, width) if primary_width != width else nn.Identity()
        self.attention, self.norm = CrossAttention(width, heads, 0.0), nn.LayerNorm(width)
        self.position = nn.Parameter(torch.randn(tokens, width) * std)

    def forward(self, fused: Tensor, predicted: Tensor, chosen: Tensor, patches: Tensor | None = None) -> Tensor:
        """A fused frame [B, N, width], and the primary's output [B, K, primary_width] -> [B, N, width].

        Args:
            chosen: [B, K], patches of the primary's output. patches: of the frame, as for `placed`.
        """
        predicted = self.project(predicted)
        seen = self.attention.keys_values(placed(predicted, self.position, chosen), predicted)
        corrected: Tensor = self.norm(fused + self.attention(placed(fused, self.position, patches), seen))
        return corrected


def placed(x: Tensor, position: Tensor, patches: Tensor | None) -> Tensor:
    """Add positions [N, width] to [B, n, width] at patches [b, n], of which B / b rows in a row have the same; None: all N."""
    position = position.to(x.dtype)
    if patches is None:
        return x + position
    return (x.reshape(len(patches), -1, *x.shape[1:]) + position[patches][:, None]).reshape(x.shape)


def put(x: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """Return [B, N, d] with `values` [B, K, d] at indices [B, K]."""
    return x.scatter(1, indices[..., None].expand(-1, -1, x.shape[-1]), values.to(x.dtype))
