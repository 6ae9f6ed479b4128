"""Descent over a finite set of points."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


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
