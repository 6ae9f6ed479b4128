"""Receding-horizon planning: imagine candidates from the newest frames, execute the first steps of the best, replan."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from wmcache.common.device import autocast
from wmcache.planner.base import Cost, Observation, Reads, Solver
from wmcache.planner.context import EvalContext
from wmcache.planner.objective import GoalDistance, Objective
from wmcache.planner.options import PlanOptions
from wmcache.trainer.models import WorldModel

TOKENS_IN_FLIGHT = 2**17
"""Tokens of all candidates in one call of the model; bounds the memory of a plan for any number of samples and episodes."""


@dataclass
class Mpc:
    """Plans for E episodes at once from latents and proprio; it receives no state and no success.

    Attributes:
        horizon: model steps of a plan.
        context: frames that an imagined step sees. With velocity in proprio a single frame is the whole state, and a longer context costs
            more and accumulates the model's own errors.
        frameskip: env steps of a model step.
    """

    model: WorldModel
    solver: Solver
    objective: Objective
    horizon: int
    context: int
    frameskip: int
    device: torch.device
    dtype: torch.dtype

    def plan(
        self,
        tokens: Tensor,
        proprio: Tensor,
        previous: Tensor | None,
        generators: Sequence[torch.Generator],
        past: Tensor | None = None,
    ) -> Tensor:
        """Find actions [E, T, f * A] of low cost in env units, T = horizon.

        Args:
            tokens, proprio: [E, n, N, D] and [E, n, P] of the newest n frames, a model step apart.
            previous: [E, T, f * A], a first guess (see `shift`); None: zeros.
            past: [E, n - 1, f * A], the actions between those frames; needed where n > 1.
        """
        if previous is None:
            previous = torch.zeros(len(tokens), self.horizon, self.model.shape.action_dim, device=self.device)
        cost = self.cost_of(tokens, proprio, past)
        with torch.enable_grad() if self.solver.differentiates else torch.inference_mode():
            return self.solver(cost, previous, generators)

    def cost_of(self, tokens: Tensor, proprio: Tensor, past: Tensor | None = None) -> Cost:
        """Return the function that the solver minimises: the objective of imagined futures; arguments as for `plan`."""
        episodes, tokens = len(tokens), tokens.float()
        frame_tokens = tokens.shape[2] * (self.horizon + tokens.shape[1] - 1)
        if past is None:
            past = torch.zeros(episodes, 0, self.model.shape.action_dim, device=self.device)

        def score(futures: Tensor, part: slice) -> Tensor:
            with autocast(self.device, self.dtype):
                latents, imagined = self.model.rollout(tokens[part], proprio[part], futures, self.context)
            return self.objective(latents, imagined, part)

        def cost(actions: Tensor) -> Tensor:
            """[E, S, T, A] -> [E, S], in chunks of at most TOKENS_IN_FLIGHT."""
            samples = actions.shape[1]
            futures = torch.cat([past[:, None].expand(-1, samples, -1, -1), actions], 2)
            room = max(1, TOKENS_IN_FLIGHT // frame_tokens)
            episodes_at_once, samples_at_once = max(1, room // samples), min(samples, room)
            rows = []
            several = episodes_at_once < episodes or samples_at_once < samples
            # Activations of all chunks together have no bound, so backward computes them again.
            again = several and actions.requires_grad and torch.is_grad_enabled()
            scored = functools.partial(checkpoint, score, use_reentrant=False) if again else score
            for first in range(0, episodes, episodes_at_once):
                part = slice(first, first + episodes_at_once)
                chunks = torch.split(futures[part], samples_at_once, 1)
                rows.append(torch.cat([scored(chunk, part) for chunk in chunks], 1))
            return torch.cat(rows)

        return cost

    def shift(self, plan: Tensor, executed: int) -> Tensor:
        """Drop the executed model steps of a plan and append as many zeros: the first guess of the next plan."""
        return torch.cat([plan[:, executed:], torch.zeros_like(plan[:, :executed])], 1)


def make_mpc(context: EvalContext, options: PlanOptions, goal: Tensor, goal_proprio: NDArray[np.float32]) -> Mpc:
    """Create a planner to goals [E, N, D]; their proprio [E, P] is used only where `alpha` is above 0."""
    proprio = None
    if options.alpha:
        proprio = context.world_model.encode_proprio(torch.from_numpy(goal_proprio).to(context.device)[:, None])[:, 0]
    goal, graph = goal.float(), context.graph
    to_goal = None if graph is None else graph.to_goal(goal)
    objective = GoalDistance(goal, options.objective, options.alpha, proprio, graph, to_goal)
    sizes = (options.horizon, context.context_frames, context.frameskip)
    return Mpc(context.world_model, context.solver, objective, *sizes, context.device, context.dtype)


class MpcPolicy:
    """A `Policy`: plans by MPC and executes the first model steps of each plan."""

    reads: ClassVar[Reads] = "frames"

    def __init__(self, context: EvalContext, options: PlanOptions) -> None:
        """Raise UserError for the run of a policy."""
        self.context, self.options, self.model = context, options, context.world_model
        self.seconds, self.encoder_frames, self.decisions = 0.0, 0, 0

    def reset(self, goal: Observation, generators: Sequence[torch.Generator]) -> None:
        """Begin new episodes: with a goal and a random generator each."""
        begun = time.perf_counter()
        self._goal_images, self._generators = goal.image, generators
        self._mpc = make_mpc(self.context, self.options, self._encode(goal), goal.proprio)
        self._plan: Tensor | None = None
        self._frames: list[tuple[Tensor, Tensor]] = []
        self._executed: list[Tensor] = []
        self.seconds += time.perf_counter() - begun

    def observe(self, observation: Observation) -> None:
        """Encode a frame that the next plan starts from, the newest last."""
        begun = time.perf_counter()
        proprio = torch.from_numpy(observation.proprio).to(self.context.device)
        self._frames.append((self._encode(observation), proprio))
        self._images = observation.image
        self.seconds += time.perf_counter() - begun

    def act(self) -> Tensor:
        """Plan from the newest observed frames; returns the model steps to execute, [E, execute, f * A]."""
        begun = time.perf_counter()
        self._frames = self._frames[-self.context.observed :]
        self._executed = self._executed[len(self._executed) - len(self._frames) + 1 :]
        tokens, proprio = (torch.stack(parts, 1) for parts in zip(*self._frames, strict=True))
        past = torch.stack(self._executed, 1) if self._executed else None
        if self.options.mask:
            assert isinstance(self._mpc.objective, GoalDistance)
            mask = self.context.mask(self._images, self._goal_images)
            self._mpc.objective = replace(self._mpc.objective, mask=mask)
        plan = self._mpc.plan(tokens, proprio, self._plan, self._generators, past)
        actions = plan[:, : self.options.execute]
        self._executed += actions.unbind(1)
        self._plan = self._mpc.shift(plan, self.options.execute)
        self.decisions += len(actions)
        self.seconds += time.perf_counter() - begun
        return actions

    def _encode(self, observation: Observation) -> Tensor:
        self.encoder_frames += len(observation.image)
        return self.context.encode(observation)
