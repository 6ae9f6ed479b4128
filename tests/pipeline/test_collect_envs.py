"""Datasets of other environments: drawn from a state or by replay, with episodes that end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wmcache.common.errors import UserError
from wmcache.envs import Task, open_environment
from wmcache.pipeline.collect import collect
from wmcache.pipeline.frames import FrameDataset
from wmcache.pipeline.play import Player

from ..conftest import contents

SETTINGS = {"episodes": 4, "length": 12, "image_size": 16, "frames_per_shard": 10}


def collected(env: str, path: Path, **settings: Any) -> FrameDataset:
    collect(env, path, **{**SETTINGS, **settings})
    return FrameDataset.open(path)


def start_of(dataset: FrameDataset, episode: int) -> Task:
    env = open_environment(dataset.card.env, 1, 16, dataset.card.maze)
    return env.sample_task(np.random.default_rng((dataset.card.seed, episode)), goal=False)


@pytest.fixture(scope="module")
def dots(user_package: str, tmp_path_factory: pytest.TempPathFactory) -> FrameDataset:
    return collected(f"{user_package}:Dots-v0", tmp_path_factory.mktemp("dots") / "dots", policy="held", episodes=6)


def test_a_users_environment_becomes_a_dataset(dots: FrameDataset) -> None:
    assert (dots.card.maze, dots.card.fps, dots.card.policy) == ([], 12, "held")
    assert set(dots.card.columns) == {
        *("action", "lamp", "observation_step", "reward", "robot_xy", "terminated", "truncated"),
    }
    env = open_environment(dots.card.env, 1, 16)
    for episode in range(6):
        (rows,) = np.nonzero(dots.steps.episode == episode)
        frames, columns = dots.read_frames(rows), {name: values[rows] for name, values in dots.steps.columns.items()}
        seen = env.reset([start_of(dots, episode)])
        for t in range(len(rows)):
            np.testing.assert_array_equal(frames[t], seen.image[0])
            np.testing.assert_array_equal(columns["robot_xy"][t], seen.columns["robot_xy"][0])
            moved = env.step(columns["action"][None, t : t + 1])
            seen = env.observe()
            if t + 1 < len(rows):
                assert columns["reward"][t] == moved["reward"]
                assert columns["truncated"][t] == moved["truncated"]


def test_an_episode_ends_with_the_frame_after_its_last_env_step(dots: FrameDataset) -> None:
    steps = dots.steps
    last = np.flatnonzero(np.diff(steps.episode, append=6))
    ends = steps.columns["terminated"] | steps.columns["truncated"]
    assert np.flatnonzero(ends).tolist() == (last - 1).tolist()
    assert steps.step[last].max() == 9  # a time limit of 9 env steps
    assert not steps.columns["reward"][last].any()


def test_workers_kills_and_sizes_of_shards_change_no_byte(
    user_package: str, dots: FrameDataset, tmp_path: Path
) -> None:
    copy = tmp_path / "dots"
    settings = {"policy": "held", "episodes": 6}
    env = f"{user_package}:Dots-v0"
    collected(env, copy, **settings, cluster="local:2")
    assert contents(copy) == contents(dots.path)
    (copy / "dataset.json").rename(copy / "unfinished.json")
    (copy / "frames-000002.tar").unlink()
    (copy / "frames-000000.tar").unlink()
    collected(env, copy, **settings)
    assert contents(copy) == contents(dots.path)
    other = collected(env, tmp_path / "other", **settings, frames_per_shard=7)
    every = range(other.card.frames)
    np.testing.assert_array_equal(other.read_frames(every), dots.read_frames(every))


@pytest.mark.parametrize(("name", "step"), [("Careless-v0", 3), ("Flicker-v0", 0)])
def test_an_environment_with_random_numbers_of_its_own_is_refused(
    user_package: str, name: str, step: int, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"of episode 0 differs at step {step}"):
        collected(f"{user_package}:{name}", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_table_of_another_world_is_refused_while_it_is_drawn(user_package: str, dots: FrameDataset) -> None:
    player = Player(f"{user_package}:Dots-v0", (), 16, seed=0, policy="held", length=12)
    recorded = {name: values[:10].copy() for name, values in dots.steps.columns.items()}
    recorded["reward"][5] += 1e-3
    replay = player.replay(0, recorded, 10)
    drawn = [next(replay)[0].image[0] for _ in range(6)]
    np.testing.assert_array_equal(drawn, dots.read_frames(range(6)))
    with pytest.raises(UserError, match="reward of episode 0 differs at step 5"):
        list(replay)


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1"])
def test_classic_control_is_drawn_by_replay(name: str, tmp_path: Path) -> None:
    pytest.importorskip("pygame")
    found = collected(f"gym:{name}", tmp_path / name, length=60)
    assert found.card.columns["observation"].roles == ("proprio", "state")
    assert found.read_frames(range(found.card.frames)).std(0).any()
    action = found.steps.action
    if name == "CartPole-v1":
        assert (action.sum(1) == 1).all()
        assert found.steps.columns["terminated"].sum() == 4
        assert found.card.frames < 240
    else:
        assert np.abs(action).max() > 1.5
        assert (found.steps.columns["reward"] <= 0).all()


def test_mujoco_is_drawn_from_states(tmp_path: Path) -> None:
    found = collected("gym:InvertedPendulum-v5", tmp_path / "pole", episodes=2)
    assert found.card.columns["state"].roles == ("state",)
    assert found.card.columns["observation"].roles == ("proprio",)
    env = open_environment(found.card.env, 1, 16)
    everything = range(found.card.frames)
    np.testing.assert_array_equal(env.render(found.steps.columns["state"]), found.read_frames(everything))
    env.close()
