"""Starts and goals: by number, reachable where that is promised, out of episodes that nobody trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from wmcache.cache import TokenStore, UserError
from wmcache.cache.windows import split_episodes
from wmcache.envs import Maze, PointMazeSimulator, sample_state
from wmcache.planner.evaluate import PlanOptions, Setting, run_episodes
from wmcache.planner.goals import SOURCES, start_and_goal
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


def write(path: Path, columns: dict[str, Any]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


class TestFiles:
    def test_an_evaluation_can_be_planned_again_from_its_own_episodes(
        self, run_path: Path, setting: Setting, tiny_plan: PlanOptions, tmp_path: Path
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
