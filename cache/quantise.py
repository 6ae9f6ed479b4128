"""Tokens in a byte. Each channel of each shard has its own scale and middle, so that no value is clipped."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

LEVELS = 127
BLOCK = 2
"""Frames at once: their float32 values fit in the processor's cache, which is ten times as fast."""


def quantise(
    tokens: NDArray[np.float16],
) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.float32]]:
    """Return int8 [frames, N, D] of float16 tokens, and scale and middle of each channel, float32 [D].

    token = scale * stored + middle, up to half a scale; stored is in [-127, 127], so -128 can mean "missing".
    """
    low, high = tokens.min(axis=(0, 1)).astype(np.float32), tokens.max(axis=(0, 1)).astype(np.float32)
    middle = (low + high) / 2
    scale = (high - low) / (2 * LEVELS)
    scale[scale == 0] = 1.0
    stored = np.empty(tokens.shape, np.int8)
    for start in range(0, len(tokens), BLOCK):
        part = slice(start, start + BLOCK)
        stored[part] = np.clip(np.rint((tokens[part].astype(np.float32) - middle) / scale), -LEVELS, LEVELS)
    return stored, scale, middle


def dequantise(
    stored: NDArray[np.int8],
    scale: NDArray[np.float32],
    middle: NDArray[np.float32],
    out: NDArray[np.float16] | None = None,
) -> NDArray[np.float16]:
    """Return float16 tokens of int8 [n, N, D], with scale and middle of each frame's shard, [n, D]."""
    import torch  # slow to import, and not needed to list or verify stores

    out = np.empty(stored.shape, np.float16) if out is None else out
    steps, result = torch.from_numpy(np.require(stored, requirements="W")), torch.from_numpy(out)
    scales, middles = torch.tensor(scale), torch.tensor(middle)
    for start in range(0, len(stored), BLOCK):
        part = slice(start, start + BLOCK)
        result[part] = restore(steps[part], scales[part], middles[part])
    return out


def restore(stored: Tensor, scale: Tensor, middle: Tensor) -> Tensor:
    """Multiply out tokens [n, N, D] with scale and middle of each frame's shard, [n, D]; float32, on any device."""
    return stored * scale[:, None] + middle[:, None]
