"""Goal-conditioned behaviour cloning: the actions that the data takes on the way to a later frame (Ghosh et al., arXiv 1912.06088)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Gt, Le
from torch import Tensor

from wmcache.cache.windows import Goals
from wmcache.common.options import option
from wmcache.trainer.models import MODELS
from wmcache.trainer.models.actions import ActionOptions, GoalReacher
from wmcache.trainer.models.trainable import DataShape


@dataclass(frozen=True)
class GcbcOptions(ActionOptions):
    """Options of GCBC."""

    discount: Annotated[float, Gt(0), Le(1)] = option(
        0.9, "Goals are a geometric number of model steps away, with this discount; 1: any later frame alike."
    )


@MODELS.register("gcbc")
class Gcbc(GoalReacher):
    """Goals may be any later frame of the episode, and the network does not know how far away they are."""

    Options = GcbcOptions
    options: GcbcOptions

    def __init__(self, shape: DataShape, options: GcbcOptions, statistics: Mapping[str, Tensor]) -> None:
        """See `Trainable`."""
        super().__init__(shape, options, statistics, more=0)

    @classmethod
    def goals(cls, options: Any) -> Goals:
        """See `Trainable.goals`."""
        return Goals(discount=options.discount)

    def act(self, tokens: Tensor, proprio: Tensor, goal: Tensor) -> Tensor:
        """See `ActionModel.act`."""
        return self.decide(tokens, proprio, goal, 1)
