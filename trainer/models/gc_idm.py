"""Goal-conditioned inverse dynamics: the actions that lead from one latent to another within a known number of model steps.

After GC-IDM, which acts by one forward pass on embeddings in place of a search (Latent Geometry Beyond Search).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from wmcache.cache.windows import Goals
from wmcache.common.errors import UserError
from wmcache.common.options import Positive, option
from wmcache.common.schema import Size
from wmcache.trainer.models import MODELS
from wmcache.trainer.models.actions import ActionOptions, GoalReacher
from wmcache.trainer.models.trainable import DataShape


@dataclass(frozen=True)
class GcIdmOptions(ActionOptions):
    """Options of GC-IDM."""

    goal_horizon: Size = option(5, "Model steps between a frame and its goal in training, at most.")
    reach: Positive = option(1, "Model steps in which a goal is to be reached when the policy acts.")

    def __post_init__(self) -> None:
        """Refuse options that do not go together."""
        if self.reach > self.goal_horizon:
            raise UserError(f"--reach {self.reach} is more than --goal-horizon {self.goal_horizon}; lower it")


@MODELS.register("gc-idm")
class GcIdm(GoalReacher):
    """Random actions teach it short distances; farther goals are reached through frames on the way, see `planner.policies.actor`."""

    Options = GcIdmOptions
    options: GcIdmOptions

    def __init__(self, shape: DataShape, options: GcIdmOptions, statistics: Mapping[str, Tensor]) -> None:
        """See `Trainable`."""
        super().__init__(shape, options, statistics, more=options.goal_horizon)

    @classmethod
    def goals(cls, options: Any) -> Goals:
        """See `Trainable.goals`."""
        return Goals(horizon=options.goal_horizon)

    def describe(self, steps: Tensor) -> Tensor:
        """See `GoalReacher.describe`."""
        return F.one_hot(steps - 1, self.options.goal_horizon).float()

    def act(self, tokens: Tensor, proprio: Tensor, goal: Tensor) -> Tensor:
        """See `ActionModel.act`."""
        return self.decide(tokens, proprio, goal, self.options.reach)
