"""Tokens in a byte: each channel of each shard has a step and a middle of its own, so that no value is ever clipped."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LEVELS = 127
BLOCK = 16


def quantise(
    tokens: NDArray[np.float16],
) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.float32]]:
    """float16 [frames, N, D] -> int8 of the same shape, and the scale and middle of each channel, float32 [D].

    token = scale * stored + middle, up to half a scale; stored lies in [-127, 127], so -128 can mean "missing".
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
    """int8 [n, N, D] with scale and middle of each frame's shard, [n, D] -> float16 [n, N, D]."""
    if out is None:
        out = np.empty(stored.shape, np.float16)
    for start in range(0, len(stored), BLOCK):
        part = slice(start, start + BLOCK)
        out[part] = stored[part] * scale[part, None] + middle[part, None]
    return out
