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

    needs_goal: ClassVar[bool] = False
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
        count = self._steps * self._frameskip
        drawn = [draw_actions(rng, self._low, self._high, count, discrete=self._discrete) for rng in self._rngs]
        actions = np.stack(drawn)
        self.decisions += len(actions)
        return torch.from_numpy(actions).view(len(actions), self._steps, -1)


def draw_actions(
    rng: np.random.Generator, low: NDArray[np.float64], high: NDArray[np.float64], steps: int, *, discrete: bool
) -> NDArray[np.float64]:
    """Draw actions [steps, A] between the bounds [A], or one-hot ones, see `RandomPolicy`."""
    count = len(low)
    if discrete:
        return np.eye(count)[rng.integers(count, size=steps)]
    middle, half = (low + high) / 2, (high - low) / 2
    actions: NDArray[np.float64] = (middle + half * rng.normal(size=(steps, count))).clip(low, high)
    return actions
