"""Behaviour policies that see the state and know the maze: OGBench's data styles (data_gen_scripts/generate_locomaze.py)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wmcache.envs.base import Environment, Steps
from wmcache.envs.pointmaze.cells import Cells
from wmcache.envs.pointmaze.expert import steer
from wmcache.envs.pointmaze.maze import Maze
from wmcache.envs.pointmaze.tasks import near

NOISE = 0.5
"""Standard deviation of the noise of an action, which is in [-1, 1]."""
ARRIVED = 0.25
"""Distance to the goal below which it is reached, in cells."""
STITCH_CELLS = 4
"""Moves from a start's cell to its goal's."""

Float = NDArray[np.float64]


class Navigate:
    """Walks to a random goal, then to the next, from cell to cell along shortest paths, with Gaussian noise on every action.

    Teleporters are floor to it: it enters one where the path leads through. Where a teleporter has led to a closed room, it stays there.
    """

    def __init__(self, rng: np.random.Generator, env: Environment) -> None:
        """Draw goals and noise from `rng`."""
        assert isinstance(env.geometry, Maze)
        self._rng, self._cells = rng, Cells(env.geometry)
        self._goal: Float | None = None

    def __call__(self, seen: Steps) -> NDArray[np.float32]:
        """Return the action [2] in a state."""
        state = seen["state"]
        if self._goal is None or self._is_done(state, self._goal):
            cell = self._draw_goal(self._cells.number_of(state[:2]))
            self._goal = near(self._cells.centres[cell], self._rng)
            self._lengths = self._cells.lengths(cell)
        action = steer(state, self._next_point(state, self._goal)) + self._rng.normal(0.0, NOISE, 2)
        return action.clip(-1.0, 1.0).astype(np.float32)

    def _draw_goal(self, here: int) -> int:  # noqa: ARG002 (for those that depend on it)
        """Draw the cell of a goal for a ball in a cell: any but hallways, as OGBench does."""
        return int(self._rng.choice(self._cells.corners))

    def _is_done(self, state: Float, goal: Float) -> bool:
        return float(np.linalg.norm(state[:2] - goal)) < ARRIVED

    def _next_point(self, state: Float, goal: Float) -> Float:
        """Return the centre of the next cell on the way, the goal in its own cell, and the ball's place where no path leads."""
        here = self._cells.number_of(state[:2])
        if self._lengths[here] == 0:
            return goal
        if np.isinf(self._lengths[here]):
            return np.asarray(state[:2])
        around = self._cells.neighbours(here)
        return np.asarray(self._cells.centres[around[self._lengths[around].argmin()]])


class Stitch(Navigate):
    """Walks to one goal, a few cells away, and stays there: long routes have to be composed of several episodes."""

    def _draw_goal(self, here: int) -> int:
        """Draw a cell exactly STITCH_CELLS moves away; the ball's own where there is none."""
        ends = np.flatnonzero(self._cells.lengths(here) == STITCH_CELLS)
        return int(self._rng.choice(ends)) if len(ends) else here

    def _is_done(self, state: Float, goal: Float) -> bool:  # noqa: ARG002
        return False
