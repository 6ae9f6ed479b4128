"""Starts and goals: by number, reachable where that is promised, out of episodes that nobody trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from wmcache.cache import TokenStore
from wmcache.cache.windows import split_episodes
from wmcache.common.errors import UserError
from wmcache.envs import Maze, PointMazeSimulator, longest_move, sample_state
from wmcache.planner.context import EvalContext, run_episodes
from wmcache.planner.goals import SOURCES, Apart, start_and_goal
from wmcache.planner.options import PlanOptions
from wmcache.planner.report import write_episodes

MakeStore = Callable[..., TokenStore]
UMAZE = Maze.load("UMaze")
IN, IN_TOO, WALL = [1.0, 1.0, 0.0, 0.0], [1.0, 3.0, 0.5, -0.5], [2.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("source", SOURCES)
class TestEverySource:
    def test_an_episode_is_a_function_of_its_number(self, store: TokenStore, source: str) -> None:
        start, goal = start_and_goal(source, range(10), UMAZE, store, 10)
        assert start.shape == goal.shape == (10, 4)
        assert start.dtype == goal.dtype == np.float64
        others = start_and_goal(source, [7, 3], UMAZE, store, 10)
        np.testing.assert_array_equal(others[0], start[[7, 3]])
        np.testing.assert_array_equal(others[1], goal[[7, 3]])

    def test_episodes_differ_and_lie_where_the_ball_can_be(self, store: TokenStore, source: str) -> None:
        start, goal = start_and_goal(source, range(10), UMAZE, store, 10)
        # The one episode that was held out has only so many frames.
        assert min(len(np.unique(start, axis=0)), len(np.unique(goal, axis=0))) >= (8 if source == "dataset" else 10)
        assert UMAZE.is_clear(np.concatenate([start, goal])[:, :2], 0.0).all()
        assert not (start == goal).all(1).any()


def test_random_states_are_the_same_whatever_the_steps(store: TokenStore) -> None:
    for one, other in zip(*(start_and_goal("random-state", [0, 1], UMAZE, store, n) for n in (1, 50)), strict=True):
        np.testing.assert_array_equal(one, other)


class TestDataset:
    @pytest.mark.parametrize("steps", [1, 10, 59])
    def test_start_and_goal_lie_so_many_steps_apart_in_an_episode_that_was_not_trained_on(
        self, store: TokenStore, steps: int
    ) -> None:
        held_out = split_episodes(6, "val", 42)
        for start, goal in zip(*start_and_goal("dataset", range(20), UMAZE, store, steps), strict=True):
            frame = int(np.flatnonzero((store.state == start).all(1))[0])
            np.testing.assert_array_equal(store.state[frame + steps], goal)
            assert store.episode[frame] == store.episode[frame + steps]
            assert store.episode[frame] in held_out

    def test_the_split_is_the_runs_own(self, store: TokenStore) -> None:
        seen = set()
        for seed in range(8):
            start, _ = start_and_goal("dataset", range(5), UMAZE, store, 10, seed)
            frames = [int(np.flatnonzero((store.state == one).all(1))[0]) for one in start]
            assert set(store.episode[frames].tolist()) <= set(split_episodes(6, "val", seed).tolist())
            seen.update(store.episode[frames].tolist())
        assert len(seen) > 1

    def test_all_places_of_an_episode_come_up_the_last_included(self, make_store: MakeStore) -> None:
        state = np.column_stack([np.arange(1.0, 17.0), np.ones(16), np.zeros((16, 2))])
        hall = Maze("Hall", ("###", *["#O#"] * 17, "###"))
        store = make_store([np.zeros((8, 1))] * 2, state)
        start, _ = start_and_goal("dataset", range(60), hall, store, 5)
        first = 1 + 8 * int(split_episodes(2, "val", 42)[0])
        assert set(start[:, 0].astype(int).tolist()) == {first, first + 1, first + 2}

    def test_episodes_too_short_are_refused(self, store: TokenStore) -> None:
        with pytest.raises(UserError, match=r"no held-out episode of .* has 61 frames; lower --goal-steps"):
            start_and_goal("dataset", [0], UMAZE, store, 60)


def test_frames_of_another_maze_are_refused(store: TokenStore) -> None:
    with pytest.raises(UserError, match=r"--goals dataset: .* places in walls of maze Narrow"):
        start_and_goal("dataset", range(20), Maze("Narrow", ("###", "#O#", "###")), store, 10)


def test_random_actions_lead_from_the_start_to_the_goal(store: TokenStore) -> None:
    start, goal = start_and_goal("random-action", range(4), UMAZE, store, 25)
    simulator = PointMazeSimulator(UMAZE)
    for number in range(4):
        rng = np.random.default_rng(99 * number + 1)
        state = sample_state(UMAZE, rng)
        np.testing.assert_array_equal(start[number], state)
        for action in rng.normal(size=(25, 2)):
            state = simulator.step(state, action)
        np.testing.assert_array_equal(goal[number], state)


class TestApart:
    """Strict pairs: beyond every reported threshold, and beyond what one model step can cover."""

    APART = Apart(0.5, longest_move(5))

    @pytest.mark.parametrize("source", SOURCES)
    def test_every_source_draws_pairs_that_far(self, store: TokenStore, source: str) -> None:
        # The one episode that was held out does not go far.
        apart = Apart(0.2, longest_move(1)) if source == "dataset" else self.APART
        start, goal = start_and_goal(source, range(12), UMAZE, store, 40, apart=apart)
        straight = np.linalg.norm(start[:, :2] - goal[:, :2], axis=1)
        paths = [UMAZE.geodesic(one[:2], other[None, :2])[0] for one, other in zip(start, goal, strict=True)]
        assert straight.min() >= apart.threshold
        assert min(paths) >= apart.threshold + apart.step
        # An episode still depends on its number alone.
        again = start_and_goal(source, [9, 4], UMAZE, store, 40, apart=apart)
        np.testing.assert_array_equal(again[0], start[[9, 4]])
        np.testing.assert_array_equal(again[1], goal[[9, 4]])

    def test_a_pair_that_is_far_enough_at_once_is_the_one_without_it(self, store: TokenStore) -> None:
        strict, loose = (
            start_and_goal("random-state", range(60), UMAZE, store, 0, apart=apart) for apart in (self.APART, Apart())
        )
        same = (strict[0] == loose[0]).all(1)
        far = [self.APART.holds(UMAZE, *pair) for pair in zip(*loose, strict=True)]
        assert same.tolist() == far
        assert 5 < same.sum() < 55

    def test_the_path_counts_and_not_the_straight_line(self) -> None:
        # On both sides of the U-maze's wall.
        start, goal = np.array([1.0, 1.0, 0, 0]), np.array([3.0, 1.0, 0, 0])
        assert self.APART.holds(UMAZE, start, goal)
        assert not Apart(2.1, 1.0).holds(UMAZE, start, goal)
        assert not self.APART.holds(UMAZE, start, np.array([1.0, 3.0, 0, 0]))

    def test_no_ball_gets_within_the_threshold_in_its_first_model_step(self, store: TokenStore) -> None:
        simulator = PointMazeSimulator(UMAZE)
        for state, goal in zip(
            *start_and_goal("random-state", range(40), UMAZE, store, 0, apart=self.APART), strict=True
        ):
            for _ in range(5):
                # Full force towards the goal.
                state = simulator.step(state, 100 * (goal - state)[:2])
                assert np.linalg.norm(state[:2] - goal[:2]) >= 0.5

    @pytest.mark.parametrize(("source", "steps"), [("random-state", 0), ("dataset", 3), ("random-action", 3)])
    def test_where_there_is_none_one_line_says_so(self, store: TokenStore, source: str, steps: int) -> None:
        apart = Apart(0.5, longest_move(20)) if source == "random-state" else self.APART
        with pytest.raises(UserError, match="--no-strict") as refusal:
            start_and_goal(source, [0], UMAZE, store, steps, apart=apart)
        assert "\n" not in str(refusal.value)
        assert ("--goal-steps" in str(refusal.value)) == (source != "random-state")

    def test_a_files_pairs_are_taken_as_they_are(self, store: TokenStore, tmp_path: Path) -> None:
        file = write(tmp_path / "near.parquet", {"start": [IN], "goal": [IN]})
        start, goal = start_and_goal(str(file), [0], UMAZE, store, 10, apart=self.APART)
        assert start.tolist() == goal.tolist() == [IN]

    @pytest.mark.parametrize("steps", [1, 5])
    def test_the_longest_move_is_never_exceeded(self, steps: int) -> None:
        simulator, rng = PointMazeSimulator(Maze.load("Open")), np.random.default_rng(0)
        longest = 0.0
        for _ in range(200):
            start = state = sample_state(simulator.maze, rng)
            heading = np.sign(state[2:])
            for _ in range(steps):
                state = simulator.step(state, heading)
            longest = max(longest, float(np.linalg.norm((state - start)[:2])))
        assert 0.8 * longest_move(steps) < longest <= longest_move(steps) + 1e-9


def write(path: Path, columns: dict[str, Any]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


class TestFiles:
    def test_an_evaluation_can_be_planned_again_from_its_own_episodes(
        self, run_path: Path, setting: EvalContext, tiny_plan: PlanOptions, tmp_path: Path
    ) -> None:
        episodes = run_episodes(setting, tiny_plan, range(3))
        write_episodes(tmp_path / "episodes.parquet", episodes)
        start, goal = start_and_goal(str(tmp_path / "episodes.parquet"), [0, 1, 2], UMAZE, setting.store, 10)
        np.testing.assert_array_equal(start, episodes.start)
        np.testing.assert_array_equal(goal, episodes.goal)

    def test_episode_n_takes_row_n(self, store: TokenStore, tmp_path: Path) -> None:
        file = write(
            tmp_path / "some.parquet", {"start": [IN, IN_TOO, IN], "goal": [IN_TOO, IN, IN_TOO], "more": [1, 2, 3]}
        )
        start, goal = start_and_goal(str(file), [1, 2], UMAZE, store, 10)
        assert start.tolist() == [IN_TOO, IN]
        assert goal.tolist() == [IN, IN_TOO]

    @pytest.mark.parametrize(
        ("columns", "numbers", "said"),
        [
            ({"start": [IN]}, [0], "columns start and goal"),
            ({"goal": [IN], "begin": [IN]}, [0], "columns start and goal"),
            ({"start": [IN[:3]], "goal": [IN[:3]]}, [0], "4 finite numbers"),
            ({"start": [IN, IN[:2]], "goal": [IN, IN]}, [0], "columns start and goal"),
            ({"start": [1.0], "goal": [2.0]}, [0], "4 finite numbers"),
            ({"start": [[np.nan, 1.0, 0.0, 0.0]], "goal": [IN]}, [0], "4 finite numbers"),
            ({"start": [None], "goal": [IN]}, [0], "4 finite numbers"),
            ({"start": ["here"], "goal": ["there"]}, [0], "columns start and goal"),
            ({"start": [IN], "goal": [IN_TOO]}, [0, 1], "1 rows, episode 1 has none; lower --episodes"),
            ({"start": [WALL, IN], "goal": [IN, IN]}, [0, 1], "row 0 lies in a wall of maze UMaze"),
            ({"start": [IN, IN], "goal": [IN, WALL]}, [1], "row 1 lies in a wall of maze UMaze"),
            ({"start": [[1e300, 0.0, 0.0, 0.0]], "goal": [IN]}, [0], "4 finite numbers"),
        ],
        ids=str,
    )
    def test_what_cannot_be_used_is_refused_in_a_line(
        self, store: TokenStore, tmp_path: Path, columns: dict[str, Any], numbers: list[int], said: str
    ) -> None:
        file = write(tmp_path / "some.parquet", columns)
        with pytest.raises(UserError, match=said) as refusal:
            start_and_goal(str(file), numbers, UMAZE, store, 10)
        assert str(file) in str(refusal.value)
        assert "\n" not in str(refusal.value)

    @pytest.mark.parametrize("kind", ["missing", "folder", "text", "empty"])
    def test_what_is_no_parquet_file_is_refused_in_a_line(self, store: TokenStore, tmp_path: Path, kind: str) -> None:
        file = tmp_path / "some"
        if kind == "folder":
            file.mkdir()
        elif kind != "missing":
            file.write_text("start,goal\n" * (kind == "text"))
        with pytest.raises(
            UserError, match="neither random-state, dataset, random-action nor a readable Parquet"
        ) as refusal:
            start_and_goal(str(file), [0], UMAZE, store, 10)
        assert "\n" not in str(refusal.value)

    def test_an_unknown_source_is_taken_for_a_file_that_is_not_there(self, store: TokenStore) -> None:
        with pytest.raises(UserError, match="--goals random-stat is neither"):
            start_and_goal("random-stat", [0], UMAZE, store, 10)
