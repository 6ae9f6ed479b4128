"""The U-maze with noisy motors: noise of the stated size, which belongs to the start."""

from __future__ import annotations

import numpy as np

from wmcache.envs import Task, open_environment
from wmcache.envs.pointmaze.noisy import NAME, SIGMA


def test_motors_add_noise_that_depends_on_the_start() -> None:
    noisy, exact = open_environment(NAME, 40, 32), open_environment("UMaze", 40, 32)
    # In the middle of a corridor, where no wall is near.
    starts = [Task(np.array([0.8, 0.8, 0.0, 1e-3 * number])) for number in range(40)]
    actions = np.zeros((40, 1, 2), np.float32)
    found = []
    for env in (noisy, noisy, exact):
        env.reset(starts)
        found.append(env.step(actions)["state"][:, 0, 2:])
    np.testing.assert_array_equal(found[0], found[1])
    env.reset(starts)
    forced = env.step(np.full_like(actions, SIGMA))["state"][:, 0, 2:]  # what one standard deviation does
    ratio = (found[0] - found[2]).std() / (forced - found[2]).mean()
    assert 0.8 < ratio < 1.2


def test_its_name_opens_it_with_and_without_a_layout() -> None:
    spec = open_environment(NAME, 1, 32).spec
    again = open_environment(spec.id, 1, 32, spec.layout)
    assert (again.spec.id, again.spec.dataset) == (NAME, "pointmaze-noisy-umaze")
    assert type(again) is type(open_environment(NAME))
