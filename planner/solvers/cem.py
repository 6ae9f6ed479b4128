"""The cross-entropy method over action sequences (DINO-WM, planning/cem.py), batched over episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from wmcache.common.errors import UserError
from wmcache.common.options import Positive, ShareBelowOne, option
from wmcache.planner.base import Cost, around
from wmcache.planner.solvers import SOLVERS


@SOLVERS.register("cem")
@dataclass(frozen=True)
class Cem:
    """A `Solver`. Candidates are clipped to the env's bounds before they are scored.

    The first candidate is the present mean. V-JEPA 2-AC has a momentum of 0.15, DINO-WM none.
    """

    differentiates: ClassVar[bool] = False

    samples: Positive = option(64, "Candidates in each iteration; DINO-WM has 300.", group="Solver")
    elites: Annotated[int, Ge(2)] = option(6, "Best candidates of each iteration; DINO-WM has 30.")
    iterations: Positive = option(5, "Iterations of the search; DINO-WM has 10.")
    sigma: Annotated[float, Gt(0)] = option(0.4, "First standard deviation of the candidates, in env units.")
    momentum: ShareBelowOne = option(0.0, "Share of the last mean and deviation that the next ones keep.")

    def __post_init__(self) -> None:
        """Raise UserError for more elites than samples."""
        if self.elites > self.samples:
            raise UserError(f"solver cem: elites is {self.elites}; it must be at most samples, {self.samples}")

    @property
    def evaluations(self) -> int:
        """See `Solver`."""
        return self.samples * self.iterations

    def __call__(self, cost: Cost, start: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """See `Solver`."""
        mean, deviation = start, torch.full_like(start, self.sigma)
        for _ in range(self.iterations):
            actions = around(mean, deviation, self.samples, generators)
            best = cost(actions).topk(self.elites, dim=1, largest=False).indices
            elites = torch.take_along_dim(actions, best[:, :, None, None], dim=1)
            mean = elites.mean(1).lerp(mean, self.momentum)
            deviation = elites.std(1).lerp(deviation, self.momentum)
        return mean
