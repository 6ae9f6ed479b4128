"""The cross-entropy method over sequences of discrete actions, batched over episodes (Rubinstein 1999, for categorical variables)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from wmcache.common.errors import UserError
from wmcache.common.options import Positive, ShareBelowOne, option
from wmcache.planner.base import Cost, Population
from wmcache.planner.solvers import SOLVERS


@SOLVERS.register("categorical-cem")
@dataclass(frozen=True)
class CategoricalCem(Population):
    """A `Solver` for one-hot actions: each env step has a distribution over the actions, which is fitted to the elites.

    In the solver's units a one-hot action is 1 for the action that is taken and -1 for the others. The first candidate is the first guess,
    or its largest actions; the result is the best evaluated candidate.
    """

    discrete: ClassVar[bool] = True

    momentum: ShareBelowOne = option(0.1, "Share of the last distribution that the next one keeps.")
    smoothing: ShareBelowOne = option(0.05, "Share of a uniform distribution in each one, so that no action dies out.")
    frameskip: Positive = option(1, flag="")

    def __call__(self, cost: Cost, start: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """See `Solver`; raise UserError where frameskip does not divide A."""
        size = start.shape[2]
        if size % self.frameskip:
            raise UserError(
                f"solver categorical-cem: frameskip is {self.frameskip}; it must divide the {size} action values"
            )
        guess = rearrange(start.clamp(-1.0, 1.0) + 1, "e t (f a) -> e t f a", f=self.frameskip)
        guess = guess + torch.finfo(guess.dtype).tiny
        chances, mode = guess / guess.sum(-1, keepdim=True), guess.argmax(-1)
        best, lowest = self._one_hot(mode, start), torch.full_like(start[:, 0, 0], float("inf"))
        for _ in range(self.iterations):
            chances = chances.lerp(torch.full_like(chances, 1 / chances.shape[-1]), self.smoothing)
            taken = draw(chances, self.samples, generators)
            taken[:, 0] = mode
            actions = self._one_hot(taken, start)
            costs, order = cost(actions).topk(self.elites, dim=1, largest=False)
            elites = torch.take_along_dim(taken, order[:, :, None, None], dim=1)
            better = costs[:, 0] < lowest
            best = torch.where(better[:, None, None], self._one_hot(elites[:, 0], start), best)
            lowest = torch.where(better, costs[:, 0], lowest)
            fitted = F.one_hot(elites, chances.shape[-1]).to(chances.dtype).mean(1)
            chances = fitted.lerp(chances, self.momentum)
            mode = chances.argmax(-1)
        return best

    def _one_hot(self, taken: Tensor, start: Tensor) -> Tensor:
        """[…, T, f] -> […, T, f * A] as `start`, 1 for the action that is taken and -1 for the others."""
        return (2 * F.one_hot(taken, start.shape[2] // self.frameskip) - 1).flatten(-2).to(start.dtype)


def draw(chances: Tensor, samples: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Draw actions [E, samples, T, f] from distributions [E, T, f, A]; the same on every device."""
    drawn = [torch.rand(samples, *chances.shape[1:3], generator=generator) for generator in generators]
    bounds = chances.cumsum(-1)[:, None, :, :, :-1]
    return (torch.stack(drawn).to(chances)[..., None] >= bounds).sum(-1)
