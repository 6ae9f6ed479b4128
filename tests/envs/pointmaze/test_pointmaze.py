from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from wmcache.envs import ENV_PREFIX, Maze, MazeError, PointMazeEnv, PointMazeVectorEnv, maze_names, sample_state

COUNT = 3
IDS = [f"{ENV_PREFIX}{name}-v0" for name in maze_names()]


@pytest.fixture
def env() -> Iterator[PointMazeEnv]:
    env = PointMazeEnv("UMaze", image_size=32)
    yield env
    env.close()


@pytest.mark.parametrize("name", IDS)
def test_gymnasiums_checker_passes_for_every_layout(name: str) -> None:
    env = gym.make(name, image_size=32, render_mode="rgb_array")
    check_env(env.unwrapped)
    env.close()
    vector = gym.make_vec(name, num_envs=2, image_size=32)
    assert isinstance(vector.unwrapped, PointMazeVectorEnv)  # many balls share one simulator
    vector.close()


@pytest.mark.parametrize("option", ["state", "goal"])
@pytest.mark.parametrize(
    ("value", "named"),
    [
        ([1.8, 0.8, 0.0, 0.0], "1.8"),
        ([0.8, 0.8], "4"),
        ([0.8, 0.8, np.nan, 0.0], "nan"),
    ],
)
def test_an_impossible_state_is_refused(env: PointMazeEnv, option: str, value: list[float], named: str) -> None:
    with pytest.raises(MazeError, match=named):
        env.reset(seed=0, options={option: value})
    with pytest.raises(MazeError, match=named):
        PointMazeVectorEnv(2, "UMaze", image_size=32).reset(options={option: [[0.8, 0.8, 0.0, 0.0], value]})


@pytest.mark.parametrize(("x", "reached"), [(1.0, False), (0.999, True), (1.001, False), (0.5, True)])
def test_a_goal_is_reached_below_half_a_cell(env: PointMazeEnv, x: float, reached: bool) -> None:
    # Speed must not matter: DINO-WM judges (x, y) alone.
    _, info = env.reset(options={"state": [0.5, 0.5, 0.0, 0.0], "goal": [x, 0.5, 5.0, 5.0]})
    assert info["success"] == reached
    assert info["distance"] == pytest.approx(x - 0.5)


def test_the_reward_is_1_near_the_goal(env: PointMazeEnv) -> None:
    env.reset(options={"state": [0.8, 0.8, 0.0, 0.0], "goal": [0.8, 1.4, 0.0, 0.0]})
    rewards, distances = [], []
    for _ in range(6):
        _, reward, terminated, truncated, info = env.step(np.array([0.0, 1.0], np.float32))
        rewards.append(reward)
        distances.append(info["distance"])
        assert not terminated
        assert not truncated
    assert rewards == [float(distance < 0.5) for distance in distances]
    assert set(rewards) == {0.0, 1.0}


def test_the_goal_is_never_drawn(env: PointMazeEnv) -> None:
    state = [0.8, 0.8, 0.0, 0.0]
    frames = [
        env.reset(options={"state": state, "goal": goal})[0]["image"]
        for goal in ([2.8, 0.8, 0.0, 0.0], [0.8, 2.8, 0.0, 0.0])
    ]
    np.testing.assert_array_equal(*frames)
    moved = env.reset(options={"state": [0.8, 1.6, 0.0, 0.0]})[0]["image"]
    assert (moved != frames[0]).any()


def test_a_stored_state_draws_the_live_frame(env: PointMazeEnv) -> None:
    other = PointMazeEnv("UMaze", image_size=32)
    env.reset(seed=3)
    for _ in range(4):
        observation, _, _, _, info = env.step(np.array([1.0, -0.7], np.float32))
        redrawn = other.reset(options={"state": info["state"]})[0]["image"]
        np.testing.assert_array_equal(redrawn, observation["image"])
    other.close()


@pytest.mark.parametrize("make", [PointMazeEnv, partial(gym.make, IDS[0]), partial(gym.make_vec, IDS[0], num_envs=2)])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_a_copy_continues_like_the_original(
    make: Callable[..., Any], copied: Callable[[Any], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    env = make(image_size=32)
    observation, _ = env.reset(seed=3)
    assert observation in env.observation_space
    other = copied(env)
    for _ in range(3):
        action = env.action_space.sample()
        one, two = env.step(action), other.step(action)
        assert one[0] in env.observation_space
        np.testing.assert_array_equal(one[0]["image"], two[0]["image"])
        np.testing.assert_array_equal(one[4]["state"], two[4]["state"])
    np.testing.assert_array_equal(env.reset()[1]["state"], other.reset()[1]["state"])
    env.close()
    other.close()
    gc.collect()
    assert capsys.readouterr().err == ""


@pytest.fixture
def vector() -> Iterator[PointMazeVectorEnv]:
    env = PointMazeVectorEnv(COUNT, "Medium", image_size=32)
    yield env
    env.close()


def test_every_ball_moves_as_it_would_alone(vector: PointMazeVectorEnv) -> None:
    rng = np.random.default_rng(0)
    states = np.stack([sample_state(Maze.load("Medium"), rng) for _ in range(COUNT)])
    goals = np.stack([sample_state(Maze.load("Medium"), rng) for _ in range(COUNT)])
    singles = [PointMazeEnv("Medium", image_size=32) for _ in range(COUNT)]
    vector.reset(options={"state": states, "goal": goals})
    for single, state, goal in zip(singles, states, goals, strict=True):
        single.reset(options={"state": state, "goal": goal})
    for _ in range(8):
        actions = rng.uniform(-1, 1, (COUNT, 2)).astype(np.float32)
        observation, rewards, _, _, info = vector.step(actions)
        for i, single in enumerate(singles):
            alone, reward, _, _, alone_info = single.step(actions[i])
            np.testing.assert_array_equal(observation["image"][i], alone["image"])
            np.testing.assert_array_equal(observation["proprio"][i], alone["proprio"])
            np.testing.assert_array_equal(info["state"][i], alone_info["state"])
            assert rewards[i] == reward
            assert info["distance"][i] == pytest.approx(alone_info["distance"])
    for single in singles:
        single.close()


def test_ball_i_starts_as_a_single_env_with_the_ith_seed(vector: PointMazeVectorEnv) -> None:
    _, info = vector.reset(seed=7)
    _, listed = vector.reset(seed=[7, 8, 9])
    single = PointMazeEnv("Medium", image_size=32)
    for i in range(COUNT):
        _, alone = single.reset(seed=7 + i)
        np.testing.assert_array_equal(info["state"][i], alone["state"])
        np.testing.assert_array_equal(info["goal"][i], alone["goal"])
    single.close()
    np.testing.assert_array_equal(info["state"], listed["state"])


def test_episodes_after_a_seeded_one_are_reproducible_too(vector: PointMazeVectorEnv) -> None:
    # gymnasium's contract for reset(seed=None): the generator of the last seed continues.
    def second_episode() -> np.ndarray:
        vector.reset(seed=7)
        return vector.reset()[1]["state"]

    np.testing.assert_array_equal(second_episode(), second_episode())


def test_advance_is_step_without_the_drawing(vector: PointMazeVectorEnv) -> None:
    actions = np.random.default_rng(1).uniform(-1, 1, (COUNT, 6, 2))
    vector.reset(seed=0)
    stepped = np.stack([vector.step(actions[:, t])[4]["state"] for t in range(6)], 1)
    vector.reset(seed=0)
    np.testing.assert_array_equal(vector.advance(actions), stepped)
    np.testing.assert_array_equal(vector.observe()["proprio"], stepped[:, -1].astype(np.float32))
