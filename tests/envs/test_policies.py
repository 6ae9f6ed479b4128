"""Behaviour policies."""

from __future__ import annotations

import numpy as np
import pytest

from wmcache.common.columns import Column
from wmcache.envs import POLICIES

PUSH = Column(("action",), "float32", (3,), (-1.0, 0.0, -4.0), (1.0, 1.0, 4.0))
CHOICE = Column(("action",), "float32", (3,), (0.0,) * 3, (1.0,) * 3, discrete=True)


@pytest.mark.parametrize("name", list(POLICIES))
def test_policies_push_within_bounds_and_repeat(name: str) -> None:
    policy = POLICIES.get(name)
    actions = policy(np.random.default_rng(5), 500, PUSH)
    assert actions.shape == (500, 3)
    assert actions.dtype == np.float32
    assert ((actions >= PUSH.low) & (actions <= PUSH.high)).all()
    reach = np.subtract(PUSH.high, PUSH.low)
    assert (np.ptp(actions, axis=0) > 0.9 * reach).all()
    np.testing.assert_array_equal(actions, policy(np.random.default_rng(5), 500, PUSH))
    assert (actions != policy(np.random.default_rng(6), 500, PUSH)).any()


@pytest.mark.parametrize("name", list(POLICIES))
def test_policies_choose_each_discrete_action(name: str) -> None:
    actions = POLICIES.get(name)(np.random.default_rng(0), 600, CHOICE)
    assert set(np.unique(actions)) == {0.0, 1.0}
    assert (actions.sum(1) == 1).all()
    assert actions.mean(0) == pytest.approx([1 / 3] * 3, abs=0.1)


def test_held_pushes_last_1_to_10_steps() -> None:
    actions = POLICIES.get("held")(np.random.default_rng(0), 2000, PUSH)
    changes = np.flatnonzero((np.diff(actions, axis=0) != 0).any(1))
    lengths = np.diff(changes)
    assert set(lengths.tolist()) == set(range(1, 11))
