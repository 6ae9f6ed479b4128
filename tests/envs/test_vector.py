from __future__ import annotations

from collections.abc import Iterator

import gymnasium as gym
import numpy as np
import pytest

from wmcache.envs import Maze, PointMazeEnv, PointMazeVectorEnv, sample_state

COUNT = 3


@pytest.fixture
def vector() -> Iterator[PointMazeVectorEnv]:
    env = PointMazeVectorEnv(COUNT, "Medium", image_size=32)
    yield env
    env.close()


def test_make_vec_shares_one_simulator() -> None:
    env = gym.make_vec("wmcache/PointMaze-UMaze-v0", num_envs=2, image_size=32)
    assert isinstance(env.unwrapped, PointMazeVectorEnv)
    observation, _ = env.reset(seed=0)
    assert observation in env.observation_space
    observation, rewards, *_ = env.step(env.action_space.sample())
    assert observation in env.observation_space
    assert rewards.shape == (2,)
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
