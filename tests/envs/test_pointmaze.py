from __future__ import annotations

import copy
import gc
import multiprocessing
import pickle
from collections.abc import Iterator

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from wmcache.envs import ENV_PREFIX, MazeError, PointMazeEnv, PointMazeVectorEnv, maze_names

IDS = [f"{ENV_PREFIX}{name}-v0" for name in maze_names()]


@pytest.fixture
def env() -> Iterator[PointMazeEnv]:
    env = PointMazeEnv("UMaze", image_size=32)
    yield env
    env.close()


def test_every_layout_is_registered() -> None:
    assert {"UMaze", "Medium", "Large", "Open"} <= set(maze_names())
    assert set(IDS) == {name for name in gym.registry if name.startswith(ENV_PREFIX)}


@pytest.mark.parametrize("name", IDS)
def test_gymnasiums_checker_passes(name: str) -> None:
    env = gym.make(name, image_size=32, render_mode="rgb_array")
    check_env(env.unwrapped)
    env.close()


def test_reset_uses_the_given_state_and_goal(env: PointMazeEnv) -> None:
    state, goal = [0.8, 0.9, 1.0, -2.0], [2.8, 0.8, 0.0, 0.0]
    observation, info = env.reset(seed=0, options={"state": state, "goal": goal})
    np.testing.assert_array_equal(info["state"], state)
    np.testing.assert_array_equal(info["goal"], goal)
    np.testing.assert_array_equal(observation["proprio"], np.float32(state))


@pytest.mark.parametrize("option", ["state", "goal"])
@pytest.mark.parametrize(
    ("value", "named"),
    [
        ([1.8, 0.8, 0.0, 0.0], "1.8"),
        ([-5.0, 0.8, 0.0, 0.0], "-5.0"),
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


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda env: pickle.loads(pickle.dumps(env))}


@pytest.mark.parametrize("by", COPIES)
@pytest.mark.parametrize("drawn", [True, False])
def test_a_copy_continues_like_the_original(env: PointMazeEnv, by: str, drawn: bool) -> None:
    env.reset(seed=3)
    if drawn:
        env.render()
    other, action = COPIES[by](env), np.array([1.0, -0.7], np.float32)
    for _ in range(3):
        one, two = env.step(action), other.step(action)
        np.testing.assert_array_equal(one[0]["image"], two[0]["image"])
        np.testing.assert_array_equal(one[4]["state"], two[4]["state"])
    other.close()
    again = COPIES[by](env)
    np.testing.assert_array_equal(env.reset()[1]["state"], again.reset()[1]["state"])
    again.close()


@pytest.mark.parametrize("by", COPIES)
def test_a_copy_of_a_vector_env_or_a_wrapped_one_continues_like_the_original(
    by: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for env in (
        gym.make_vec(f"{ENV_PREFIX}UMaze-v0", num_envs=2, image_size=32),
        gym.make(f"{ENV_PREFIX}UMaze-v0", image_size=32),
    ):
        env.reset(seed=0)
        other = COPIES[by](env)
        action = env.action_space.sample()
        np.testing.assert_array_equal(env.step(action)[0]["image"], other.step(action)[0]["image"])
        env.close()
        other.close()
    gc.collect()
    assert capsys.readouterr().err == ""


@pytest.mark.sweep
def test_an_env_is_sent_to_another_process(env: PointMazeEnv) -> None:
    env.reset(seed=0)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        np.testing.assert_array_equal(pool.apply(PointMazeEnv.render, (env,)), env.render())
