"""A controller that is linear in features of a world model's belief (arXiv 1803.10122, section 2.3), and how it acts."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from wmcache.common.errors import UserError, suggest
from wmcache.planner.base import Observation, Reads
from wmcache.planner.context import EvalContext
from wmcache.trainer.models import Belief, Dreams, WorldModel, dreaming_models

Choice = Literal["argmax", "thresholds"]
GOAL = "goal"
"""The input that is no feature of a belief: `latent` of the goal's frame."""


@dataclass(frozen=True)
class Linear:
    """Actions of solutions, each the parameters of one controller: weights and bias of each output.

    A continuous action is the tanh of A outputs, scaled to the bounds. It is repeated for all f env steps of a model step.

    Attributes:
        inputs: names of features, in the order of the weights. size: how many numbers they are.
        low, high: bounds of env actions, [A] each.
        frameskip: f.
        choose: of a discrete action; None where actions are continuous. `argmax` of A outputs; or `thresholds` of the tanh of a single
            one, which cut [-1, 1] into A equal intervals, of which the middle one is that of action 0.
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
        sizes = {name: value.shape[1] for name, value in model.features(blank_belief(model)).items()}
        sizes[GOAL] = sizes["latent"]
        for number, name in enumerate(inputs):
            if name not in sizes or name in inputs[:number]:
                raise UserError(f"--inputs {','.join(inputs)}: {name!r} cannot be used; {suggest(name, list(sizes))}")
        return cls(tuple(inputs), sum(sizes[name] for name in inputs), *bounds, frameskip, choose)

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

    def _actions(self, outputs: Tensor) -> Tensor:
        count = len(self.low)
        if self.choose == "argmax":
            return F.one_hot(outputs.argmax(1), count).float()
        if self.choose == "thresholds":
            interval = ((torch.tanh(outputs[:, 0]) + 1) * count / 2).long().clamp(max=count - 1)
            nearest_middle = sorted(range(count), key=lambda place: abs(2 * place - count + 1))
            action_of = torch.tensor([nearest_middle.index(place) for place in range(count)], device=outputs.device)
            return F.one_hot(action_of[interval], count).float()
        return self.low + (self.high - self.low) * (torch.tanh(outputs) + 1) / 2


def blank_belief(model: Dreams) -> Belief:
    """Return the belief of one episode after a frame of zeros, for the sizes of features."""
    assert isinstance(model, WorldModel)
    shape, device = model.shape, next(model.parameters()).device
    tokens = torch.zeros(1, shape.tokens, shape.token_dim, device=device)
    with torch.no_grad():
        return model.observe(model.start(1), tokens, torch.zeros(1, shape.proprio_dim, device=device), None)


def require_dreams(context: EvalContext) -> Dreams:
    """Return the model of a run; raises UserError where it has no features for a controller."""
    model = context.model
    if not isinstance(model, Dreams):
        name = context.config["model"]
        raise UserError(
            f"{context.run} is of a {name}, which has no features for a controller; train {dreaming_models()} instead"
        )
    return model


class LinearPolicy:
    """A `Policy` that acts with C solutions in C * R episodes, R of the first solution first.

    Attributes:
        tokens, proprio: of the newest live frames, [C * R, N, D] and [C * R, P].
        goal_tokens, goal_feature: of the goals, [C * R, N, D] and [C * R, latent]; only where there are goals.
    """

    reads: ClassVar[Reads] = "frames"

    def __init__(self, context: EvalContext, linear: Linear, solutions: Tensor) -> None:
        """See the class; `solutions` are [C, parameters]."""
        self.seconds, self.encoder_frames, self.decisions = 0.0, 0, 0
        self.context, self.linear, self.solutions = context, linear, solutions.to(context.device)
        self.needs_goal = GOAL in linear.inputs
        self._model, self._dreams = context.world_model, require_dreams(context)
        self.goal_tokens = self.goal_feature = torch.empty(0)

    @torch.no_grad()
    def reset(self, goal: Observation, generators: Sequence[torch.Generator]) -> None:
        """See `Policy`."""
        begun = time.perf_counter()
        self._belief = self._model.start(len(generators))
        self._action: Tensor | None = None
        if goal.image.size:
            self.goal_tokens = self._encode(goal)
            seen = self._model.observe(self._belief, self.goal_tokens, self.context.proprio(goal), None)
            self.goal_feature = self._dreams.features(seen)["latent"]
        self.seconds += time.perf_counter() - begun

    @torch.no_grad()
    def observe(self, observation: Observation) -> None:
        """See `Policy`."""
        begun = time.perf_counter()
        self.tokens, self.proprio = self._encode(observation), self.context.proprio(observation)
        self._belief = self._model.observe(self._belief, self.tokens, self.proprio, self._action)
        self.seconds += time.perf_counter() - begun

    @torch.no_grad()
    def act(self) -> Tensor:
        """See `Policy`."""
        begun = time.perf_counter()
        features = self._dreams.features(self._belief)
        if self.needs_goal:
            features = {**features, GOAL: self.goal_feature}
        actions = self.linear(self.solutions, features)
        self._action = actions
        self.decisions += len(actions)
        self.seconds += time.perf_counter() - begun
        return actions[:, None]

    def _encode(self, observation: Observation) -> Tensor:
        self.encoder_frames += len(observation.image)
        return self.context.encode(observation).float()
