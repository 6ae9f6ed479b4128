"""Model predictive path integral control over action sequences, batched over episodes.

Williams et al., Information theoretic MPC for model-based reinforcement learning, ICRA 2017, in the form of TD-MPC2 (tdmpc2.py, `_plan`;
arXiv 2310.16828): only the elites are weighted, and the deviation is fitted too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from wmcache.common.options import Natural, Positive, Weight, option
from wmcache.planner.base import Cost, Sampling, around
from wmcache.planner.solvers import SOLVERS


@SOLVERS.register("mppi")
@dataclass(frozen=True)
class Mppi(Sampling):
    """A `Solver`. Candidates are clipped to the env's bounds; the first is the present mean, and the result is the last mean.

    Elites are weighted by softmax(-temperature * scaled cost), and the next mean and deviation are fitted to them with these weights. The
    temperature is an inverse one; the name is TD-MPC2's. So that it does not depend on the encoder's units, each elite's excess over the
    best cost is divided by the mean excess of the episode's elites, in every iteration.
    """

    samples: Positive = option(512)
    elites: Annotated[int, Ge(2)] = option(64)
    iterations: Positive = option(6)
    sigma: Annotated[float, Gt(0)] = option(
        0.6, "First and largest standard deviation of the candidates, where env actions are in [-1, 1]."
    )
    temperature: Weight = option(4.0, "Inverse temperature of the candidates' weights; 0 weights all elites alike.")
    min_sigma: Weight = option(0.05, "Smallest standard deviation of the candidates, where env actions are in [-1, 1].")
    proposals: Natural = option(
        0, "Candidates of each iteration that the model's own policy proposes, of a model with one; TD-MPC2 has 24."
    )

    def __post_init__(self) -> None:
        """Raise UserError for more elites than samples, or deviations out of order."""
        self.require_at_most("elites", "samples", self.samples)
        self.require_at_most("min_sigma", "sigma", self.sigma)
        self.require_at_most("proposals", "samples - 1", self.samples - 1)

    def __call__(self, cost: Cost, start: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """See `Solver`."""
        return self.search(cost, start, generators, start[:, None][:, :0])

    def search(self, cost: Cost, start: Tensor, generators: Sequence[torch.Generator], proposals: Tensor) -> Tensor:
        """See `TakesProposals`."""
        mean, deviation, proposals = start, torch.full_like(start, self.sigma), proposals.clamp(-1.0, 1.0)
        for _ in range(self.iterations):
            drawn = around(mean, deviation, self.samples - proposals.shape[1], generators)
            actions = torch.cat([drawn, proposals], 1)
            costs, best = cost(actions).topk(self.elites, dim=1, largest=False)
            elites = torch.take_along_dim(actions, best[:, :, None, None], dim=1)
            excess = costs - costs[:, :1]
            scale = excess.mean(1, keepdim=True).clamp_min(torch.finfo(excess.dtype).tiny)
            weights = (-self.temperature * excess / scale).softmax(1)[:, :, None, None]
            mean = (weights * elites).sum(1)
            deviation = (weights * (elites - mean[:, None]).square()).sum(1).sqrt().clamp(self.min_sigma, self.sigma)
        return mean
