"""Planning: imagine candidates from what the model remembers, and search for the best."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from wmcache.common.device import autocast
from wmcache.common.errors import UserError
from wmcache.planner.base import Cost, Solver, TakesProposals
from wmcache.planner.context import EvalContext
from wmcache.planner.objective import GoalDistance, Objective, negative_return
from wmcache.planner.options import PlanOptions
from wmcache.trainer.models import MODELS, Belief, KeepsPatches, Proposes, WorldModel, dreaming_models

TOKENS_IN_FLIGHT = 2**17
"""Tokens of all candidates in one call of the model; bounds the memory of a plan for any number of samples and episodes."""


Propose = Callable[[Belief, Sequence[torch.Generator]], Tensor]
"""Draws candidates [E, K, T, f * A] in env units, see `Proposes`."""


@dataclass
class Mpc:
    """Plans for E episodes at once from what the model remembers of them; it receives no state and no success.

    Attributes:
        horizon: model steps of a plan.
        frameskip: env steps of a model step.
        bounds: lowest and highest actions of a model step in env units, [f * A] each; None: -1 and 1.
        propose: draws the candidates of a solver that takes proposals.
        keep: share of a frame's tokens that are imagined; below 1 the model `KeepsPatches`.
    """

    model: WorldModel
    solver: Solver
    objective: Objective
    horizon: int
    device: torch.device
    dtype: torch.dtype
    bounds: tuple[Tensor, Tensor] | None = None
    propose: Propose | None = None
    keep: float = 1.0

    def plan(self, belief: Belief, previous: Tensor | None, generators: Sequence[torch.Generator]) -> Tensor:
        """Find actions [E, T, f * A] of low cost in env units, T = horizon.

        Args:
            belief: of the E episodes, see `WorldModel.observe`.
            previous: [E, T, f * A], a first guess (see `shift`); None: zeros.
            generators: one of each episode, on the CPU.
        """
        if previous is None:
            previous = torch.zeros(len(generators), self.horizon, self.model.shape.action_dim, device=self.device)
        cost = self.cost_of(belief, generators)
        with torch.enable_grad() if self.solver.differentiates else torch.inference_mode():
            proposals = None
            if self.propose is not None:
                with autocast(self.device, self.dtype):
                    proposals = self.propose(belief, generators).float()
            if self.bounds is None:
                return self._solve(cost, previous, generators, proposals)
            middle, half = (self.bounds[0] + self.bounds[1]) / 2, (self.bounds[1] - self.bounds[0]) / 2
            proposals = None if proposals is None else (proposals - middle) / half
            start = (previous - middle) / half
            found = self._solve(lambda actions: cost(middle + half * actions), start, generators, proposals)
            return middle + half * found

    def _solve(
        self, cost: Cost, start: Tensor, generators: Sequence[torch.Generator], proposals: Tensor | None
    ) -> Tensor:
        if proposals is None:
            return self.solver(cost, start, generators)
        assert isinstance(self.solver, TakesProposals)
        return self.solver.search(cost, start, generators, proposals)

    def cost_of(self, belief: Belief, generators: Sequence[torch.Generator]) -> Cost:
        """Return the function that the solver minimises: the objective of imagined futures; arguments as for `plan`."""
        episodes, tokens = len(generators), kept_tokens(self.model, self.keep)
        frame_tokens = tokens * (self.horizon + self.model.observed - 1)
        # Every call begins with the same seeds, so that all candidates of a plan see the same noise.
        seeds = [int(torch.randint(2**62, (), generator=one)) for one in generators] if self.model.draws else None
        if self.keep < 1:
            assert isinstance(self.model, KeepsPatches)
            # One draw for all candidates and iterations of a plan, as in Sparse Imagination's code; another one for each episode.
            drawn = [torch.randperm(self.model.shape.tokens, generator=one)[:tokens] for one in generators]
            belief = self.model.keep(belief, torch.stack(drawn).sort(1).values.to(self.device))

        def score(actions: Tensor, part: slice) -> Tensor:
            fresh = None if seeds is None else [torch.Generator().manual_seed(seed) for seed in seeds[part]]
            own = {name: value[part] for name, value in belief.items()}
            with autocast(self.device, self.dtype):
                imagined = self.model.imagine(own, actions, fresh)
            return self.objective(imagined, part)

        def cost(actions: Tensor) -> Tensor:
            """[E, S, T, A] -> [E, S], in chunks of at most TOKENS_IN_FLIGHT."""
            samples = actions.shape[1]
            room = max(1, TOKENS_IN_FLIGHT // frame_tokens)
            episodes_at_once, samples_at_once = max(1, room // samples), min(samples, room)
            rows = []
            several = episodes_at_once < episodes or samples_at_once < samples
            # Activations of all chunks together have no bound, so backward computes them again.
            again = several and actions.requires_grad and torch.is_grad_enabled()
            scored = functools.partial(checkpoint, score, use_reentrant=False) if again else score
            for first in range(0, episodes, episodes_at_once):
                part = slice(first, first + episodes_at_once)
                chunks = torch.split(actions[part], samples_at_once, 1)
                rows.append(torch.cat([scored(chunk, part) for chunk in chunks], 1))
            return torch.cat(rows)

        return cost

    def shift(self, plan: Tensor, executed: int) -> Tensor:
        """Drop the executed model steps of a plan and append as many zeros: the first guess of the next plan."""
        return torch.cat([plan[:, executed:], torch.zeros_like(plan[:, :executed])], 1)


def kept_tokens(model: WorldModel, share: float) -> int:
    """Count the tokens of a frame that are imagined."""
    return max(1, round(share * model.shape.tokens))


def make_mpc(context: EvalContext, options: PlanOptions, goal: Tensor, goal_proprio: NDArray[np.float32]) -> Mpc:
    """Create a planner to goals [E, N, D]; their proprio [E, P] is used only where `alpha` is above 0."""
    proprio = None
    if options.alpha:
        proprio = context.world_model.encode_proprio(torch.from_numpy(goal_proprio).to(context.device)[:, None])[:, 0]
    goal, graph = goal.float(), context.graph
    to_goal = None if graph is None else graph.to_goal(goal)
    cost = context.world_model.cost
    if options.mask and type(context.world_model).cost is not WorldModel.cost:
        model = context.config["model"]
        raise UserError(f"--mask compares tokens, and {model} has an objective of its own; leave it out")
    objective = GoalDistance(goal, options.objective, options.alpha, proprio, graph, to_goal, cost=cost)
    return _mpc_of(context, options, objective, goal)


def require_distance(context: EvalContext, options: PlanOptions) -> None:
    """Raise UserError where the distance to the goal is that of latents, which the model does not imagine."""
    if context.world_model.has_latents:
        return
    graph = "" if options.distance == "latent" else f"--distance {options.distance}"
    if wrong := graph or ("--mask" if options.mask else "" if options.alpha else f"--alpha {options.alpha}"):
        raise UserError(f"{wrong}: the model of {context.run} imagines proprio alone; reach the goal's with --alpha 1")


def make_return_mpc(context: EvalContext, options: PlanOptions) -> Mpc:
    """Create a planner of the highest predicted return."""
    return _mpc_of(context, options, negative_return)


def require_reward(context: EvalContext) -> None:
    """Raise UserError where the model predicts no reward."""
    model, shape = context.world_model, context.world_model.shape
    zeros = [
        torch.zeros(1, *size, device=context.device) for size in ((shape.tokens, shape.token_dim), (shape.proprio_dim,))
    ]
    with torch.inference_mode(), autocast(context.device, context.dtype):
        belief = model.observe(model.start(1), zeros[0], zeros[1], None)
        imagined = model.imagine(belief, torch.zeros(1, 1, 1, shape.action_dim, device=context.device))
    if imagined.reward is None:
        raise UserError(
            f"the model of {context.run} predicts no reward, which a plan without a goal needs; train {dreaming_models()} on a "
            "store with rewards, or compare with --policy random"
        )


def _mpc_of(context: EvalContext, options: PlanOptions, objective: Objective, goal: Tensor | None = None) -> Mpc:
    low, high = (
        torch.from_numpy(np.tile(bound, context.frameskip)).to(context.device) for bound in context.action_bounds
    )
    bounds = None if (low == -1).all() and (high == 1).all() else (low, high)
    propose = _proposals_of(context, options.horizon, goal)
    model, keep = context.world_model, options.keep_tokens
    return Mpc(model, context.solver, objective, options.horizon, context.device, context.dtype, bounds, propose, keep)


def require_keep(context: EvalContext, options: PlanOptions) -> None:
    """Raise UserError where the model cannot imagine a part of its tokens."""
    if options.keep_tokens < 1 and not isinstance(context.world_model, KeepsPatches):
        able = ", ".join(name for name in MODELS if issubclass(MODELS.get(name), KeepsPatches))
        raise UserError(
            f"--keep {options.keep_tokens}: the model of {context.run} imagines whole frames; leave it out, or train {able}"
        )


def _proposals_of(context: EvalContext, horizon: int, goal: Tensor | None) -> Propose | None:
    """Return what draws the solver's proposals, if it takes any."""
    if not (count := require_proposals(context)):
        return None
    assert isinstance(context.world_model, Proposes)
    return functools.partial(context.world_model.propose, goal=goal, horizon=horizon, count=count)


def require_proposals(context: EvalContext) -> int:
    """Return how many proposals the solver takes; raises UserError where it takes some, and the model has no policy."""
    solver, model = context.solver, context.world_model
    count = solver.proposals if isinstance(solver, TakesProposals) else 0
    if count and not (isinstance(model, Proposes) and model.has_policy):
        raise UserError(f"--proposals {count}: the model of {context.run} has no policy; write --proposals 0")
    return count
