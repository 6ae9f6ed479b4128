"""Tasks of the DeepMind Control Suite are dm-control's own."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from wmcache.common.errors import UserError
from wmcache.envs import Environment, Task, open_environment
from wmcache.pipeline.collect import collect
from wmcache.pipeline.frames import FrameDataset

SIZE = 32


def test_a_missing_package_or_a_wrong_version_is_one_line() -> None:
    message = ""
    try:
        open_environment("dmc:reacher-easy").close()
    except UserError as error:
        message = str(error)
    # Without a message, a working pair is installed.
    assert not message or ("wmcache[dmc]" in message and "\n" not in message)


def opened(name: str, count: int = 1) -> Environment:
    if find_spec("dm_control") is None:
        pytest.skip("dm-control is not installed")
    try:
        return open_environment(name, count, SIZE)
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", ["reacher-easy", "cheetah-run", "finger-spin", "walker-walk", "humanoid-walk"])
def test_an_episode_is_that_of_dm_control(name: str) -> None:
    env = opened(f"dmc:{name}")
    from dm_control import suite

    reference = suite.load(*name.split("-"), task_kwargs={"random": np.random.RandomState(7)})
    first = reference.reset()
    seen = env.reset([Task(7)])
    width = env.spec.action.width
    assert (env.spec.action.low, env.spec.action.high) == ((-1.0,) * width, (1.0,) * width)
    assert env.spec.fps == pytest.approx(1 / reference.control_timestep())
    for part, values in first.observation.items():
        np.testing.assert_array_equal(seen.columns[part][0], np.ravel(values))
    actions = np.random.default_rng(0).uniform(-1, 1, (1, 30, width)).astype(np.float32)
    moved = env.step(actions)
    for t, action in enumerate(actions[0]):
        step = reference.step(action)
        assert moved["reward"][0, t] == np.float32(step.reward)
        for part, values in step.observation.items():
            np.testing.assert_array_equal(moved[part][0, t], np.ravel(values))
    physics = reference.physics.data
    np.testing.assert_array_equal(moved["state"][0, -1], np.concatenate([physics.qpos, physics.qvel, physics.act]))
    assert not moved["terminated"].any()
    env.close()


def test_an_episode_is_cut_off_at_its_time_limit() -> None:
    env = opened("dmc:finger-spin")
    env.reset([Task(0)])
    ends = env.step(np.zeros((1, 1001, 2), np.float32))
    assert np.flatnonzero(ends["truncated"][0])[0] == 999
    assert not ends["terminated"].any()
    env.close()


@pytest.mark.parametrize(("name", "by_state"), [("cheetah-run", True), ("reacher-easy", False)])
@pytest.mark.parametrize("distraction", ["", "+colors@1"])
def test_a_dataset_is_drawn_from_states_where_these_are_all(
    tmp_path: Path, name: str, by_state: bool, distraction: str
) -> None:
    env = opened(f"dmc:{name}{distraction}")
    assert env.spec.renders_states == by_state
    collect(env.spec.id, tmp_path / "frames", episodes=2, length=6, image_size=SIZE, frames_per_shard=5)
    found = FrameDataset.open(tmp_path / "frames")
    seen = env.reset([env.sample_task(np.random.default_rng((0, 1)))])
    np.testing.assert_array_equal(found.read_frames([6])[0], seen.image[0])
    env.step(found.steps.action[None, 6:9])
    seen = env.observe()
    np.testing.assert_array_equal(seen.columns["state"][0], found.steps.columns["state"][9])
    np.testing.assert_array_equal(found.read_frames([9])[0], seen.image[0])
    env.close()


def test_an_unknown_task_is_refused_with_the_nearest() -> None:
    opened("dmc:reacher-easy").close()
    with pytest.raises(UserError, match="cheetah-run"):
        open_environment("dmc:cheetah-runs")
