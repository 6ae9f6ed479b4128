"""Baselines: what actions that look at nothing reach in the same episodes. Physics alone, so they cost a second."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from wmcache.envs import Maze, PointMazeSimulator
from wmcache.planner.episodes import Episodes

Actions = Callable[[int, int], NDArray[np.float64]]
"""(number of the episode, env steps) -> actions [env steps, 2] in [-1, 1]."""


def random_actions(number: int, steps: int) -> NDArray[np.float64]:
    """A fresh standard normal action at every env step, clipped to the bounds; of a generator of its own for each episode."""
    # Another generator than that of start and goal, so that the actions do not depend on them.
    return np.clip(np.random.default_rng((99 * number + 1, 1)).normal(size=(steps, 2)), -1.0, 1.0)


def zero_actions(number: int, steps: int) -> NDArray[np.float64]:  # noqa: ARG001 (as its like)
    """No force: the ball moves on with the velocity that it starts with."""
    return np.zeros((steps, 2))


BASELINES: dict[str, Actions] = {"random": random_actions, "zero": zero_actions}


def run_baseline(
    name: str,
    maze: Maze,
    start: NDArray[np.float64],
    goal: NDArray[np.float64],
    numbers: Sequence[int],
    budget: int,
    chunk: int,
) -> Episodes:
    """Act in some episodes without a planner, and without drawing a frame.

    Args:
        name: in BASELINES. maze: where.
        start, goal: states [E, 4] of the episodes. numbers: of the episodes, [E].
        budget: env steps of each. chunk: env steps between those after which the judge looks, as of the planner that is compared.
    """
    simulator = PointMazeSimulator(maze)
    states = np.empty((len(start), budget, 4))
    for i, number in enumerate(numbers):
        state = start[i]
        for step, action in enumerate(BASELINES[name](number, budget)):
            state = states[i, step] = simulator.step(state, action)
    return Episodes(start, goal, states, chunk, encoder_frames=0, replans=0, seconds=0.0)
