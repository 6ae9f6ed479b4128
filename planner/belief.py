"""Policies that act on a world model's belief of the episode: a trained controller or actor, which a folder has."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from wmcache.common.errors import UserError
from wmcache.planner.base import Observation, Reads
from wmcache.planner.context import EvalContext
from wmcache.planner.options import PlanOptions, is_policy_folder
from wmcache.trainer.dreaming import GOAL
from wmcache.trainer.models import Dreams, dreaming_models


@dataclass(frozen=True)
class Decide:
    """What acts.

    Attributes:
        inputs: names of the features that it sees: those of `Dreams.features`, and `goal`.
        actions: features [E, …] each -> actions [E, f * A] in env units.
        drawn: the same with a generator for each episode, from which it draws actions; None: it draws none.
    """

    inputs: tuple[str, ...]
    actions: Callable[[Mapping[str, Tensor]], Tensor]
    drawn: Callable[[Mapping[str, Tensor], Sequence[torch.Generator]], Tensor] | None = None


class BeliefPolicy:
    """A `Policy`: one step of the world model's memory and one decision for each model step.

    Attributes:
        tokens, proprio: of the newest live frames, [E, N, D] and [E, P].
        goal_tokens, goal_feature: of the goals, [E, N, D] and [E, latent]; only where there are goals.
    """

    reads: ClassVar[Reads] = "frames"

    def __init__(self, context: EvalContext, decide: Decide, *, draw: bool = False) -> None:
        """Raise UserError where the model of the run has no features; `draw` its actions, if it can."""
        self.seconds, self.encoder_frames, self.decisions = 0.0, 0, 0
        self.context, self._decide, self._draw = context, decide, draw
        self.needs_goal = GOAL in decide.inputs
        self.draws = decide.drawn is not None
        self._model, self._dreams = context.world_model, require_dreams(context)
        self.goal_tokens = self.goal_feature = torch.empty(0)

    @torch.no_grad()
    def reset(self, goal: Observation, generators: Sequence[torch.Generator]) -> None:
        """See `Policy`."""
        begun = time.perf_counter()
        self._belief, self._generators = self._model.start(len(generators)), generators
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
        drawn = self._decide.drawn if self._draw else None
        actions = self._decide.actions(features) if drawn is None else drawn(features, self._generators)
        self._action = actions
        self.decisions += len(actions)
        self.seconds += time.perf_counter() - begun
        return actions[:, None]

    def _encode(self, observation: Observation) -> Tensor:
        self.encoder_frames += len(observation.image)
        return self.context.encode(observation).float()


class FolderPolicy(BeliefPolicy):
    """A policy whose folder `--policy` names."""

    noun: ClassVar[str]
    program: ClassVar[str]  # which trains it

    def __init__(self, context: EvalContext, options: PlanOptions) -> None:
        """Raise UserError for a folder of another model, or a decision of several model steps."""
        if options.policy is None or not is_policy_folder(options.policy):
            raise UserError(
                f"--policy {context.policy(options)} needs its folder; write --policy FOLDER, as {self.program} names it"
            )
        if options.execute > 1:
            raise UserError(f"--execute {options.execute}: {self.noun} decides after each model step; leave it out")
        low, high = (torch.from_numpy(bound).to(context.device) for bound in context.action_bounds)
        model = require_dreams(context)
        decide = self.load(Path(options.policy), context.run, model, (low, high), context.frameskip)
        super().__init__(context, decide, draw=options.draw)

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, run: Path, model: Dreams, bounds: tuple[Tensor, Tensor], frameskip: int) -> Decide:
        """Load what acts; raises UserError where it was trained with another model.

        Args:
            run, model: of the world model. bounds: of env actions, [A] each.
        """


def require_dreams(context: EvalContext) -> Dreams:
    """Return the model of a run; raises UserError where it has no features for a policy."""
    model = context.model
    if not isinstance(model, Dreams):
        name = context.config["model"]
        raise UserError(
            f"{context.run} is of a {name}, which has no features for a policy; train {dreaming_models()} instead"
        )
    return model
