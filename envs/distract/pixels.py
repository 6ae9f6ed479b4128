"""Distraction of frames whose scene is not known: by their pixels."""

from __future__ import annotations

import colorsys

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wmcache.envs.distract.looks import Look

Frame = NDArray[np.uint8]
KINDS = ("colors", "background", "jitter")
HUES = 6
"""Groups of hues that get a colour each; another one is of greys."""
GREY = 40
"""Saturation of 255 below which a pixel counts as grey."""
DARKEST, PALEST = 50, 140
"""Least value and saturation of 255, so that black and white get a hue too."""


def distort(frame: Frame, look: Look) -> Frame:
    """Change a frame [H, W, 3] by its pixels."""
    changed = _recolour(frame, look) if "colors" in look.kinds else frame
    if "background" in look.kinds:
        changed = np.where(_background(frame)[..., None], look.background(*frame.shape[:2]), changed)
    if "jitter" in look.kinds:
        changed = _shift(changed, *look.shift)
    return np.ascontiguousarray(changed)


def _recolour(frame: Frame, look: Look) -> Frame:
    """Give each group of hues another hue, and greys one too; light and dark stay."""
    hsv = np.asarray(Image.fromarray(frame).convert("HSV")).astype(int)
    group = np.where(hsv[..., 1] < GREY, HUES, hsv[..., 0] * HUES // 256)
    hues = np.array([round(255 * colorsys.rgb_to_hsv(*colour)[0]) for colour in look.colours(HUES + 1)])
    raised = (hues[group], PALEST + hsv[..., 1] * (255 - PALEST) // 255, DARKEST + hsv[..., 2] * (255 - DARKEST) // 255)
    return np.asarray(Image.fromarray(np.stack(raised, -1).astype(np.uint8), "HSV").convert("RGB"))


def _shift(frame: Frame, right: float, down: float) -> Frame:
    """Move a frame by shares of its sides, in whole pixels; its edge is repeated."""
    rows, columns = (
        np.clip(np.arange(side) - round(share * side), 0, side - 1)
        for side, share in zip(frame.shape[:2], (down, right), strict=True)
    )
    return np.asarray(frame[np.ix_(rows, columns)])


def _background(frame: Frame) -> NDArray[np.bool_]:
    """Find the pixels of the most frequent colour, [H, W]."""
    packed = frame.astype(np.uint32) @ np.array([1, 256, 65536], np.uint32)
    colours, counts = np.unique(packed, return_counts=True)
    return np.asarray(packed == colours[counts.argmax()])
