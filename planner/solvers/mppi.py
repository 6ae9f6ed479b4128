"""Model predictive path integral control over action sequences, batched over episodes.

Williams et al., Information theoretic MPC for model-based reinforcement learning, ICRA 2017, in the form of TD-MPC2
(tdmpc2.py, `_plan`; arXiv 2310.16828): only the elites are weighed, and the deviation is fitted too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from wmcache.planner.base import Cost, around, require, require_population
from wmcache.planner.solvers import SOLVERS


@SOLVERS.register("mppi")
@dataclass(frozen=True)
class Mppi:
    """A `Solver`. Candidates are clipped to the env's bounds; the result is the last mean.

    Costs are in the encoder's units, which the temperature should not depend on. So what an elite costs more than the best
    is divided by what the episode's elites cost more on average, in each iteration anew.

    Attributes:
        samples: candidates an iteration; the first is the present mean.
        elites: the best of them. They are weighed by softmax(-temperature * scaled cost), and the next mean and deviation
            are fitted to them with these weights.
        iterations: how often.
        temperature: 0 weighs all elites alike, as the cross-entropy method does; the greater, the more the best counts.
            (It is an inverse temperature; the name is TD-MPC2's.)
        sigma: first and largest standard deviation, in env units.
        min_sigma: smallest one.

    Raises:
        UserError: options that no search can be made of.
    """

    differentiates: ClassVar[bool] = False

    samples: int = 512
    elites: int = 64
    iterations: int = 6
    temperature: float = 4.0
    sigma: float = 0.6
    min_sigma: float = 0.05

    def __post_init__(self) -> None:
        """Refuse options that do not fit."""
        require_population("mppi", self.samples, self.elites, self.iterations, self.sigma)
        fits = 0 <= self.temperature < float("inf")
        require(fits, f"solver mppi: temperature is {self.temperature}; it must be 0 or more")
        fits = 0 <= self.min_sigma <= self.sigma
        require(fits, f"solver mppi: min_sigma is {self.min_sigma}; it must lie between 0 and sigma, {self.sigma}")

    @property
    def evaluations(self) -> int:
        """See `Solver`."""
        return self.samples * self.iterations

    def __call__(self, cost: Cost, start: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """See `Solver`."""
        mean, deviation = start, torch.full_like(start, self.sigma)
        for _ in range(self.iterations):
            actions = around(mean, deviation, self.samples, generators)
            costs, best = cost(actions).topk(self.elites, dim=1, largest=False)
            elites = torch.take_along_dim(actions, best[:, :, None, None], dim=1)
            excess = costs - costs[:, :1]
            scale = excess.mean(1, keepdim=True).clamp_min(torch.finfo(excess.dtype).tiny)
            weights = (-self.temperature * excess / scale).softmax(1)[:, :, None, None]
            mean = (weights * elites).sum(1)
            deviation = (weights * (elites - mean[:, None]).square()).sum(1).sqrt().clamp(self.min_sigma, self.sigma)
        return mean
