"""Choosing few of many points."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def farthest_points(distances: Callable[[int], Tensor], count: int, first: int = 0) -> list[int]:
    """Choose points that cover a set: each is the farthest from those chosen before it (Gonzalez 1985).

    Args:
        distances: index of a point -> its distances to all points, [n]; a negative one excludes a point.
    """
    chosen, nearest = [first], distances(first)
    while len(chosen) < count:
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, distances(chosen[-1]))
    return chosen
