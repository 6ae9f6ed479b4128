"""Receding horizon: imagine candidates from the newest frames' latents, execute the first steps of the best, look again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from wmcache.common.device import autocast
from wmcache.planner.base import Cost, Solver
from wmcache.planner.objective import Objective
from wmcache.trainer.models import WorldModel

TOKENS_IN_FLIGHT = 2**17
"""Tokens of all candidates in one call of the model; bounds the memory of a plan, whatever the number of samples and episodes."""


@dataclass
class Mpc:
    """Plans for E episodes at once from latents alone: no simulator, no state beyond proprio, no word of success.

    Attributes:
        model: what imagines.
        solver: what searches.
        objective: what it costs to be where a candidate leads.
        horizon: model steps of a plan.
        context: frames that an imagined step sees. With velocity in the proprioception one frame is the whole state, and
            longer contexts cost more and feed on the model's own errors.
        frameskip: env steps of a model step.
        device, dtype: where and how the model runs.
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
        """Find actions that lead from the newest frames to where the objective is low.

        Args:
            tokens: [E, n, N, D] of the newest n frames, a model step apart. proprio: [E, n, P].
            previous: [E, T, f * A], a first guess (see `shift`), or None for no push at all.
            generators: one for each episode.
            past: [E, n - 1, f * A], what was executed between those frames; needed where n > 1.

        Returns:
            [E, T, f * A] in env units, T = horizon.
        """
        if previous is None:
            previous = torch.zeros(len(tokens), self.horizon, self.model.shape.action_dim, device=self.device)
        cost = self.cost_of(tokens, proprio, past)
        with torch.enable_grad() if self.solver.differentiates else torch.inference_mode():
            return self.solver(cost, previous, generators)

    def cost_of(self, tokens: Tensor, proprio: Tensor, past: Tensor | None = None) -> Cost:
        """What the solver descends: the objective of what candidates lead to from these frames; arguments as for `plan`."""
        episodes, tokens = len(tokens), tokens.float()
        frame_tokens = tokens.shape[2] * (self.horizon + tokens.shape[1] - 1)
        if past is None:
            past = torch.zeros(episodes, 0, self.model.shape.action_dim, device=self.device)

        def score(futures: Tensor, part: slice) -> Tensor:
            with autocast(self.device, self.dtype):
                latents, code = self.model.rollout(tokens[part], proprio[part], futures, self.context)
            return self.objective(latents, code, part)

        def cost(actions: Tensor) -> Tensor:
            """[E, S, T, A] -> [E, S]; as many futures of as many episodes at once as there is room for."""
            samples = actions.shape[1]
            futures = torch.cat([past[:, None].expand(-1, samples, -1, -1), actions], 2)
            room = max(1, TOKENS_IN_FLIGHT // frame_tokens)
            some, of = max(1, room // samples), min(samples, room)
            rows = []
            for first in range(0, episodes, some):
                part = slice(first, first + some)
                chunks = [futures[part, sample : sample + of] for sample in range(0, samples, of)]
                if (len(chunks) > 1 or some < episodes) and actions.requires_grad and torch.is_grad_enabled():
                    # What all chunks keep for their gradients would not be bounded; it is computed again instead.
                    scores = [checkpoint(score, chunk, part, use_reentrant=False) for chunk in chunks]
                else:
                    scores = [score(chunk, part) for chunk in chunks]
                rows.append(torch.cat(scores, 1))
            return torch.cat(rows)

        return cost

    def shift(self, plan: Tensor, executed: int) -> Tensor:
        """The rest of a plan after `executed` model steps, with no push at its new end: the first guess of the next plan."""
        return torch.cat([plan[:, executed:], torch.zeros_like(plan[:, :executed])], 1)
