"""The judge: when a goal counts as reached, whether it is held, and how direct the path is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from wmcache.envs import Maze
from wmcache.planner.episodes import Episodes
from wmcache.planner.judge import env_steps, judge, path_lengths, shortest_path_lengths

NEAR, FAR = 0.2, 5.0
HALL = Maze("Hall", ("#" * 8, "#" + "O" * 6 + "#", "#" + "O" * 6 + "#", "#" * 8))
"""x from 0.3 to 2.3, y from 0.3 to 6.3."""
Point = tuple[float, float]


def make_episodes(*distances: list[float], chunk: int = 5) -> Episodes:
    """Episodes at these distances from the goal after each env step; the velocity is not 0."""
    distance = np.array(distances)
    goal = np.tile([1.0, 1.0, -3.0, 3.0], (len(distance), 1))
    states = np.zeros((*distance.shape, 4))
    states[..., :2] = goal[:, None, :2]
    states[..., 1] += distance
    return Episodes(goal + 1, goal, states, chunk, encoder_frames=0, replans=0, seconds=0.0)


def arriving(*near: int, budget: int = 12) -> list[float]:
    """Near after these env steps, far after all others."""
    return [NEAR if step + 1 in near else FAR for step in range(budget)]


def travelling(*paths: Sequence[Point], goal: Point, chunk: int = 1) -> Episodes:
    """Episodes along paths, an env step per point; shorter ones wait at their end."""
    length = max(map(len, paths))
    points = np.array([[*path, *[path[-1]] * (length - len(path))] for path in paths])
    states = np.concatenate([points, np.zeros_like(points)], 2)
    goals = np.tile([*goal, 0.0, 0.0], (len(paths), 1))
    return Episodes(states[:, 0], goals, states[:, 1:], chunk, encoder_frames=0, replans=0, seconds=0.0)


class TestSuccess:
    def test_only_the_end_of_a_chunk_counts_and_the_first_arrival(self) -> None:
        episodes = make_episodes(arriving(3, 4, 6, 9, 11), arriving(5, 10, 12), arriving(10), arriving(12), arriving())
        assert env_steps(episodes, 0.5).tolist() == [12, 5, 10, 12, 12]
        judged = judge(episodes, 0.5, HALL)
        assert (judged["successes"], judged["success_rate"]) == (3, 0.6)
        # An episode that never arrives counts with its whole budget.
        assert judged["mean_env_steps"] == (12 + 5 + 10 + 12 + 12) / 5
        # On the threshold is not within it.
        assert judge(make_episodes([0.5] * 5), 0.5, HALL)["successes"] == 0

    @pytest.mark.parametrize(
        ("successes", "count", "low", "high"),
        [(0, 50, 0.0, 0.0713), (5, 10, 0.2366, 0.7634), (49, 50, 0.8950, 0.9965)],
    )
    def test_the_interval_is_wilsons(self, successes: int, count: int, low: float, high: float) -> None:
        # Values of Wilson (1927), as in tables and in R's prop.test(correct = FALSE).
        episodes = make_episodes(*([NEAR] * 5 if i < successes else [FAR] * 5 for i in range(count)))
        assert judge(episodes, 0.5, HALL)["ci95"] == pytest.approx([low, high], abs=6e-5)

    def test_an_episode_that_left_the_goal_has_not_held_it(self) -> None:
        judged = judge(make_episodes(*[arriving(5)] * 5, *[arriving(5, 12)] * 2, *[arriving(12)] * 3), 0.5, HALL)
        assert (judged["held"], judged["held_rate"]) == (5, 0.5)
        assert judged["held_ci95"] == pytest.approx([0.2366, 0.7634], abs=6e-5)


class TestDirectness:
    @pytest.mark.parametrize(
        ("paths", "goal", "chunk", "path_ratio", "spl"),
        [
            # A straight path of 4, whose last 0.5 need not be travelled.
            ([[(1, 1), (1, 3), (1, 4.5001)]], (1, 5), 1, 1, 1),
            # A detour.
            ([[(1, 3), (1, 1.5), (1, 3), (1, 4), (1, 5.5001)]], (1, 6), 1, 5.5 / 2.5, 2.5 / 5.5),
            # Back and forth within a chunk.
            ([[(1, 1), (1, 4.51), (1, 1), (1, 4.51)]], (1, 5), 3, 3, 1 / 3),
            # What comes after the arrival does not count.
            ([[(1, 1), (1, 4.51), (1, 1), (1, 6)]], (1, 5), 1, 1, 1),
            # A long path has more weight in the ratio, and the same in SPL.
            ([[(1, 1), (1, 5.51), (1, 5.51)], [(1, 5), (1, 4), (1, 5.51)]], (1, 6), 1, 7 / 5, (1 + 0.2) / 2),
            # An episode that never arrives counts as 0 in SPL, and not in the ratio.
            ([[(1, 1), (1, 4.51)], [(1, 1), (1, 2)]], (1, 5), 1, 1, 0.5),
        ],
    )
    def test_path_ratio_and_spl(
        self, paths: list[list[Point]], goal: Point, chunk: int, path_ratio: float, spl: float
    ) -> None:
        judged = judge(travelling(*paths, goal=goal, chunk=chunk), 0.5, HALL)
        assert (judged["path_ratio"], judged["spl"]) == pytest.approx((path_ratio, spl), abs=0.02)

    @pytest.mark.parametrize(("path", "spl"), [([(1, 4.8), (1, 4.6), (1, 4.8)], 1), ([(1, 1), (1, 2)], 0)])
    def test_without_a_path_to_travel_there_is_no_ratio(self, path: list[Point], spl: int) -> None:
        judged = judge(travelling(path, goal=(1, 5), chunk=len(path) - 1), 0.5, HALL)
        assert (judged["path_ratio"], judged["spl"]) == (None, spl)

    def test_the_shortest_path_goes_around_walls(self) -> None:
        episodes = travelling([(1, 1), (1, 3), (3, 3), (3, 1.49)], goal=(3, 1))
        maze = Maze.load("UMaze")
        assert path_lengths(episodes, 0.5) == pytest.approx([5.51])
        assert 3.5 < shortest_path_lengths(episodes, maze)[0] < 6  # corners can be cut

    def test_a_goal_that_cannot_be_reached_is_a_failure(self) -> None:
        rooms = Maze("Rooms", ("#####", "#O#O#", "#####"))
        judged = judge(travelling([(1, 1), (1, 1)], [(1, 3), (1, 3)], goal=(1, 3)), 0.5, rooms)
        assert (judged["successes"], judged["spl"]) == (1, 0.5)
