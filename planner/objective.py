"""Objectives of the planning problem (DINO-WM, planning/objectives.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from wmcache.planner.graph import LatentGraph
from wmcache.trainer.models import Imagined, latent_distance, take_patches

Objective = Callable[[Imagined, slice], Tensor]
"""Scores imagined futures of these e episodes of all -> costs [e, S]."""


def negative_return(imagined: Imagined, episodes: slice) -> Tensor:  # noqa: ARG001 (an objective's signature)
    """Sum the predicted rewards, and the value if any, each weighted by the chance that the episode still goes on; an `Objective`."""
    assert imagined.reward is not None
    rewards = imagined.reward if imagined.value is None else torch.cat([imagined.reward, imagined.value], 2)
    if imagined.continues is not None:
        going = imagined.continues.cumprod(2)[:, :, : rewards.shape[2] - 1]
        rewards = torch.cat([rewards[:, :, :1], rewards[:, :, 1:] * going], 2)
    return -rewards.sum(2)


@dataclass(frozen=True)
class GoalDistance:
    """Distance of imagined frames from a goal frame.

    Attributes:
        goal: [E, N, D].
        mode: `last` scores the last imagined frame alone, as DINO-WM does, and so postpones the arrival at each replan. `all` averages
            over all imagined frames, so it prefers to arrive early and to stay.
        alpha: weight of the mean squared difference of proprio embeddings; DINO-WM has 0 for PointMaze.
        goal_proprio: [E, Q], needed where alpha is above 0.
        graph: measures distances along the cached frames, in place of `cost`.
        to_goal: [E, K], see `LatentGraph.to_goal`.
        mask: bool [E, N], the tokens that count (DDP-WM: those in which the present frame differs from the goal's); None: all.
        cost: the world model's, see `WorldModel.cost`; the default is DINO-WM's.
    """

    goal: Tensor
    mode: str
    alpha: float = 0.0
    goal_proprio: Tensor | None = None
    graph: LatentGraph | None = None
    to_goal: Tensor | None = None
    mask: Tensor | None = None
    cost: Callable[[Imagined, Tensor], Tensor] = latent_distance

    def __call__(self, imagined: Imagined, episodes: slice) -> Tensor:
        """See `Objective`."""
        if self.mode == "last":
            imagined = imagined.last()
        latents, goal = imagined.latents, self.goal[episodes]
        mask = None if self.mask is None else self.mask[episodes]
        if imagined.patches is not None:
            goal = take_patches(goal, imagined.patches)
            mask = None if mask is None else mask.gather(1, imagined.patches)
        if mask is not None:
            mask = mask | ~mask.any(1, keepdim=True)  # where none of those that count is imagined, all of them do
            counts = mask[:, None, None].to(latents.dtype)
            distance = ((latents - goal[:, None, None]).square().mean(4) * counts).sum(3) / counts.sum(3)
        elif self.graph is None or self.to_goal is None:
            distance = self.cost(imagined, goal)
        else:
            distance = self.graph.distance(latents, goal, self.to_goal[episodes])
        if self.alpha and self.goal_proprio is not None:
            difference = (imagined.proprio - self.goal_proprio[episodes][:, None, None]).square().mean(3)
            distance = distance + self.alpha * difference
        return distance.mean(2)
