"""CarRacing that draws only frames that are asked for has gymnasium's episodes, frame by frame."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest

from wmcache.envs import Task, open_environment

pytestmark = pytest.mark.skipif(find_spec("Box2D") is None, reason="needs box2d")


def test_episodes_are_those_of_gymnasium() -> None:
    fast, usual = (
        open_environment(name, 1, 64) for name in ("wmcache.envs.car_racing:wmcache/CarRacing-v0", "gym:CarRacing-v3")
    )
    rng = np.random.default_rng(0)
    frames = []
    for env in (fast, usual):
        env.reset([Task(5)])
    for _ in range(6):
        actions = rng.uniform((-1, 0, 0), (1, 1, 1), (1, 10, 3)).astype(np.float32)
        (one, other) = (env.step(actions) for env in (fast, usual))
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)
        frames.append([env.observe().image for env in (fast, usual)])
    assert all(np.array_equal(one, other) for one, other in frames)
    assert (frames[0][0] != frames[-1][0]).any()
    for env in (fast, usual):
        env.close()
