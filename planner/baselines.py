"""Baselines: actions that depend on no observation, in the same episodes. They need physics alone, so they take a second."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from wmcache.envs import Maze, PointMazeSimulator
from wmcache.planner.episodes import Episodes

Actions = Callable[[int, int], NDArray[np.float64]]
"""(number of the episode, env steps) -> actions [env steps, 2] in [-1, 1]."""


def random_actions(number: int, steps: int) -> NDArray[np.float64]:
    """Draw a standard normal action at every env step, clipped to the bounds, from the episode's own generator."""
    # Not the generator of start and goal, so that the actions do not depend on them.
    return np.clip(np.random.default_rng((99 * number + 1, 1)).normal(size=(steps, 2)), -1.0, 1.0)


def zero_actions(number: int, steps: int) -> NDArray[np.float64]:  # noqa: ARG001 (the signature of `Actions`)
    """Apply no force: the ball keeps moving with its first velocity."""
    return np.zeros((steps, 2))


BASELINES: dict[str, Actions] = {"random": random_actions, "zero": zero_actions}


def run_baseline(name: str, maze: Maze, planned: Episodes, numbers: Sequence[int]) -> Episodes:
    """Act in the starts, goals, budget and chunks of planned episodes with these numbers, without rendering a frame."""
    simulator = PointMazeSimulator(maze)
    states = np.empty_like(planned.states)
    for i, number in enumerate(numbers):
        state = planned.start[i]
        for step, action in enumerate(BASELINES[name](number, states.shape[1])):
            state = states[i, step] = simulator.step(state, action)
    return Episodes(planned.start, planned.goal, states, planned.chunk, encoder_frames=0, replans=0, seconds=0.0)
