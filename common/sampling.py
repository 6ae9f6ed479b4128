"""Sets of points: choosing few of many, and descent among them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
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


def descend(values: NDArray[np.floating], near: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Find where steepest descent ends from every point.

    Args:
        values: [n].
        near: [n, n], the neighbours of each point, itself included.

    Returns:
        Indices [n] of points that have no lower neighbour.
    """
    lowest = np.where(near, values, np.inf).argmin(1)
    ends = np.arange(len(values))
    while not (lowest[ends] == ends).all():
        ends = lowest[ends]
    return ends
