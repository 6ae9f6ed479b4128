"""The judge: when a goal counts as reached, whether it was held, and how direct the way was."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from wmcache.envs import Maze
from wmcache.planner.episodes import Episodes, env_steps, join, judge, load_episodes, save_episodes, ways

NEAR, FAR = 0.2, 5.0
HALL = Maze("Hall", ("#" * 8, "#" + "O" * 6 + "#", "#" + "O" * 6 + "#", "#" * 8))
"""x from 0.3 to 2.3, y from 0.3 to 6.3."""


def make_episodes(*distances: list[float], chunk: int = 5) -> Episodes:
    """Episodes whose ball lies, after each env step, at these distances from the goal; it flies on while it is there."""
    distance = np.array(distances)
    goal = np.tile([1.0, 1.0, -3.0, 3.0], (len(distance), 1))
    states = np.zeros((*distance.shape, 4))
    states[..., :2] = goal[:, None, :2]
    states[..., 1] += distance
    return Episodes(goal + 1, goal, states, chunk, encoder_frames=0, replans=0, seconds=0.0)


def arriving(*near: int, budget: int = 12) -> list[float]:
    """Near after these env steps, far after all others."""
    return [NEAR if step + 1 in near else FAR for step in range(budget)]


def count_successes(successes: int, episodes: int) -> Episodes:
    return make_episodes(*([NEAR] * 5 if i < successes else [FAR] * 5 for i in range(episodes)))


def travelling(*ways: Sequence[tuple[float, float]], goal: tuple[float, float], chunk: int = 1) -> Episodes:
    """Episodes that go from the first to the last of some places, an env step each; the shorter ones wait at the end."""
    length = max(map(len, ways))
    places = np.array([[*way, *[way[-1]] * (length - len(way))] for way in ways])
    states = np.concatenate([places, np.zeros_like(places)], 2)
    goals = np.tile([*goal, 0.0, 0.0], (len(ways), 1))
    return Episodes(states[:, 0], goals, states[:, 1:], chunk, encoder_frames=0, replans=0, seconds=0.0)


class TestSuccess:
    def test_only_the_end_of_a_chunk_counts(self) -> None:
        episodes = make_episodes(arriving(3, 4, 6, 9, 11), arriving(5), arriving(10), arriving(12))
        assert env_steps(episodes, 0.5).tolist() == [12, 5, 10, 12]
        verdict = judge(episodes, 0.5, HALL)
        assert (verdict["successes"], verdict["success_rate"]) == (3, 0.75)

    def test_the_first_arrival_counts(self) -> None:
        assert env_steps(make_episodes(arriving(5, 10, 12)), 0.5).tolist() == [5]

    def test_an_episode_that_never_arrives_counts_with_its_whole_budget(self) -> None:
        verdict = judge(make_episodes(arriving(5), arriving(), arriving(10)), 0.5, HALL)
        assert verdict["mean_env_steps"] == (5 + 12 + 10) / 3

    def test_on_the_threshold_is_not_within_it(self) -> None:
        assert judge(make_episodes([0.5] * 5), 0.5, HALL)["successes"] == 0

    @pytest.mark.parametrize(
        ("successes", "count", "low", "high"),
        [(0, 50, 0.0, 0.0713), (50, 50, 0.9287, 1.0), (5, 10, 0.2366, 0.7634), (49, 50, 0.8950, 0.9965)],
    )
    def test_the_interval_is_wilsons(self, successes: int, count: int, low: float, high: float) -> None:
        # Values of Wilson (1927) as tables and R's prop.test(correct = FALSE) have them.
        assert judge(count_successes(successes, count), 0.5, HALL)["ci95"] == pytest.approx([low, high], abs=6e-5)

    def test_a_wider_threshold_is_never_harder(self) -> None:
        rng = np.random.default_rng(0)
        episodes = make_episodes(*rng.uniform(0, 1.5, (40, 30)).tolist())
        thresholds = [0.1, 0.25, 0.5, 1.0]
        successes = [judge(episodes, threshold, HALL)["successes"] for threshold in thresholds]
        assert successes == sorted(successes)
        assert len(set(successes)) > 2
        for narrow, wide in pairwise(thresholds):
            assert (env_steps(episodes, wide) <= env_steps(episodes, narrow)).all()


class TestHolding:
    def test_who_was_there_and_left_has_not_held(self) -> None:
        verdict = judge(make_episodes(arriving(5), arriving(5, 12), arriving(12), arriving()), 0.5, HALL)
        assert (verdict["held"], verdict["held_rate"]) == (2, 0.5)

    def test_its_interval_is_of_those_who_held_not_of_those_who_arrived(self) -> None:
        episodes = make_episodes(*[arriving(5)] * 5, *[arriving(12)] * 5)
        verdict = judge(episodes, 0.5, HALL)
        assert verdict["held_ci95"] == pytest.approx([0.2366, 0.7634], abs=6e-5)
        assert verdict["ci95"] == pytest.approx([0.7225, 1.0], abs=6e-5)


class TestDirectness:
    def test_the_straight_way_is_1(self) -> None:
        # 4 to go, of which the last 0.5 need not be gone.
        verdict = judge(travelling([(1, 1), (1, 3), (1, 4.5001)], goal=(1, 5)), 0.5, HALL)
        assert (verdict["path_ratio"], verdict["spl"]) == pytest.approx((1, 1), abs=0.01)

    def test_a_detour_twice_as_long_is_2(self) -> None:
        episodes = travelling([(1, 3), (1, 1.5), (1, 3), (1, 4), (1, 5.5001)], goal=(1, 6))
        verdict = judge(episodes, 0.5, HALL)
        assert (verdict["path_ratio"], verdict["spl"]) == pytest.approx((5.5 / 2.5, 2.5 / 5.5), abs=0.01)

    def test_the_way_to_and_fro_within_a_chunk_counts(self) -> None:
        to_and_fro = [(1.0, 1.0), (1.0, 4.51), (1.0, 1.0), (1.0, 4.51)]
        verdict = judge(travelling(to_and_fro, goal=(1, 5), chunk=3), 0.5, HALL)
        assert verdict["path_ratio"] == pytest.approx(3, abs=0.02)

    def test_what_comes_after_the_arrival_does_not(self) -> None:
        verdict = judge(travelling([(1, 1), (1, 4.51), (1, 1), (1, 6)], goal=(1, 5)), 0.5, HALL)
        assert verdict["path_ratio"] == pytest.approx(1, abs=0.01)

    def test_the_shortest_way_goes_around_walls(self) -> None:
        around = [(1.0, 1.0), (1.0, 3.0), (3.0, 3.0), (3.0, 1.49)]
        taken, shortest = ways(travelling(around, goal=(3, 1)), 0.5, Maze.load("UMaze"))
        assert taken == pytest.approx([5.51])
        # The corners can be cut, but there is no way straight through.
        assert 3 < shortest[0] < 5.5

    def test_a_long_way_weighs_more_than_a_short_one_in_the_ratio_and_as_much_in_spl(self) -> None:
        direct, detour = [(1, 1), (1, 5.51), (1, 5.51)], [(1, 5), (1, 4), (1, 5.51)]
        verdict = judge(travelling(direct, detour, goal=(1, 6)), 0.5, HALL)
        assert verdict["path_ratio"] == pytest.approx((4.5 + 2.5) / (4.5 + 0.5), abs=0.02)
        assert verdict["spl"] == pytest.approx((1 + 0.5 / 2.5) / 2, abs=0.02)

    def test_who_starts_within_the_threshold_had_no_way_to_go(self) -> None:
        verdict = judge(travelling([(1, 4.8), (1, 4.6), (1, 4.8)], goal=(1, 5), chunk=2), 0.5, HALL)
        assert (verdict["path_ratio"], verdict["spl"]) == (None, 1)
        still = judge(travelling([(1, 5), (1, 5)], goal=(1, 5)), 0.5, HALL)
        assert (still["path_ratio"], still["spl"]) == (None, 1)

    def test_who_never_arrives_counts_as_nothing_in_spl_and_not_at_all_in_the_ratio(self) -> None:
        episodes = travelling([(1, 1), (1, 4.51)], [(1, 1), (1, 2)], goal=(1, 5))
        verdict = judge(episodes, 0.5, HALL)
        assert (verdict["path_ratio"], verdict["spl"]) == pytest.approx((1, 0.5), abs=0.01)

    def test_without_a_success_there_is_no_ratio(self) -> None:
        verdict = judge(travelling([(1, 1), (1, 2)], goal=(1, 5)), 0.5, HALL)
        assert (verdict["path_ratio"], verdict["spl"]) == (None, 0)

    def test_a_goal_without_a_way_to_it_is_judged_like_one_that_was_not_reached(self) -> None:
        rooms = Maze("Rooms", ("#####", "#O#O#", "#####"))
        verdict = judge(travelling([(1, 1), (1, 1)], [(1, 3), (1, 3)], goal=(1, 3)), 0.5, rooms)
        assert (verdict["successes"], verdict["spl"]) == (1, 0.5)


class TestOnDisk:
    def test_a_batch_comes_back_as_it_was(self, tmp_path: Path) -> None:
        episodes = make_episodes(arriving(5), arriving())
        save_episodes(tmp_path / "000000.npz", episodes)
        again = load_episodes(tmp_path / "000000.npz")
        for name in ("start", "goal", "states"):
            np.testing.assert_array_equal(getattr(again, name), getattr(episodes, name))
        assert (again.chunk, again.encoder_frames, again.seconds) == (5, 0, 0.0)

    def test_batches_are_joined_in_order(self) -> None:
        both = join([make_episodes(arriving(5)), make_episodes(arriving(), arriving(12))])
        assert env_steps(both, 0.5).tolist() == [5, 12, 12]
        assert (both.distances() < 0.5).any(1).tolist() == [True, False, True]
