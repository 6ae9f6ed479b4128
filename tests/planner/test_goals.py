"""Starts and goals: a function of the episode's number, far enough apart, from held-out episodes or a file."""

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
from wmcache.envs import Maze, PointMazeSimulator, longest_move, open_environment, sample_state
from wmcache.planner.goals import Separation, start_and_goal
from wmcache.planner.options import DRAWN, SOURCES, PlanOptions, check_options

MakeStore = Callable[..., TokenStore]
UMAZE = Maze.load("UMaze")
WORLD = open_environment("UMaze")
SEPARATION = Separation(0.5, longest_move(5))
IN, IN_TOO, WALL = [1.0, 1.0, 0.0, 0.0], [1.0, 3.0, 0.5, -0.5], [2.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("source", DRAWN)
@pytest.mark.parametrize("strict", [False, True])
def test_an_episode_is_a_function_of_its_number(store: TokenStore, source: str, strict: bool) -> None:
    # The one held-out episode does not go far.
    far = Separation(0.2, longest_move(1)) if source == "dataset" else SEPARATION
    separation = far if strict else Separation()
    start, goal = start_and_goal(source, range(10), WORLD, store, 40 if strict else 10, separation=separation)
    assert start.shape == goal.shape == (10, 4)
    assert start.dtype == goal.dtype == np.float64
    others = start_and_goal(source, [7, 3], WORLD, store, 40 if strict else 10, separation=separation)
    np.testing.assert_array_equal(others, (start[[7, 3]], goal[[7, 3]]))
    # Episodes differ, and are where the ball can be.
    if not strict:
        least = 8 if source == "dataset" else 10  # the held-out episode has only so many frames
        assert min(len(np.unique(start, axis=0)), len(np.unique(goal, axis=0))) >= least
    assert UMAZE.is_clear(np.concatenate([start, goal])[:, :2], 0.0).all()
    assert not (start == goal).all(1).any()
    straight = np.linalg.norm(start[:, :2] - goal[:, :2], axis=1)
    paths = [UMAZE.geodesic(one[:2], other[None, :2])[0] for one, other in zip(start, goal, strict=True)]
    assert straight.min() >= separation.threshold
    assert min(paths) >= separation.path


class TestDataset:
    @pytest.mark.parametrize(("steps", "seed"), [(1, 42), (59, 42), (10, 1)])
    def test_pairs_are_so_many_steps_apart_in_an_episode_held_out_by_the_runs_split(
        self, store: TokenStore, steps: int, seed: int
    ) -> None:
        held_out = split_episodes(6, "val", seed)
        for start, goal in zip(*start_and_goal("dataset", range(20), WORLD, store, steps, seed), strict=True):
            frame = int(np.flatnonzero((store.state == start).all(1))[0])
            np.testing.assert_array_equal(store.state[frame + steps], goal)
            assert store.episode[frame] == store.episode[frame + steps]
            assert store.episode[frame] in held_out

    def test_every_frame_of_an_episode_can_be_a_start(self, make_store: MakeStore) -> None:
        state = np.column_stack([np.arange(1.0, 17.0), np.ones(16), np.zeros((16, 2))])
        hall = open_environment("Hall", layout=("###", *["#O#"] * 17, "###"))
        store = make_store([np.zeros((8, 1))] * 2, state)
        start, _ = start_and_goal("dataset", range(60), hall, store, 5)
        first = 1 + 8 * int(split_episodes(2, "val", 42)[0])
        assert set(start[:, 0].astype(int).tolist()) == {first, first + 1, first + 2}

    def test_episodes_too_short_and_frames_of_another_maze_are_refused(self, store: TokenStore) -> None:
        with pytest.raises(UserError, match=r" 61 .*--goal-steps"):
            start_and_goal("dataset", [0], WORLD, store, 60)
        with pytest.raises(UserError, match=r"--goals dataset: .* Narrow"):
            start_and_goal("dataset", range(20), open_environment("Narrow", layout=("###", "#O#", "###")), store, 10)


def test_random_actions_lead_from_the_start_to_the_goal(store: TokenStore) -> None:
    start, goal = start_and_goal("random-action", range(4), WORLD, store, 25)
    simulator = PointMazeSimulator(UMAZE)
    for number in range(4):
        rng = np.random.default_rng(99 * number + 1)
        state = sample_state(UMAZE, rng)
        np.testing.assert_array_equal(start[number], state)
        for action in rng.normal(size=(25, 2)):
            state = simulator.step(state, action)
        np.testing.assert_array_equal(goal[number], state)


class TestTasks:
    def test_episodes_take_the_environments_tasks_in_turn(self, store: TokenStore) -> None:
        start, goal = start_and_goal("tasks", range(12), WORLD, store, 10, separation=SEPARATION)
        draws = list(WORLD.fixed_tasks().values())
        for number in range(12):
            task = draws[number % 5](np.random.default_rng(99 * number + 1))
            np.testing.assert_array_equal((start[number], goal[number]), (task.start, task.goal))
        others = start_and_goal("tasks", [7, 3], WORLD, store, 10)
        np.testing.assert_array_equal(others, (start[[7, 3]], goal[[7, 3]]))

    def test_an_environment_without_them_and_a_distance_are_refused(self, store: TokenStore) -> None:
        with pytest.raises(UserError, match=r"--goals tasks.*InvertedPendulum"):
            start_and_goal("tasks", [0], open_environment("gym:InvertedPendulum-v5"), store, 10)
        with pytest.raises(UserError, match=r"--min-distance.*--goals"):
            check_options(PlanOptions(goals="tasks", min_distance=1.5))


class TestSeparation:
    def test_only_pairs_that_are_too_close_are_drawn_again(self, store: TokenStore) -> None:
        strict, loose = (
            start_and_goal("random-state", range(60), WORLD, store, steps, separation=separation)
            for steps, separation in ((0, SEPARATION), (50, None))
        )
        same = (strict[0] == loose[0]).all(1)
        assert same.tolist() == [SEPARATION.allows(WORLD, *pair) for pair in zip(*loose, strict=True)]
        assert 5 < same.sum() < 55

    @pytest.mark.parametrize("strict", [False, True])
    @pytest.mark.parametrize("name", ["UMaze", "UMaze+ball@0"])
    def test_pairs_that_are_far_enough_apart_stay_as_they_are(self, store: TokenStore, name: str, strict: bool) -> None:
        env, usual, apart = (
            open_environment(name),
            PlanOptions(strict=strict),
            PlanOptions(strict=strict, min_distance=1.5),
        )
        before, after = (
            np.stack(start_and_goal("random-state", range(40), env, store, 0, separation=separation))
            for separation in (Separation.of(options, env, 5, env.spec.thresholds) for options in (usual, apart))
        )
        straight = [np.linalg.norm(start[:, :2] - goal[:, :2], axis=1) for start, goal in (before, after)]
        assert straight[0].min() < 1.5 <= straight[1].min()
        np.testing.assert_array_equal((before == after).all((0, 2)), straight[0] >= 1.5)
        env.close()

    def test_a_distance_that_no_pair_has_is_refused(self, store: TokenStore) -> None:
        with pytest.raises(UserError, match=r"9\.00.*--min-distance"):
            start_and_goal("random-state", [0], WORLD, store, 0, separation=Separation(least=9.0))

    def test_the_longest_move_is_never_exceeded(self) -> None:
        simulator, rng, steps = PointMazeSimulator(Maze.load("Open")), np.random.default_rng(0), 5
        longest = 0.0
        for _ in range(200):
            start = state = sample_state(simulator.maze, rng)
            heading = np.sign(state[2:])
            for _ in range(steps):
                state = simulator.step(state, heading)
            longest = max(longest, float(np.linalg.norm((state - start)[:2])))
        assert 0.8 * longest_move(steps) < longest <= longest_move(steps) + 1e-9


def write(path: Path, columns: dict[str, Any]) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


class TestFiles:
    def test_episode_n_takes_row_n_at_any_distance(self, store: TokenStore, tmp_path: Path) -> None:
        file = write(
            tmp_path / "some.parquet", {"start": [IN, IN_TOO, IN], "goal": [IN_TOO, IN, IN], "more": [1, 2, 3]}
        )
        start, goal = start_and_goal(file, [1, 2], WORLD, store, 10, separation=SEPARATION)
        assert start.tolist() == [IN_TOO, IN]
        assert goal.tolist() == [IN, IN]

    @pytest.mark.parametrize(
        ("columns", "numbers", "named"),
        [
            ({"start": [IN]}, [0], "goal"),
            ({"start": [IN, IN[:2]], "goal": [IN, IN]}, [0], "start"),
            ({"start": [1.0], "goal": [2.0]}, [0], " 4 "),
            ({"start": [[np.nan, 1.0, 0.0, 0.0]], "goal": [IN]}, [0], " 4 "),
            ({"start": ["here"], "goal": ["there"]}, [0], "start"),
            ({"start": [IN], "goal": [IN_TOO]}, [0, 1], " 1 rows.*--episodes"),
            ({"start": [WALL, IN], "goal": [IN, IN]}, [0, 1], "row 0.*UMaze"),
            ({"start": [IN, IN], "goal": [IN, WALL]}, [1], "row 1.*UMaze"),
        ],
        ids=str,
    )
    def test_unusable_ones_are_refused(
        self, store: TokenStore, tmp_path: Path, columns: dict[str, Any], numbers: list[int], named: str
    ) -> None:
        file = write(tmp_path / "some.parquet", columns)
        with pytest.raises(UserError, match=f"{file}.*{named}|{named}.*{file}"):
            start_and_goal(file, numbers, WORLD, store, 10)

    def test_a_distance_is_refused_beside_a_file(self) -> None:
        with pytest.raises(UserError, match=r"--min-distance.*--goals"):
            check_options(PlanOptions(goals="some.parquet", min_distance=1.5))

    def test_what_is_not_a_parquet_file_is_refused_with_the_sources(self, store: TokenStore, tmp_path: Path) -> None:
        (tmp_path / "text").write_text("start,goal\n")
        for file in (tmp_path, tmp_path / "text", tmp_path / "missing"):
            with pytest.raises(UserError, match=", ".join(SOURCES)):
                start_and_goal(str(file), [0], WORLD, store, 10)
