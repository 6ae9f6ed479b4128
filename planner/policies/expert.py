"""The environment's own expert, a reference: it reads the simulator's state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from wmcache.envs.pointmaze.expert import PathFollower
from wmcache.planner.base import Observation, Reads
from wmcache.planner.context import EvalContext
from wmcache.planner.options import PlanOptions
from wmcache.planner.policies import PLAN_POLICIES


@PLAN_POLICIES.register("expert")
class ExpertPolicy:
    """A `Policy`: the actions of the environment's expert, from the states of now and of the goal."""

    reads: ClassVar[Reads] = "state"

    def __init__(self, context: EvalContext, options: PlanOptions) -> None:
        """See `Policy`."""
        self.seconds, self.encoder_frames, self.decisions = 0.0, 0, 0
        self._expert = PathFollower(context.maze)
        self._steps, self._frameskip = options.execute, context.frameskip

    def reset(self, goal: Observation, generators: Sequence[torch.Generator]) -> None:  # noqa: ARG002
        """See `Policy`."""
        assert goal.state is not None
        self._goal = goal.state

    def observe(self, observation: Observation) -> None:
        """See `Policy`."""
        assert observation.state is not None
        self._state = observation.state

    def act(self) -> Tensor:
        """See `Policy`."""
        steps = self._steps * self._frameskip
        pairs = zip(self._state, self._goal, strict=True)
        actions = np.stack([self._expert.act(state, goal, steps) for state, goal in pairs])
        self.decisions += len(actions)
        return torch.from_numpy(actions).view(len(actions), self._steps, -1)
