"""A controller that is linear in features of a world model's belief (arXiv 1803.10122, section 2.3), and how it acts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from wmcache.planner.belief import BeliefPolicy, Decide
from wmcache.planner.context import EvalContext
from wmcache.planner.controllers.options import Choice
from wmcache.trainer.dreaming import input_sizes
from wmcache.trainer.models import Dreams


@dataclass(frozen=True)
class Linear:
    """Actions of solutions, each the parameters of one controller: weights and bias of each output.

    A continuous action is the tanh of A outputs, scaled to the bounds or clipped. It is repeated for all f env steps of a model step.

    Attributes:
        inputs: names of features, in the order of the weights. size: how many numbers they are.
        low, high: bounds of env actions, [A] each.
        frameskip: f.
        choose: of a discrete action, `argmax` of A outputs, or `thresholds` of the tanh of a single one, which cut [-1, 1] into A equal
            intervals, of which the middle one is that of action 0. Of a continuous one, None: the middle of the bounds at an output of
            0; or `clip`: an action of 0 there, as in the paper's code for the brake.
    """

    inputs: tuple[str, ...]
    size: int
    low: Tensor
    high: Tensor
    frameskip: int
    choose: Choice | None

    @classmethod
    def of(
        cls,
        model: Dreams,
        inputs: Sequence[str],
        bounds: tuple[Tensor, Tensor],
        frameskip: int,
        choose: Choice | None,
    ) -> Self:
        """Make it for a model; raises UserError for an unknown input."""
        sizes = input_sizes(model, inputs)
        return cls(tuple(inputs), sum(sizes.values()), *bounds, frameskip, choose)

    @property
    def outputs(self) -> int:
        """Numbers that the weights compute."""
        return 1 if self.choose == "thresholds" else len(self.low)

    @property
    def parameters(self) -> int:
        """Numbers of a solution."""
        return self.outputs * (self.size + 1)

    def __call__(self, solutions: Tensor, features: Mapping[str, Tensor]) -> Tensor:
        """Compute actions [C * R, f * A] in env units.

        Args:
            solutions: [C, parameters].
            features: [C * R, …] each; R episodes of the first solution come first.
        """
        count = len(solutions)
        inputs = torch.cat([features[name] for name in self.inputs], 1)
        seen = inputs.view(count, -1, self.size)
        weights = solutions.to(seen).view(count, self.outputs, self.size + 1)
        outputs = (seen @ weights[..., :-1].mT + weights[:, None, :, -1]).flatten(0, 1)
        return self._actions(outputs).repeat(1, self.frameskip)

    def decide(self, solutions: Tensor) -> Decide:
        """Return what acts with solutions, see `__call__`."""
        return Decide(self.inputs, partial(self, solutions))

    def _actions(self, outputs: Tensor) -> Tensor:
        count = len(self.low)
        if self.choose == "argmax":
            return F.one_hot(outputs.argmax(1), count).float()
        if self.choose == "thresholds":
            interval = ((torch.tanh(outputs[:, 0]) + 1) * count / 2).long().clamp(max=count - 1)
            nearest_middle = sorted(range(count), key=lambda place: abs(2 * place - count + 1))
            action_of = torch.tensor([nearest_middle.index(place) for place in range(count)], device=outputs.device)
            return F.one_hot(action_of[interval], count).float()
        squashed = torch.tanh(outputs)
        if self.choose == "clip":
            return torch.minimum(torch.maximum(squashed * torch.maximum(-self.low, self.high), self.low), self.high)
        return self.low + (self.high - self.low) * (squashed + 1) / 2


class LinearPolicy(BeliefPolicy):
    """Acts with C solutions in C * R episodes, R of the first solution first."""

    def __init__(self, context: EvalContext, linear: Linear, solutions: Tensor) -> None:
        """See the class; `solutions` are [C, parameters]."""
        super().__init__(context, linear.decide(solutions))
