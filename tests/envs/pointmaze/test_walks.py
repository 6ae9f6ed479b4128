"""OGBench's data styles: episodes that wander from goal to goal, and short ones to a goal four cells away."""

from __future__ import annotations

from collections import deque
from itertools import pairwise

import numpy as np
import pytest

from wmcache.envs import Maze, Task, open_environment
from wmcache.envs.pointmaze.expert import steer
from wmcache.envs.pointmaze.walks import NOISE
from wmcache.pipeline.collect import behaviour_policies
from wmcache.pipeline.play import Player

MEDIUM = Maze.load("Medium")


def states_of(policy: str, episodes: int, length: int) -> list[np.ndarray]:
    player = Player("Medium", (), 16, seed=0, policy=policy, length=length)
    return [rows["state"] for rows in player.play(range(episodes))]


def cell(xy: np.ndarray) -> tuple[int, int]:
    row, column = np.floor(xy[:2] + 0.7).astype(int).tolist()
    return row, column


def moves_from(start: tuple[int, int]) -> dict[tuple[int, int], int]:
    """Breadth-first search over cells."""
    moves, queue = {start: 0}, deque([start])
    while queue:
        row, column = queue.popleft()
        for other in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            if MEDIUM.free[other] and other not in moves:
                moves[other] = moves[row, column] + 1
                queue.append(other)
    return moves


def test_navigate_crosses_the_maze_along_shortest_paths() -> None:
    everywhere: set[tuple[int, int]] = set()
    for states in states_of("navigate", 3, 300):
        visited = [cell(state) for state in states]
        everywhere |= set(visited)
        assert max(moves_from(visited[0])[other] for other in visited) > 6
        # It turns back where a goal was reached, not at random: moves between cells are far more than reversals.
        route = [visited[0]] + [b for a, b in pairwise(visited) if a != b]
        turns = sum(a == c for a, c in zip(route, route[2:], strict=False))
        assert len(route) > 30
        assert turns < 0.35 * len(route)
    assert len(everywhere) > 0.9 * MEDIUM.free.sum()


def test_stitch_ends_four_cells_from_its_start_and_stays_there() -> None:
    lengths = []
    for states in states_of("stitch", 20, 100):
        moves = moves_from(cell(states[0]))
        lengths.append(moves[cell(states[-1])])
        late = states[60:, :2]
        assert np.ptp(late, axis=0).max() < 1.0
    # A ball that starts fast may have left its cell before it gets its first action.
    assert np.mean(np.array(lengths) == 4) > 0.8


@pytest.mark.parametrize("policy", ["navigate", "stitch"])
def test_actions_are_those_of_the_expert_with_noise(policy: str) -> None:
    env = open_environment("Medium+colors@0", 1, 16)
    assert policy in behaviour_policies(env)
    # At rest in the goal's own cell only noise is left, which is cut off at the bounds.
    rng = np.random.default_rng(0)
    act, state = env.policies[policy](rng, env), np.array([0.8, 0.8, 0.0, 0.0])
    act({"state": state})
    state[:2] = act._goal
    if policy == "navigate":
        state[0] += 0.26  # not there yet
    actions = np.stack([act({"state": state}) for _ in range(2000)])
    assert np.abs(actions).max() == 1.0
    wanted = steer(state, act._goal)
    np.testing.assert_allclose(actions[:, 1].mean(), wanted[1], atol=0.05)
    inside = np.abs(actions[:, 1]) < 1
    assert actions[inside, 1].std() == pytest.approx(
        0.88 * NOISE, rel=0.1
    )  # of a normal distribution cut at two deviations
    env.reset([Task(np.array([0.8, 0.8, 0.0, 0.0]))])
    env.close()
