"""Gradient descent over action sequences (DINO-WM, planning/gd.py), batched over episodes and restarts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Gt
from torch import Tensor

from wmcache.common.options import Positive, Weight, option
from wmcache.planner.base import Cost, normal
from wmcache.planner.solvers import SOLVERS

OPTIMISERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], float]] = {
    "sgd": (torch.optim.SGD, 1.0),
    "adam": (torch.optim.Adam, 0.1),
}
"""Name -> (optimiser, its default learning rate). Both are elementwise, so candidates do not affect each other."""


@SOLVERS.register("gd")
@dataclass(frozen=True)
class Gd:
    """A `Solver`. Optimises several guesses of each episode side by side, and returns the best actions that it has evaluated.

    Gradients are those of the sum of all costs, as in the reference, so a candidate's gradient does not depend on the batch. Actions are
    clipped to the env's bounds after each step; a tanh in front of them was no better on an exact model. The reference's learning rate of
    1.0 is for actions divided by their standard deviation s; here it corresponds to s ** 2. Adam's does not depend on it.
    """

    differentiates: ClassVar[bool] = True

    # The order is that of the parts of a results folder's name.
    sigma: Weight = option(0.6, "Standard deviation of the first guesses, where env actions are in [-1, 1].")
    optimiser: Literal["sgd", "adam"] = option("adam", "Optimiser of gradient descent; DINO-WM has sgd.")
    steps: Positive = option(15, "Steps of gradient descent; DINO-WM has 1000.", flag="--gd-steps", group="Solver")
    lr: Annotated[float, Gt(0)] | None = option(
        None, "Learning rate of gradient descent, in env units.  [default: the optimiser's]", flag="--gd-lr"
    )
    restarts: Positive = option(8, "First guesses that are optimised side by side; DINO-WM has 1.")
    noise: Weight = option(0.003, "Standard deviation of the noise added after each step; DINO-WM has 0.003.")

    @property
    def evaluations(self) -> int:
        """See `Solver`; all but `restarts` of them are differentiated too."""
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
