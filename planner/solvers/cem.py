"""The cross-entropy method over action sequences (DINO-WM, planning/cem.py), batched over episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from wmcache.planner.base import Cost, around, require, require_population
from wmcache.planner.solvers import SOLVERS


@SOLVERS.register("cem")
@dataclass(frozen=True)
class Cem:
    """A `Solver`. Candidates are clipped to the env's bounds, so that what is scored is what the env will do.

    Attributes:
        samples: candidates an iteration; the first is the present mean.
        elites: the best of them, to which the next mean and deviation are fitted.
        iterations: how often.
        sigma: first standard deviation, in env units.
        momentum: share of the last mean and deviation that the next ones keep (V-JEPA 2-AC: 0.15; DINO-WM: none).

    Raises:
        UserError: options that no search can be made of.
    """

    differentiates: ClassVar[bool] = False

    samples: int = 64
    elites: int = 6
    iterations: int = 5
    sigma: float = 0.4
    momentum: float = 0.0

    def __post_init__(self) -> None:
        """Refuse options that do not fit."""
        require_population("cem", self.samples, self.elites, self.iterations, self.sigma)
        require(0 <= self.momentum < 1, f"solver cem: momentum is {self.momentum}; it must lie in [0, 1)")

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
