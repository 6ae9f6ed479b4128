"""The distance to the goal, against a calculation by hand."""

from __future__ import annotations

import pytest
import torch
from wmcache.planner.objective import MODES, goal_distance


@pytest.mark.parametrize(("mode", "expected"), [("last", 9.0), ("all", 5.0)])
def test_one_number_a_frame(mode: str, expected: float) -> None:
    latents, goal = torch.tensor([1.0, -3.0]).view(1, 1, 2, 1, 1), torch.zeros(1, 1, 1)
    assert goal_distance(latents, goal, mode).tolist() == [[expected]]


@pytest.mark.parametrize("mode", MODES)
def test_each_candidate_meets_its_own_episodes_goal(mode: str) -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 3, 4, 5, 6, generator=generator)
    goal = torch.randn(2, 5, 6, generator=generator)
    distance = goal_distance(latents, goal, mode)
    assert distance.shape == (2, 3)
    scored = {"last": [3], "all": [0, 1, 2, 3]}[mode]
    for episode in range(2):
        for sample in range(3):
            by_hand = sum((latents[episode, sample, t] - goal[episode]).pow(2).sum() for t in scored) / len(scored) / 30
            torch.testing.assert_close(distance[episode, sample], by_hand)


def test_an_unknown_mode_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match=r"'sum' is none of .*last.*all"):
        goal_distance(torch.zeros(1, 1, 1, 1, 1), torch.zeros(1, 1, 1), "sum")
