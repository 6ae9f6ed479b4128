"""Transformer blocks over frames of tokens: causal between frames, full inside a frame, with keys and values that can be reused."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wmcache.common.device import attends_plainly

ROTARY_BASE = 10_000.0
CACHED_WEIGHTS = 2**21  # attention weights that exist at once on the CPU: 4 MiB of bfloat16


class KeysValues(NamedTuple):
    """Keys and values of the frames that a block has seen, each [B, heads, T * tokens, head_dim]."""

    keys: Tensor
    values: Tensor

    def repeat(self, copies: int) -> KeysValues:
        """Repeat each sequence of the batch `copies` times in a row."""
        return KeysValues(self.keys.repeat_interleave(copies, 0), self.values.repeat_interleave(copies, 0))


class Block(nn.Module):
    """Attention and MLP (DINO-WM, models/vit.py), with variants."""

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        mlp: int,
        dropout: float,
        *,
        conditioned: bool = False,
        rotary: bool = False,
        bias: bool = False,
        neighbours: bool = False,
        eps: float = 1e-5,
    ) -> None:
        """Build the block; `heads` times `head_dim` need not be the width of the residual stream.

        Args:
            conditioned: whether an adaptive layer norm (DiT, arXiv 2212.09748, adaLN-zero) takes a vector for each frame.
            rotary: whether queries and keys are rotated by the number of their frame (arXiv 2104.09864).
            bias: whether queries, keys and values have one.
            neighbours: whether positions of several axes are applied by `rotate_neighbours`, not by `rotate_axes`.
            eps: of the layer norms.
        """
        super().__init__()
        self.heads, self.head_dim, self.dropout, self.rotary = heads, head_dim, dropout, rotary
        self.rotate_axes = rotate_neighbours if neighbours else rotate_axes
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.qkv, self.out = nn.Linear(width, 3 * heads * head_dim, bias=bias), nn.Linear(heads * head_dim, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp), nn.GELU(), nn.Dropout(dropout), nn.Linear(mlp, width), nn.Dropout(dropout)
        )
        self.modulate = nn.Linear(width, 6 * width) if conditioned else None
        zero_init(self.modulate)

    def forward(
        self,
        x: Tensor,
        *,
        window: int,
        past: KeysValues | None = None,
        condition: Tensor | None = None,
        first: int = 0,
        positions: Tensor | None = None,
        only_keys: bool = False,
    ) -> tuple[Tensor, KeysValues]:
        """Run the block on frames that follow those of `past`.

        Args:
            x: [B, T, tokens, width]; a frame attends to itself and to the `window` - 1 frames before it. condition: [B, T, width].
            first: number of the first frame of `x`, for rotary positions.
            positions: [T * tokens, axes], or [b, T * tokens, axes], for rotary positions of several axes, see `rotate_axes`.
            only_keys: compute keys and values only, and return `x` unchanged.

        Returns:
            [B, T, tokens, width], and the keys and values of the newest frames that a following frame can attend to.
        """
        frames, tokens = x.shape[1:3]
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulation(condition)
        joined = self.qkv(modulated(self.norm_attention(x), shift, scale))
        # Contiguous, because joining and multiplying strided parts costs more than the copy.
        q, k, v = rearrange(joined, "b t n (three h c) -> three b h (t n) c", three=3, h=self.heads).contiguous()
        if self.rotary:
            q, k = rotate(q, first, frames), rotate(k, first, frames)
        if positions is not None:
            q, k = self.rotate_axes(q, positions), self.rotate_axes(k, positions)
        if past is not None:
            k, v = torch.cat([past.keys, k], 2), torch.cat([past.values, v], 2)
        oldest = max(0, k.shape[2] - (window - 1) * tokens)
        kept = KeysValues(k[:, :, oldest:].contiguous(), v[:, :, oldest:].contiguous())
        if only_keys:
            return x, kept
        dropout = self.dropout if self.training else 0.0
        attended = rearrange(attend(q, k, v, tokens, window, dropout), "b h (t n) c -> b t n (h c)", t=frames)
        x = x + gated(F.dropout(self.out(attended), self.dropout, self.training), gate)
        return x + gated(self.mlp(modulated(self.norm_mlp(x), shift_mlp, scale_mlp)), gate_mlp), kept

    def modulation(self, condition: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return shift, scale and gate of attention and of the MLP, [B, T, 1, width] each; None where the block is not conditioned."""
        if self.modulate is None or condition is None:
            return (None,) * 6
        parts: tuple[Tensor, ...] = self.modulate(F.silu(condition))[:, :, None].chunk(6, -1)
        return parts


def attend(q: Tensor, k: Tensor, v: Tensor, tokens: int, window: int, dropout: float = 0.0) -> Tensor:
    """Attend from each frame to itself and to the `window` - 1 frames before it.

    One call for each frame, on just the keys that it may see, costs less than a mask over all of them.

    Args:
        q: [B, heads, T * tokens, head_dim] of the newest T frames. k, v: [B, heads, K * tokens, head_dim], K >= T.
    """
    behind, parts = (k.shape[2] - q.shape[2]) // tokens, []
    for frame, own in enumerate(torch.split(q, tokens, 2)):
        stop = behind + frame + 1
        seen = slice(max(0, stop - window) * tokens, stop * tokens)
        parts.append(attend_all(own, k[:, :, seen], v[:, :, seen], dropout))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def attend_all(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, mask: Tensor | None = None) -> Tensor:
    """Attend from all queries to all keys, or to those that a mask [B or 1, 1, queries, keys] allows, by whichever kernel is faster."""
    if not attends_plainly(q):
        return F.scaled_dot_product_attention(q, k, v, mask, dropout)
    # A few sequences at a time, so that the weights stay in the processor's cache.
    some = max(1, CACHED_WEIGHTS // (q.shape[1] * q.shape[2] * k.shape[2]))
    with torch.autocast(q.device.type, enabled=False):
        parts = []
        for first in range(0, len(q), some):
            own, keys, values = (part[first : first + some] for part in (q, k, v))
            scores = torch.matmul(own * own.shape[-1] ** -0.5, keys.transpose(-1, -2))
            if mask is not None:
                scores = scores.masked_fill(~(mask if len(mask) == 1 else mask[first : first + some]), -torch.inf)
            parts.append(torch.matmul(F.dropout(scores.softmax(-1), dropout, training=dropout > 0), values))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def rotate(x: Tensor, first: int, frames: int) -> Tensor:
    """Rotate [B, heads, T * tokens, head_dim] by angles that grow with the number of the frame (arXiv 2104.09864); T: `frames`."""
    angle = angles(torch.arange(first, first + frames, device=x.device), x.shape[-1] // 2)
    return turn(x, angle.repeat_interleave(x.shape[2] // frames, 0))


def rotate_axes(x: Tensor, positions: Tensor) -> Tensor:
    """Rotate [B, heads, L, head_dim] by positions [L, axes], or [b, L, axes] where B / b sequences in a row have the same.

    Each axis has an equal share of the pairs of head_dim; the rest stays.
    """
    pairs = x.shape[-1] // 2
    angle = torch.cat([angles(axis, pairs // positions.shape[-1]) for axis in positions.unbind(-1)], -1)
    return turn(x, F.pad(angle, (0, pairs - angle.shape[-1])))


def rotate_neighbours(x: Tensor, positions: Tensor) -> Tensor:
    """Rotate as `rotate_axes`, but as V-JEPA 2's code (src/models/utils/modules.py, rotate_queries_or_keys).

    A pair is two neighbours, but its members have the angles of two frequencies, so that scores depend on positions and not only on
    their differences.
    """
    pairs = x.shape[-1] // positions.shape[-1] // 2
    each = [angles(axis, pairs) for axis in positions.unbind(-1)]
    angle = torch.cat([part for axis in each for part in (axis, axis)], -1)
    cosine, sine = for_heads(angle.cos().to(x.dtype), len(x)), for_heads(angle.sin().to(x.dtype), len(x))
    turned, rest = x[..., : angle.shape[-1]], x[..., angle.shape[-1] :]
    across = torch.stack([-turned[..., 1::2], turned[..., ::2]], -1).flatten(-2)
    return torch.cat([turned * cosine + across * sine, rest], -1)


def angles(positions: Tensor, pairs: int) -> Tensor:
    """Return the angles [..., pairs] of positions [...]."""
    frequency = ROTARY_BASE ** (-torch.arange(pairs, device=positions.device, dtype=torch.float32) / pairs)
    return positions[..., None] * frequency


def turn(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate the pairs of [B, heads, L, c] by angles [L, c / 2] or [b, L, c / 2], see `rotate_axes`."""
    cosine, sine = (for_heads(part.to(x.dtype), len(x)).unsqueeze(-2) for part in (angle.cos(), angle.sin()))
    pairs = rearrange(x, "b h l (two c) -> b h l two c", two=2)
    rotated = pairs * cosine + pairs.flip(-2) * torch.cat([-sine, sine], -2)
    return rearrange(rotated, "b h l two c -> b h l (two c)")


def for_heads(x: Tensor, count: int) -> Tensor:
    """Return what broadcasts over heads and `count` sequences: [L, c] as it is, [b, L, c] as [count, 1, L, c]."""
    return x if x.ndim == 2 else x.repeat_interleave(count // len(x), 0)[:, None]


def modulated(x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    """Scale and shift by what `Block.modulation` returns."""
    return x if shift is None or scale is None else x * (1 + scale) + shift


def gated(x: Tensor, gate: Tensor | None) -> Tensor:
    """Multiply by the gate that `Block.modulation` returns."""
    return x if gate is None else x * gate


def zero_init(*layers: nn.Linear | None) -> None:
    """Zero layers; a model of changes whose last ones are zero starts as the copying baseline."""
    for layer in filter(None, layers):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


class CrossAttention(nn.Module):
    """Attention from some tokens to others."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        """Build it for tokens of `width`, which `heads` need not divide, with `dropout` of attention weights."""
        super().__init__()
        self.heads, self.dropout = heads, dropout
        inner = heads * -(-width // heads)
        self.q, self.k, self.v = (nn.Linear(width, inner) for _ in range(3))
        self.out = nn.Linear(inner, width)

    def keys_values(self, keys: Tensor, values: Tensor) -> KeysValues:
        """Project tokens [B, n, width] to keys and values."""
        return KeysValues(self.apart(self.k(keys)), self.apart(self.v(values)))

    def forward(self, queries: Tensor, seen: KeysValues) -> Tensor:
        """[B, n, width] -> [B, n, width]."""
        if self.heads * seen.keys.shape[2] < queries.shape[2]:
            return self._attend_few(queries, seen)
        found = attend_all(self.apart(self.q(queries)), *seen, self.dropout if self.training else 0.0)
        joined: Tensor = self.out(rearrange(found, "b h n c -> b n (h c)"))
        return joined

    def _attend_few(self, queries: Tensor, seen: KeysValues) -> Tensor:
        """Project keys and values in place of queries and results: there are fewer, and no head is copied apart."""
        batch, _, _, size = seen.keys.shape
        # One product for each head, because a product for each sequence would copy the weights for each of them.
        each = [rearrange(part, "b h k c -> h (b k) c") for part in seen]
        q = rearrange(self.q.weight, "(h c) w -> h c w", c=size) * size**-0.5
        offset = rearrange(self.q.bias, "(h c) -> h c 1", c=size) * size**-0.5
        out = rearrange(self.out.weight, "w (h c) -> h c w", c=size)
        products = torch.matmul(each[0], q), torch.matmul(each[0], offset), torch.matmul(each[1], out)
        keys, offsets, values = (rearrange(part, "h (b k) w -> b (h k) w", b=batch) for part in products)
        scores = torch.matmul(queries, keys.mT) + offsets.mT
        weights = rearrange(scores, "b n (h k) -> b n h k", h=self.heads).softmax(-1).flatten(2)
        weights = F.dropout(weights, self.dropout, self.training)
        return torch.matmul(weights.to(values.dtype), values) + self.out.bias.to(values.dtype)

    def apart(self, x: Tensor) -> Tensor:
        """[B, n, heads * c] -> [B, heads, n, c]."""
        return rearrange(x, "b n (h c) -> b h n c", h=self.heads).contiguous()
