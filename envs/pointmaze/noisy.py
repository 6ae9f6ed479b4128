"""The U-maze with noisy motors: what a recorded action does is random, so predictions of it are never exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from wmcache.envs.base import ENVIRONMENTS, Observation, Steps, Task
from wmcache.envs.pointmaze.environment import PointMaze, generator_of

NAME = "NoisyUMaze"
SIGMA = 0.3
"""Standard deviation of the noise of each motor, where actions are in [-1, 1]."""


@ENVIRONMENTS.register(NAME)
class NoisyPointMaze(PointMaze):
    """PointMaze whose motors add Gaussian noise to each action. The noise is a function of the start and the env step."""

    def __init__(self, name: str, count: int = 1, image_size: int = 224, layout: Sequence[str] = ()) -> None:  # noqa: ARG002
        """See `PointMaze`."""
        super().__init__("UMaze", count, image_size, layout)
        self.spec = replace(self.spec, id=NAME, dataset="pointmaze-noisy-umaze")
        self._noise: list[np.random.Generator] = []

    @classmethod
    def accepts(cls, name: str, layout: Sequence[str] = ()) -> bool:  # noqa: ARG003
        """Accept no other name."""
        return False

    def reset(self, tasks: Sequence[Task]) -> Observation:
        """See `PointMaze`."""
        seen = super().reset(tasks)
        self._noise = [generator_of(state) for state in self._states]
        return seen

    def step(self, actions: NDArray[np.floating]) -> Steps:
        """Push, with noise."""
        noise = [one.normal(0.0, SIGMA, actions.shape[1:]) for one in self._noise]
        return super().step(actions + np.stack(noise))
