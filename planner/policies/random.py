"""Random actions, a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from wmcache.planner.base import Observation, Reads
from wmcache.planner.context import EvalContext
from wmcache.planner.options import PlanOptions
from wmcache.planner.policies import PLAN_POLICIES


@PLAN_POLICIES.register("random")
class RandomPolicy:
    """A `Policy`: normal actions, clipped to the bounds, which depend on the episode's generator alone."""

    reads: ClassVar[Reads] = "nothing"

    def __init__(self, context: EvalContext, options: PlanOptions) -> None:
        """See `Policy`."""
        self.seconds, self.encoder_frames, self.decisions = 0.0, 0, 0
        self._steps, self._frameskip = options.execute, context.frameskip
        self._low, self._high = context.action_bounds

    def reset(self, goal: Observation, generators: Sequence[torch.Generator]) -> None:  # noqa: ARG002
        """See `Policy`."""
        # Not the generator of start and goal, so that the actions do not depend on them.
        self._rngs = [np.random.default_rng((generator.initial_seed(), 1)) for generator in generators]

    def observe(self, observation: Observation) -> None:
        """See `Policy`."""

    def act(self) -> Tensor:
        """See `Policy`."""
        shape = (self._steps * self._frameskip, len(self._low))
        actions = np.stack([rng.normal(size=shape).clip(self._low, self._high) for rng in self._rngs])
        self.decisions += len(actions)
        return torch.from_numpy(actions).view(len(actions), self._steps, -1)
