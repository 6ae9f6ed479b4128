"""PushT: DINO-WM's actions, picture and judge, and the scripted expert."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from wmcache.envs import Environment, Task, open_environment
from wmcache.pipeline.collect import collect
from wmcache.pipeline.frames import FrameDataset

pytest.importorskip("gym_pusht")

REST = np.array([100.0, 100.0, 300.0, 300.0, 1.0, 0.0, 0.0])


@pytest.fixture(scope="module")
def env() -> Iterator[Environment]:
    env = open_environment("PushT", 1, 64)
    yield env
    env.close()


def changed(**by: float) -> np.ndarray:
    names = ("agent_x", "agent_y", "block_x", "block_y", "angle", "agent_vx", "agent_vy")
    return REST + [by.get(name, 0.0) for name in names]


@pytest.mark.parametrize(
    ("other", "success"),
    [
        (changed(agent_x=12.0, block_y=15.9), True),
        (changed(agent_x=12.0, block_y=16.1), False),
        (changed(angle=np.radians(19.9)), True),
        (changed(angle=np.radians(20.1)), False),
        (changed(angle=2 * np.pi - np.radians(19.9)), True),
        (changed(angle=-2 * np.pi - np.radians(20.1)), False),
        (changed(agent_vx=500.0), True),
    ],
)
def test_success_is_that_of_dino_wm(env: Environment, other: np.ndarray, success: bool) -> None:
    assert env.spec.thresholds == (1.0,)
    assert (env.distance(other, REST) < 1.0) == success


def test_an_action_moves_the_agent_by_a_hundredth_of_its_length(env: Environment) -> None:
    env.reset([Task(REST)])
    moved = env.step(np.concatenate([np.full((1, 1, 2), 0.5), np.zeros((1, 30, 2))], 1))["state"][0]
    assert moved[0, 5:].min() > 0
    np.testing.assert_allclose(moved[:, 2:5], np.broadcast_to(REST[2:5], (31, 3)), atol=1e-6)
    env.reset([Task(REST)])
    at_wall = env.step(np.full((1, 60, 2), -1.0))["state"][0]
    assert (at_wall[:, :2] >= 20.0).all()
    np.testing.assert_allclose(at_wall[-1, :2], 20.0, atol=1.0)


def test_a_state_is_set_exactly_and_no_goal_is_drawn(env: Environment) -> None:
    state = changed(angle=2.0, block_x=-40.0, agent_vy=3.0)
    seen = env.reset([Task(state)])
    np.testing.assert_allclose(seen.columns["state"][0], state, atol=1e-9)
    np.testing.assert_array_equal(seen.columns["proprio"][0], seen.columns["state"][0, [0, 1, 5, 6]])
    red, green, blue = seen.image[0].reshape(-1, 3).astype(int).T
    assert not ((green > red + 30) & (green > blue + 30)).any()
    assert ((blue > red + 60) & (blue > 150)).any()  # the agent


def test_the_expert_pushes_the_block_also_with_noise(tmp_path: Path) -> None:
    moves = {}
    for policy in ("expert", "noisy-expert", "random"):
        settings = {"episodes": 3, "length": 120, "image_size": 32, "policy": policy}
        collect("PushT", tmp_path / policy, **settings)
        steps = FrameDataset.open(tmp_path / policy).steps
        assert steps.state is not None
        block = steps.state[:, 2:4].reshape(3, 120, 2)
        moves[policy] = np.linalg.norm(np.diff(block, axis=1), axis=2).sum(1)
        assert np.abs(steps.action).max() <= 1.0
    for policy in ("expert", "noisy-expert"):
        assert moves[policy].mean() > 2 * moves["random"].mean()
    assert (moves["expert"] > 50).all()
