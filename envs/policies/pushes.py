"""Random actions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wmcache.common.columns import Column
from wmcache.envs.policies import POLICIES


@POLICIES.register("random")
def random(rng: np.random.Generator, length: int, space: Column) -> NDArray[np.float32]:
    """Draw a new uniform action at every env step: DINO-WM's dataset."""
    if space.discrete:
        return np.eye(space.width, dtype=np.float32)[rng.integers(space.width, size=length)]
    assert space.low is not None
    assert space.high is not None
    return rng.uniform(space.low, space.high, (length, space.width)).astype(np.float32)


@POLICIES.register("held")
def held(rng: np.random.Generator, length: int, space: Column) -> NDArray[np.float32]:
    """Draw uniform actions, each repeated for 1 to 10 env steps: pushes as long as a planner's, so that the data contains its actions."""
    return _repeated(rng, length, space, 10)


@POLICIES.register("sticky")
def sticky(rng: np.random.Generator, length: int, space: Column) -> NDArray[np.float32]:
    """Draw uniform actions, each repeated for 1 to n env steps; n is drawn for each episode, log-uniformly from 1 to 100.

    Some episodes tremble, others cross the whole room: the data covers more than actions of one duration do.
    """
    return _repeated(rng, length, space, int(100 ** rng.uniform()))


def _repeated(rng: np.random.Generator, length: int, space: Column, longest: int) -> NDArray[np.float32]:
    """Draw uniform actions, each repeated for 1 to `longest` env steps."""
    actions: list[NDArray[np.float32]] = []
    while len(actions) < length:
        action = random(rng, 1, space)[0]
        actions += [action] * int(rng.integers(1, longest + 1))
    return np.stack(actions[:length])
