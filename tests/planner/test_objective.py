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


@pytest.mark.parametrize(("mode", "expected"), [("last", 9.0), ("all", 5.0)])
def test_one_number_a_frame(mode: str, expected: float) -> None:
    latents, goal = torch.tensor([1.0, -3.0]).view(1, 1, 2, 1, 1), torch.zeros(1, 1, 1)
    assert GoalDistance(goal, mode)(latents, torch.zeros(1, 1, 2, 0), ALL).tolist() == [[expected]]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_each_candidate_meets_its_own_episodes_goal(mode: str, alpha: float) -> None:
    latents, code = random(2, 3, 4, 5, 6), random(2, 3, 4, 7, seed=1)
    goal, goal_code = random(2, 5, 6, seed=2), random(2, 7, seed=3)
    objective = GoalDistance(goal, mode, alpha, goal_code)
    distance = objective(latents, code, ALL)
    assert distance.shape == (2, 3)
    scored = {"last": [3], "all": [0, 1, 2, 3]}[mode]
    for episode in range(2):
        for sample in range(3):
            seen = (latents[episode, sample, scored] - goal[episode]).square().mean()
            felt = (code[episode, sample, scored] - goal_code[episode]).square().mean()
            torch.testing.assert_close(distance[episode, sample], seen + alpha * felt)


@pytest.mark.parametrize("mode", MODES)
def test_a_part_of_the_episodes_meets_its_own_goals(mode: str) -> None:
    latents, code = random(4, 3, 2, 5, 6), random(4, 3, 2, 7, seed=1)
    objective = GoalDistance(random(4, 5, 6, seed=2), mode, 0.7, random(4, 7, seed=3))
    whole = objective(latents, code, ALL)
    for part in (slice(0, 1), slice(1, 3), slice(3, 4)):
        torch.testing.assert_close(objective(latents[part], code[part], part), whole[part])


def test_without_alpha_proprio_is_not_looked_at() -> None:
    latents, goal = random(2, 3, 4, 5, 6), random(2, 5, 6, seed=2)
    unknown = torch.full((2, 3, 4, 7), torch.nan)
    felt = GoalDistance(goal, "all", 0.0, torch.full((2, 7), torch.nan))
    assert torch.equal(felt(latents, unknown, ALL), GoalDistance(goal, "all")(latents, unknown, ALL))
    assert felt(latents, unknown, ALL).isfinite().all()


class Ruler:
    """A graph that knows one thing: how far the first number of a frame is from 10."""

    def __init__(self) -> None:
        self.asked: list[tuple[Tensor, Tensor]] = []

    def distance(self, latents: Tensor, goal: Tensor, to_goal: Tensor) -> Tensor:
        self.asked.append((goal, to_goal))
        return 10 - latents[..., 0, 0]


@pytest.mark.parametrize(("mode", "expected"), [("last", [[7.0], [4.0]]), ("all", [[8.0], [5.0]])])
def test_with_a_graph_it_is_the_graphs_distance(mode: str, expected: list[list[float]]) -> None:
    latents = torch.arange(1.0, 7.0).view(2, 1, 3, 1, 1)
    goal, to_goal = random(2, 1, 1), random(2, 8)
    ruler: Any = Ruler()
    objective = GoalDistance(goal, mode, graph=ruler, to_goal=to_goal)
    assert objective(latents, torch.zeros(2, 1, 3, 0), ALL).tolist() == expected
    assert objective(latents[1:], torch.zeros(1, 1, 3, 0), slice(1, 2)).tolist() == expected[1:]
    # To its own goal, by its own ways.
    assert torch.equal(ruler.asked[1][0], goal[1:])
    assert torch.equal(ruler.asked[1][1], to_goal[1:])
