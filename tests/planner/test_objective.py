"""The distance to the goal, against a calculation by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from wmcache.planner.objective import MODES, GoalDistance

ALL = slice(None)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("alpha", [0.0, 0.7])
@pytest.mark.parametrize("masked", [False, True])
def test_each_candidate_is_compared_with_its_own_episodes_goal(mode: str, alpha: float, masked: bool) -> None:
    latents, proprio = random(2, 3, 4, 5, 6), random(2, 3, 4, 7, seed=1)
    goal, goal_proprio = random(2, 5, 6, seed=2), random(2, 7, seed=3)
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 0, 0, 0]]).bool()
    objective = GoalDistance(goal, mode, alpha, goal_proprio, mask=mask if masked else None)
    distance = objective(latents, proprio, ALL)
    assert distance.shape == (2, 3)
    scored = {"last": [3], "all": [0, 1, 2, 3]}[mode]
    for episode in range(2):
        tokens = mask[episode] if masked else torch.ones(5).bool()
        for sample in range(3):
            seen = (latents[episode, sample, scored] - goal[episode])[:, tokens].square().mean()
            felt = (proprio[episode, sample, scored] - goal_proprio[episode]).square().mean()
            torch.testing.assert_close(distance[episode, sample], seen + alpha * felt)
    for part in (slice(0, 1), slice(1, 2)):
        torch.testing.assert_close(objective(latents[part], proprio[part], part), distance[part])


class Ruler:
    """A graph whose distance is how far the first number of a frame is from 10."""

    def __init__(self) -> None:
        self.received: list[tuple[Tensor, Tensor]] = []

    def distance(self, latents: Tensor, goal: Tensor, to_goal: Tensor) -> Tensor:
        self.received.append((goal, to_goal))
        return 10 - latents[..., 0, 0]


@pytest.mark.parametrize(("mode", "expected"), [("last", [[7.0], [4.0]]), ("all", [[8.0], [5.0]])])
def test_with_a_graph_it_is_the_graphs_distance(mode: str, expected: list[list[float]]) -> None:
    latents = torch.arange(1.0, 7.0).view(2, 1, 3, 1, 1)
    goal, to_goal = random(2, 1, 1), random(2, 8)
    ruler: Any = Ruler()
    objective = GoalDistance(goal, mode, graph=ruler, to_goal=to_goal)
    assert objective(latents, torch.zeros(2, 1, 3, 0), ALL).tolist() == expected
    assert objective(latents[1:], torch.zeros(1, 1, 3, 0), slice(1, 2)).tolist() == expected[1:]
    # Each episode's own goal, and path lengths to it.
    assert torch.equal(ruler.received[1][0], goal[1:])
    assert torch.equal(ruler.received[1][1], to_goal[1:])
