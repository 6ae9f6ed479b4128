"""What a solver is, and what solvers share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from wmcache.common.errors import UserError

Cost = Callable[[Tensor], Tensor]
"""Actions [E, S, T, A] -> cost [E, S]."""


class Solver(Protocol):
    """Finds actions of low cost.

    Attributes:
        differentiates: whether costs must carry gradients back to the actions. Then the solver must not be called in
            `torch.inference_mode`, and costs are asked for with autograd on, of actions that require grad.
    """

    differentiates: ClassVar[bool]

    @property
    def evaluations(self) -> int:
        """Candidates whose cost one call asks for, for each episode."""
        ...

    def __call__(self, cost: Cost, start: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Minimise.

        Args:
            cost: what to descend.
            start: [E, T, A], the first guess; env units.
            generators: one for each episode, on the CPU, so that its result does not depend on its neighbours in the batch.

        Returns:
            Actions [E, T, A] in [-1, 1].
        """
        ...


def normal(generators: Sequence[torch.Generator], samples: int, start: Tensor) -> Tensor:
    """Standard normal noise [E, samples, T, A] on the device of `start` [E, T, A]; the same numbers on every device."""
    drawn = [torch.randn(samples, *start.shape[1:], generator=generator) for generator in generators]
    return torch.stack(drawn).to(start.device)


def around(mean: Tensor, deviation: Tensor, samples: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Candidates [E, samples, T, A] drawn around `mean` [E, T, A] and clipped to the env's bounds; the first is the mean."""
    actions = mean[:, None] + deviation[:, None] * normal(generators, samples, mean)
    actions[:, 0] = mean
    return actions.clamp(-1.0, 1.0)


def require(holds: bool, message: str) -> None:
    """Refuse a solver's options.

    Raises:
        UserError: it does not hold.
    """
    if not holds:
        raise UserError(message)


def require_population(solver: str, samples: int, elites: int, iterations: int, sigma: float) -> None:
    """Refuse what no population can be made of.

    Raises:
        UserError: no iteration, fewer than 2 elites or more than samples, or a deviation that is not above 0.
    """
    require(iterations >= 1, f"solver {solver}: iterations is {iterations}; it must be 1 or more")
    require(
        2 <= elites <= samples,
        f"solver {solver}: elites is {elites}; it must lie between 2 and samples, {samples}; choose other elites",
    )
    require(0 < sigma < float("inf"), f"solver {solver}: sigma is {sigma}; it must be above 0")
