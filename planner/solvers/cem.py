"""The cross-entropy method over action sequences (DINO-WM, planning/cem.py), batched over episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Gt, Le
from torch import Tensor

from wmcache.common.options import ShareBelowOne, option
from wmcache.planner.base import Cost, Sampling, around
from wmcache.planner.solvers import SOLVERS


@SOLVERS.register("cem")
@dataclass(frozen=True)
class Cem(Sampling):
    """A `Solver`. Candidates are clipped to the env's bounds before they are scored; the first is the present mean.

    V-JEPA 2-AC has a momentum of 0.15, and a `maxnorm` that is its `sigma`; DINO-WM has neither.
    """

    momentum: ShareBelowOne = option(0.0, "Share of the last mean and deviation that the next ones keep.")
    maxnorm: Annotated[float, Gt(0), Le(1)] = option(
        1.0, "Largest absolute value in the actions of a candidate, where env actions are in [-1, 1]."
    )

    def __call__(self, cost: Cost, start: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """See `Solver`."""
        mean, deviation = start, torch.full_like(start, self.sigma)
        for _ in range(self.iterations):
            actions = around(mean, deviation, self.samples, generators, self.maxnorm)
            best = cost(actions).topk(self.elites, dim=1, largest=False).indices
            elites = torch.take_along_dim(actions, best[:, :, None, None], dim=1)
            mean = elites.mean(1).lerp(mean, self.momentum)
            deviation = elites.std(1).lerp(deviation, self.momentum)
        return mean
