"""A trained policy acts: one forward pass for each model step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wmcache.common.device import autocast
from wmcache.common.errors import UserError
from wmcache.planner.base import Observation, Reads
from wmcache.planner.context import EvalContext
from wmcache.planner.options import PlanOptions
from wmcache.planner.policies import PLAN_POLICIES
from wmcache.trainer.models.actions import ActionModel


@PLAN_POLICIES.register("actor")
class ActorPolicy:
    """A `Policy`. Goals beyond its reach are approached by frames of the cache along the shortest path there (`LatentGraph`)."""

    reads: ClassVar[Reads] = "frames"

    def __init__(self, context: EvalContext, options: PlanOptions) -> None:
        """Raise UserError for the run of a world model, or a decision of several model steps."""
        if not isinstance(context.model, ActionModel):
            raise UserError(f"{context.run} is a world model and no policy; plan with: wmplan --policy mpc")
        if options.execute > 1:
            raise UserError(
                f"--execute {options.execute}: a trained policy decides after each model step; leave it out"
            )
        self.seconds, self.encoder_frames, self.decisions = 0.0, 0, 0
        self._context, self._model = context, context.model
        self._graph = context.cached_graph if options.subgoals == "graph" else None
        self._low, self._high = (
            torch.from_numpy(np.tile(bound, context.frameskip)).to(context.device) for bound in context.action_bounds
        )

    def reset(self, goal: Observation, generators: Sequence[torch.Generator]) -> None:  # noqa: ARG002
        """See `Policy`."""
        begun = time.perf_counter()
        self._goal = self._encode(goal)
        self._to_goal = None if self._graph is None else self._graph.to_goal(self._goal)
        self.seconds += time.perf_counter() - begun

    def observe(self, observation: Observation) -> None:
        """See `Policy`."""
        begun = time.perf_counter()
        self._tokens = self._encode(observation)
        self._proprio = self._context.proprio(observation)
        self.seconds += time.perf_counter() - begun

    @torch.inference_mode()
    def act(self) -> Tensor:
        """See `Policy`."""
        begun = time.perf_counter()
        goal = self._goal
        if self._graph is not None and self._to_goal is not None:
            frames = self._tokens
            for _ in range(self._model.ahead):
                frames = self._graph.next_frames(frames, goal, self._to_goal)
            goal = frames
        with autocast(self._context.device, self._context.dtype):
            actions = self._model.act(self._tokens, self._proprio, goal)
        self.decisions += len(actions)
        self.seconds += time.perf_counter() - begun
        if self._context.discrete:
            scores = actions.unflatten(1, (self._context.frameskip, -1))  # type: ignore[no-untyped-call]
            return F.one_hot(scores.argmax(-1), scores.shape[-1]).float().flatten(1)[:, None]
        return actions.float().clamp(self._low, self._high)[:, None]

    def _encode(self, observation: Observation) -> Tensor:
        self.encoder_frames += len(observation.image)
        return self._context.encode(observation).float()
