"""An expert for mazes: follows the shortest path, and stops at the goal. It knows the maze, the state and the physics."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wmcache.envs.pointmaze.maze import Maze
from wmcache.envs.pointmaze.simulator import PointMazeSimulator

LOOK_AHEAD = 0.6
"""Distance along the path of the point that is steered to, in maze units."""
SPEED_GAIN = 8.0
"""Wanted speed for each unit of distance, per second."""
FORCE_GAIN = 0.8
"""Force for each unit of speed that is missing; a full force changes the speed by 1.2 in an env step."""


class PathFollower:
    """Steers a ball by proportional-derivative control to a point ahead on the shortest path."""

    def __init__(self, maze: Maze) -> None:
        """Compile the physics."""
        self._maze, self._simulator = maze, PointMazeSimulator(maze)

    def act(self, state: NDArray[np.float64], goal: NDArray[np.float64], steps: int) -> NDArray[np.float64]:
        """Return actions [steps, 2] in [-1, 1] that lead from a state [4] towards the position of `goal` [4]."""
        actions = np.empty((steps, 2))
        for i in range(steps):
            target = self._maze.toward(state[:2], goal[:2], LOOK_AHEAD)
            actions[i] = np.clip(steer(state, target), -1.0, 1.0)
            state = self._simulator.step(state, actions[i])
        return actions


def steer(state: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the force [2], not clipped, that leads from a state [4] to a target [2] in open space."""
    return np.asarray(FORCE_GAIN * (SPEED_GAIN * (target - state[:2]) - state[2:]))
