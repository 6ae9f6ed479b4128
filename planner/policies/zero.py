"""Zero actions, a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from wmcache.planner.base import Observation, Reads
from wmcache.planner.context import EvalContext
from wmcache.planner.options import PlanOptions
from wmcache.planner.policies import PLAN_POLICIES


@PLAN_POLICIES.register("zero")
class ZeroPolicy:
    """A `Policy`: no action at all, so what the environment does by itself."""

    reads: ClassVar[Reads] = "nothing"

    def __init__(self, context: EvalContext, options: PlanOptions) -> None:
        """See `Policy`."""
        self.seconds, self.encoder_frames, self.decisions = 0.0, 0, 0
        self._shape = (options.execute, context.model.shape.action_dim)

    def reset(self, goal: Observation, generators: Sequence[torch.Generator]) -> None:  # noqa: ARG002
        """See `Policy`."""
        self._episodes = len(generators)

    def observe(self, observation: Observation) -> None:
        """See `Policy`."""

    def act(self) -> Tensor:
        """See `Policy`."""
        self.decisions += self._episodes
        return torch.zeros(self._episodes, *self._shape, dtype=torch.float64)
