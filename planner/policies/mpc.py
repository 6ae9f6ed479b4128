"""Receding-horizon planning: plan, execute the first steps of the plan, and plan again from the frames that follow."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from wmcache.planner.base import Observation, Reads
from wmcache.planner.context import EvalContext
from wmcache.planner.mpc import (
    make_mpc,
    make_return_mpc,
    require_distance,
    require_keep,
    require_proposals,
    require_reward,
)
from wmcache.planner.objective import GoalDistance
from wmcache.planner.options import PlanOptions
from wmcache.planner.policies import PLAN_POLICIES


@PLAN_POLICIES.register("mpc")
class MpcPolicy:
    """A `Policy`: plans by MPC and executes the first model steps of each plan."""

    needs_goal: ClassVar[bool] = False
    reads: ClassVar[Reads] = "frames"

    def __init__(self, context: EvalContext, options: PlanOptions) -> None:
        """Raise UserError for the run of a policy, or a model without what the objective needs."""
        self.context, self.options, self.model = context, options, context.world_model
        if options.objective == "return":
            require_reward(context)
        else:
            require_distance(context, options)
        require_proposals(context)
        require_keep(context, options)
        self.seconds, self.encoder_frames, self.decisions = 0.0, 0, 0

    def reset(self, goal: Observation, generators: Sequence[torch.Generator]) -> None:
        """See `Policy`."""
        begun = time.perf_counter()
        self._goal_images, self._generators = goal.image, generators
        if self.options.objective == "return":
            self._mpc = make_return_mpc(self.context, self.options)
        else:
            self._mpc = make_mpc(self.context, self.options, self._encode(goal), goal.proprio)
        self._plan: Tensor | None = None
        self._belief = self.model.start(len(generators))
        self._led: Iterator[Tensor | None] = iter([None])
        self.seconds += time.perf_counter() - begun

    def observe(self, observation: Observation) -> None:
        """See `Policy`."""
        begun = time.perf_counter()
        tokens, proprio = self._encode(observation), self.context.proprio(observation)
        with torch.no_grad():
            self._belief = self.model.observe(self._belief, tokens, proprio, next(self._led))
        self._images = observation.image
        self.seconds += time.perf_counter() - begun

    def act(self) -> Tensor:
        """See `Policy`."""
        begun = time.perf_counter()
        if self.options.mask:
            assert isinstance(self._mpc.objective, GoalDistance)
            mask = self.context.mask(self._images, self._goal_images)
            self._mpc.objective = replace(self._mpc.objective, mask=mask)
        plan = self._mpc.plan(self._belief, self._plan, self._generators)
        actions = plan[:, : self.options.execute]
        self._led = iter(actions.unbind(1)[-self.context.observed :])  # to the frames that are observed next
        self._plan = self._mpc.shift(plan, self.options.execute)
        self.decisions += len(actions)
        self.seconds += time.perf_counter() - begun
        return actions

    def _encode(self, observation: Observation) -> Tensor:
        self.encoder_frames += len(observation.image)
        return self.context.encode(observation)
