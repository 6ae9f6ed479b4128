"""Random actions, a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wmcache.planner.base import Observation, Reads
from wmcache.planner.context import EvalContext
from wmcache.planner.options import PlanOptions
from wmcache.planner.policies import PLAN_POLICIES


@PLAN_POLICIES.register("random")
class RandomPolicy:
    """A `Policy`: normal actions around the middle of the bounds, clipped to them, or uniform one-hot ones.

    They depend on the seed of the episode's generator alone.
    """

    reads: ClassVar[Reads] = "nothing"

    def __init__(self, context: EvalContext, options: PlanOptions) -> None:
        """See `Policy`."""
        self.seconds, self.encoder_frames, self.decisions = 0.0, 0, 0
        self._steps, self._frameskip = options.execute, context.frameskip
        self._low, self._high = (bound.astype(np.float64) for bound in context.action_bounds)
        self._discrete = context.discrete

    def reset(self, goal: Observation, generators: Sequence[torch.Generator]) -> None:  # noqa: ARG002
        """See `Policy`."""
        # Not the generator of start and goal, so that the actions do not depend on them.
        self._rngs = [np.random.default_rng((generator.initial_seed(), 1)) for generator in generators]

    def observe(self, observation: Observation) -> None:
        """See `Policy`."""

    def act(self) -> Tensor:
        """See `Policy`."""
        actions = np.stack([self._draw(rng, self._steps * self._frameskip) for rng in self._rngs])
        self.decisions += len(actions)
        return torch.from_numpy(actions).view(len(actions), self._steps, -1)

    def _draw(self, rng: np.random.Generator, steps: int) -> NDArray[np.float64]:
        count = len(self._low)
        if self._discrete:
            return np.eye(count)[rng.integers(count, size=steps)]
        middle, half = (self._low + self._high) / 2, (self._high - self._low) / 2
        actions: NDArray[np.float64] = (middle + half * rng.normal(size=(steps, count))).clip(self._low, self._high)
        return actions
