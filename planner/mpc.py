"""Receding horizon: imagine candidates from the present frame's latents, execute the first steps of the best, look again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from wmcache.cache.device import autocast
from wmcache.planner.cem import Solver
from wmcache.planner.objective import goal_distance
from wmcache.trainer.models import WorldModel

TOKENS_IN_FLIGHT = 2**17
"""Tokens of all candidates in one call of the model; bounds the memory of a plan, whatever the number of samples and episodes."""


@dataclass
class Mpc:
    """Plans for E episodes at once from latents alone: no simulator, no state beyond proprio, no word of success.

    Attributes:
        model: what imagines.
        solver: what searches.
        objective: mode of `goal_distance`.
        horizon: model steps of a plan.
        context: frames that an imagined step sees. With velocity in the proprioception one frame is the whole state, and
            longer contexts cost more and feed on the model's own errors.
        frameskip: env steps of a model step.
        device, dtype: where and how the model runs.
    """

    model: WorldModel
    solver: Solver
    objective: str
    horizon: int
    context: int
    frameskip: int
    device: torch.device
    dtype: torch.dtype

    @torch.inference_mode()
    def plan(
        self,
        tokens: Tensor,
        proprio: Tensor,
        goal: Tensor,
        previous: Tensor | None,
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """Find actions that lead from the present frames to the goal frames.

        Args:
            tokens: [E, N, D] of the present frames. proprio: [E, P]. goal: [E, N, D].
            previous: [E, T, f * A], a first guess (see `shift`), or None for no push at all.
            generators: one for each episode.

        Returns:
            [E, T, f * A] in env units, T = horizon.
        """
        episodes = len(tokens)
        if previous is None:
            previous = torch.zeros(episodes, self.horizon, self.model.shape.action_dim, device=self.device)
        tokens, goal, proprio = tokens.float()[:, None], goal.float(), proprio[:, None]
        chunk = max(1, TOKENS_IN_FLIGHT // (tokens.shape[2] * self.context * self.horizon))

        def cost(actions: Tensor) -> Tensor:
            samples = actions.shape[1]
            flat, owner = actions.flatten(0, 1), torch.arange(episodes, device=self.device).repeat_interleave(samples)
            costs = []
            for start in range(0, len(flat), chunk):
                part = owner[start : start + chunk]
                with autocast(self.device, self.dtype):
                    imagined, _ = self.model.rollout(
                        tokens[part], proprio[part], flat[start : start + chunk], self.context
                    )
                costs.append(goal_distance(imagined[:, None], goal[part], self.objective)[:, 0])
            return torch.cat(costs).view(episodes, samples)

        return self.solver(cost, previous, generators)

    def shift(self, plan: Tensor, executed: int) -> Tensor:
        """The rest of a plan after `executed` model steps, with no push at its new end: the first guess of the next plan."""
        return torch.cat([plan[:, executed:], torch.zeros_like(plan[:, :executed])], 1)
