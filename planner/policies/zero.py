"""Zero actions, a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wmcache.planner.base import Observation, Reads
from wmcache.planner.context import EvalContext
from wmcache.planner.options import PlanOptions
from wmcache.planner.policies import PLAN_POLICIES


@PLAN_POLICIES.register("zero")
class ZeroPolicy:
    """A `Policy`: the action nearest to zero, or the first of discrete ones, so what the environment does by itself."""

    needs_goal: ClassVar[bool] = False
    reads: ClassVar[Reads] = "nothing"

    def __init__(self, context: EvalContext, options: PlanOptions) -> None:
        """See `Policy`."""
        self.seconds, self.encoder_frames, self.decisions = 0.0, 0, 0
        low, high = context.action_bounds
        action = zero_action(low, high, discrete=context.discrete)
        self._actions = torch.from_numpy(np.tile(action, (options.execute, context.frameskip)))

    def reset(self, goal: Observation, generators: Sequence[torch.Generator]) -> None:  # noqa: ARG002
        """See `Policy`."""
        self._episodes = len(generators)

    def observe(self, observation: Observation) -> None:
        """See `Policy`."""

    def act(self) -> Tensor:
        """See `Policy`."""
        self.decisions += self._episodes
        return self._actions.repeat(self._episodes, 1, 1)


def zero_action(low: NDArray[Any], high: NDArray[Any], *, discrete: bool) -> NDArray[np.float64]:
    """Return the action [A] nearest to zero between the bounds [A], or the first one-hot one."""
    action: NDArray[np.float64] = np.eye(len(low))[0] if discrete else np.zeros(len(low)).clip(low, high)
    return action
