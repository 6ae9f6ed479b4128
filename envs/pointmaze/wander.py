"""A second ball for distraction: it rolls through the maze by itself and touches nothing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wmcache.envs.pointmaze.maze import CENTRE, Maze

SPEED = (0.05, 0.15)
"""Cells that it rolls in an env step; random actions move the other ball about as fast."""


def wander(maze: Maze, rng: np.random.Generator, step: int) -> NDArray[np.float64]:
    """Return the position [2] after some env steps of a ball that rolls from cell to free cell, and turns back in dead ends only.

    Args:
        rng: of the episode, from its start.
    """
    free = {(int(row), int(column)) for row, column in np.argwhere(maze.free)}
    rolled = step * rng.uniform(*SPEED)
    here = before = sorted(free)[rng.integers(len(free))]
    for _ in range(int(rolled) + 1):
        row, column = here
        around = [
            cell
            for cell in ((row - 1, column), (row, column - 1), (row, column + 1), (row + 1, column))
            if cell in free
        ]
        onward = [cell for cell in around if cell != before] or around or [here]
        before, here = here, onward[rng.integers(len(onward))]
    start, end = np.array(before, np.float64), np.array(here, np.float64)
    return np.asarray(start + (rolled % 1.0) * (end - start) - CENTRE)
