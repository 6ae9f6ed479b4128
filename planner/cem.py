"""The cross-entropy method over action sequences (DINO-WM, planning/cem.py), batched over episodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Cost = Callable[[Tensor], Tensor]
"""Actions [E, S, T, A] -> cost [E, S]."""


class Solver(Protocol):
    """Finds actions of low cost."""

    def __call__(self, cost: Cost, start: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Minimise.

        Args:
            cost: what to descend.
            start: [E, T, A], the first guess; env units.
            generators: one for each episode, so that its result does not depend on its neighbours in the batch.

        Returns:
            Actions [E, T, A] in [-1, 1].
        """
        ...


@dataclass(frozen=True)
class Cem:
    """A `Solver`. Candidates are clipped to the env's bounds, so that what is scored is what the env will do.

    Attributes:
        samples: candidates an iteration; the first is the present mean.
        elites: the best of them, to which the next mean and deviation are fitted.
        iterations: how often.
        sigma: first standard deviation, in env units.
    """

    samples: int = 300
    elites: int = 30
    iterations: int = 10
    sigma: float = 0.6

    def __call__(self, cost: Cost, start: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """See `Solver`."""
        mean, deviation = start, torch.full_like(start, self.sigma)
        for _ in range(self.iterations):
            noise = torch.stack(
                [torch.randn(self.samples, *start.shape[1:], generator=generator) for generator in generators]
            )
            actions = mean[:, None] + deviation[:, None] * noise.to(start.device)
            actions[:, 0] = mean
            actions = actions.clamp(-1.0, 1.0)
            best = cost(actions).topk(self.elites, dim=1, largest=False).indices
            elites = torch.take_along_dim(actions, best[:, :, None, None], dim=1)
            mean, deviation = elites.mean(1), elites.std(1)
        return mean
