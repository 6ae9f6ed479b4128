"""The contract of solvers, and what several of them use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import Field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

Cost = Callable[[Tensor], Tensor]
"""Actions [E, S, T, A] -> cost [E, S]."""


class Solver(Protocol):
    """Finds actions of low cost. A solver is a frozen dataclass whose fields are its options.

    A field named `frameskip` is set to the run's, unless the user sets it.

    Attributes:
        differentiates: costs must carry gradients to the actions. Then the solver must not be called in `torch.inference_mode`, and it
            evaluates costs of actions that require grad, with autograd enabled.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    differentiates: ClassVar[bool]

    @property
    def evaluations(self) -> int:
        """Count the candidates that one call evaluates per episode."""

    def __call__(self, cost: Cost, start: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Return actions [E, T, A] in [-1, 1] of low cost, from the first guess `start` [E, T, A] in env units.

        Each episode has a generator on the CPU, so that its result does not depend on the other episodes of the batch.
        """


def normal(generators: Sequence[torch.Generator], samples: int, start: Tensor) -> Tensor:
    """Draw standard normal noise [E, samples, T, A] on the device of `start` [E, T, A]; the same numbers on every device."""
    drawn = [torch.randn(samples, *start.shape[1:], generator=generator) for generator in generators]
    return torch.stack(drawn).to(start.device)


def around(mean: Tensor, deviation: Tensor, samples: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Draw candidates [E, samples, T, A] around `mean` [E, T, A], clipped to the env's bounds; the first is the mean."""
    actions = mean[:, None] + deviation[:, None] * normal(generators, samples, mean)
    actions[:, 0] = mean
    return actions.clamp(-1.0, 1.0)
