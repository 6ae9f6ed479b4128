"""Gradient descent over action sequences (DINO-WM, planning/gd.py), batched over episodes and restarts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from wmcache.planner.base import Cost, normal, require
from wmcache.planner.solvers import SOLVERS

OPTIMISERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], float]] = {
    "sgd": (torch.optim.SGD, 1.0),
    "adam": (torch.optim.Adam, 0.1),
}
"""Name -> (optimiser, its learning rate unless told). Both work on each number alone, so candidates do not meet in them."""


@SOLVERS.register("gd")
@dataclass(frozen=True)
class Gd:
    """A `Solver`. Descends several guesses of each episode side by side, and returns the best actions that it has seen.

    The gradient is that of the sum of all costs, as in the reference, so each candidate's is its own, whatever the batch.
    After each step actions are clamped to the env's bounds. A tanh in front of them came out no better in trials on an exact
    model, and a first guess that pushes with full force, as good ones do, would have no finite preimage.

    Attributes:
        steps: how often to descend (reference: 1000).
        lr: length of a step in env units; by default that of OPTIMISERS. The reference's 1.0 is for actions divided by their
            standard deviation s, and costs in units of its encoder: in ours it would be s ** 2. Adam's depends on neither.
        optimiser: in OPTIMISERS; the reference's is sgd, without momentum.
        noise: standard deviation of the Gaussian noise that is added after each step.
        restarts: guesses of each episode (reference: 1); the first is the given one, the others lie around it.
        sigma: how far, as a standard deviation in env units.

    Raises:
        UserError: options that no descent can be made of.
    """

    differentiates: ClassVar[bool] = True

    steps: int = 15
    lr: float | None = None
    optimiser: str = "adam"
    noise: float = 0.003
    restarts: int = 8
    sigma: float = 0.6

    def __post_init__(self) -> None:
        """Refuse options that do not fit."""
        known = self.optimiser in OPTIMISERS
        require(known, f"solver gd: no optimiser {self.optimiser!r}; known are {', '.join(OPTIMISERS)}")
        for name in ("steps", "restarts"):
            require(getattr(self, name) >= 1, f"solver gd: {name} is {getattr(self, name)}; it must be 1 or more")
        require(self.lr is None or 0 < self.lr < float("inf"), f"solver gd: lr is {self.lr}; it must be above 0")
        for name in ("noise", "sigma"):
            fits = 0 <= getattr(self, name) < float("inf")
            require(fits, f"solver gd: {name} is {getattr(self, name)}; it must be 0 or more")

    @property
    def evaluations(self) -> int:
        """See `Solver`. All but `restarts` of them are differentiated too."""
        return self.restarts * (self.steps + 1)

    def __call__(self, cost: Cost, start: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """See `Solver`."""
        offset = self.sigma * normal(generators, self.restarts, start)
        offset[:, 0] = 0.0
        actions = (start[:, None] + offset).clamp(-1.0, 1.0).requires_grad_()
        make_optimiser, usual_lr = OPTIMISERS[self.optimiser]
        optimiser = make_optimiser([actions], lr=usual_lr if self.lr is None else self.lr)
        best, lowest = actions.detach().clone(), torch.full_like(actions[..., 0, 0], float("inf"))
        for step in range(self.steps + 1):
            with torch.set_grad_enabled(step < self.steps):
                costs = cost(actions)
                total = costs.sum()
            better = costs.detach() < lowest
            best = torch.where(better[:, :, None, None], actions.detach(), best)
            lowest = torch.where(better, costs.detach(), lowest)
            if step == self.steps:
                break
            # Not backward(), which would leave gradients on the model's parameters.
            (actions.grad,) = torch.autograd.grad(total, actions)
            optimiser.step()
            with torch.no_grad():
                actions.add_(self.noise * normal(generators, self.restarts, start)).clamp_(-1.0, 1.0)
        winner = lowest.argmin(1)[:, None, None, None]
        return torch.take_along_dim(best, winner, dim=1)[:, 0]
