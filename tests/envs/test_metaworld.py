"""Tasks of Meta-World start from the seed of an episode."""

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
NAME = "metaworld:drawer-open-v3"


def test_a_missing_package_or_a_wrong_version_is_one_line() -> None:
    message = ""
    try:
        open_environment(NAME).close()
    except UserError as error:
        message = str(error)
    # Without a message, a working pair is installed.
    assert not message or ("wmcache[metaworld]" in message and "\n" not in message)


def opened(name: str = NAME, count: int = 1) -> Environment:
    if find_spec("metaworld") is None:
        pytest.skip("metaworld is not installed")
    try:
        return open_environment(name, count, SIZE)
    except UserError as error:
        pytest.skip(str(error))


def test_a_seed_places_the_objects_and_the_goal() -> None:
    env = opened(count=3)
    seen = env.reset([Task(1), Task(2), Task(1)])
    observed = seen.columns["observation"]
    assert observed.shape == (3, 39)
    np.testing.assert_array_equal(observed[0], observed[2])
    assert (observed[0, 4:7] != observed[1, 4:7]).any()  # the handle
    # The goal is that of an opened drawer, and frames show the drawer where observations have it.
    np.testing.assert_allclose(observed[:, 36:38] - observed[:, 4:6], np.tile([0.0, -0.2], (3, 1)), atol=0.02)
    assert (seen.image[0] != seen.image[1]).any()
    moved = env.step(np.zeros((3, 2, 4), np.float32))
    np.testing.assert_allclose(moved["observation"][:, 0, 4:7], observed[:, 4:7], atol=0.01)
    assert ((moved["reward"] >= 0) & (moved["reward"] <= 10)).all()
    env.close()


@pytest.mark.filterwarnings("ignore:Constant:UserWarning")
def test_the_scripted_policy_of_metaworld_opens_the_drawer() -> None:
    env = opened()
    from metaworld.policies import SawyerDrawerOpenV3Policy

    policy = SawyerDrawerOpenV3Policy()
    observed = env.reset([Task(3)]).columns["observation"]
    for _ in range(150):
        action = np.clip(policy.get_action(observed[0]), -1, 1).astype(np.float32)
        moved = env.step(action[None, None])
        observed = moved["observation"][:, 0]
    assert (
        np.linalg.norm(observed[0, 4:7] - observed[0, 36:39]) < 0.03
    )  # success, as Meta-World defines it for this task
    env.close()


@pytest.mark.parametrize("distraction", ["", "+colors,camera,background@0"])
def test_a_dataset_is_drawn_by_replay(tmp_path: Path, distraction: str) -> None:
    env = opened(NAME + distraction)
    assert not env.spec.renders_states
    collect(env.spec.id, tmp_path / "frames", episodes=2, length=5, image_size=SIZE, frames_per_shard=3)
    found = FrameDataset.open(tmp_path / "frames")
    env.reset([env.sample_task(np.random.default_rng((0, 1)))])
    env.step(found.steps.action[None, 5:8])
    np.testing.assert_array_equal(found.read_frames([8])[0], env.observe().image[0])
    env.close()


def test_surfaces_have_another_texture_in_each_episode() -> None:
    plain, distracted = opened(), opened(f"{NAME}+colors@0")
    frames = [distracted.reset([Task(seed)]).image[0] for seed in (1, 2, 1)]
    np.testing.assert_array_equal(frames[0], frames[2])
    usual = [plain.reset([Task(seed)]).image[0] for seed in (1, 2)]
    changed = (frames[0] != frames[1]).any(-1).mean()
    assert changed > 0.9 > (usual[0] != usual[1]).any(-1).mean()
    for env in (plain, distracted):
        env.close()


def test_an_unknown_task_is_refused_with_the_nearest() -> None:
    opened().close()
    with pytest.raises(UserError, match="drawer-open-v3"):
        open_environment("metaworld:drawer-opens-v3")
