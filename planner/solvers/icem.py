"""The improved cross-entropy method over action sequences (Pinneri et al. 2020, arXiv 2008.06389), batched over episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from einops import rearrange
from torch import Tensor

from wmcache.common.errors import UserError
from wmcache.common.options import Positive, Share, ShareBelowOne, Weight, option
from wmcache.planner.base import Cost, Sampling, normal
from wmcache.planner.solvers import SOLVERS


@SOLVERS.register("icem")
@dataclass(frozen=True)
class Icem(Sampling):
    """A `Solver`. Candidates are clipped to the env's bounds; the result is the best evaluated candidate, not the mean.

    The paper shifts elites from one plan to the next; here the caller's first guess does so. It is a candidate of the first iteration. The
    mean is one of the last iteration, as in the paper, and of no other, where it would narrow the search. Kept elites are not evaluated
    again. Noise is coloured over env steps: `frameskip` is the number of env actions in each of the T steps [T, f * A].
    """

    samples: Positive = option(300)
    elites: Annotated[int, Ge(2)] = option(10)
    iterations: Positive = option(10)
    sigma: Annotated[float, Gt(0)] = option(0.6)
    momentum: ShareBelowOne = option(0.1, "Share of the last mean and deviation that the next ones keep.")
    beta: Weight = option(2.0, "Colour of the noise over time: 0 is white, 1 pink, 2 brown; the paper has 0.25 to 4.")
    frameskip: Positive = option(1, flag="")
    decay: Annotated[float, Ge(1)] = option(1.25, "Factor by which each iteration has fewer candidates.")
    keep: Share = option(0.3, "Share of the elites that stay candidates of the next iteration.", flag="--keep-elites")

    def __post_init__(self) -> None:
        """Raise UserError for more elites than half of the samples."""
        self.require_at_most("elites", "half of samples", self.samples // 2)

    @property
    def populations(self) -> list[int]:
        """Count the candidates that each iteration evaluates."""
        return [max(int(self.samples * self.decay**-i), 2 * self.elites) for i in range(self.iterations)]

    @property
    def evaluations(self) -> int:
        """See `Solver`."""
        return sum(self.populations)

    def __call__(self, cost: Cost, start: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """See `Solver`; raise UserError where frameskip does not divide A."""
        size = start.shape[2]
        if size % self.frameskip:
            raise UserError(f"solver icem: frameskip is {self.frameskip}; it must divide the {size} action values")
        mean, deviation = start, torch.full_like(start, self.sigma)
        best, lowest = start.clamp(-1.0, 1.0), torch.full_like(start[:, 0, 0], float("inf"))
        kept, kept_costs = start[:, None][:, :0], start[:, :0, 0]
        for i, samples in enumerate(self.populations):
            white = rearrange(normal(generators, samples, start), "e s t (f a) -> e s (t f) a", f=self.frameskip)
            noise = rearrange(coloured(white, self.beta), "e s (t f) a -> e s t (f a)", f=self.frameskip)
            actions = mean[:, None] + deviation[:, None] * noise
            if i in (0, self.iterations - 1):
                actions[:, 0] = mean
            actions = actions.clamp(-1.0, 1.0)
            candidates = torch.cat([actions, kept], 1)
            costs, order = torch.cat([cost(actions), kept_costs], 1).topk(self.elites, dim=1, largest=False)
            elites = torch.take_along_dim(candidates, order[:, :, None, None], dim=1)
            better = costs[:, 0] < lowest
            best = torch.where(better[:, None, None], elites[:, 0], best)
            lowest = torch.where(better, costs[:, 0], lowest)
            share = int(self.keep * self.elites)
            kept, kept_costs = elites[:, :share], costs[:, :share]
            mean = elites.mean(1).lerp(mean, self.momentum)
            deviation = elites.std(1, correction=0).lerp(deviation, self.momentum)
        return best


def coloured(white: Tensor, beta: float) -> Tensor:
    """Filter white noise [E, S, time, A] to unit variance and a power of frequency ** -beta (Timmer and Koenig 1995).

    The constant part has the power of the lowest frequency, as in the paper's `colorednoise` package, which leaves it out of the variance.
    """
    steps = white.shape[2]
    frequency = torch.fft.rfftfreq(steps, device=white.device)
    frequency[0] = 1 / steps
    filtered = torch.fft.rfft(white, dim=2) * frequency[:, None] ** (-beta / 2)
    # The variance that a filter leaves of white noise is the power of its impulse response.
    impulse = torch.fft.irfft(frequency ** (-beta / 2), n=steps)
    noise: Tensor = torch.fft.irfft(filtered, n=steps, dim=2) / impulse.norm()
    return noise
