"""Random pushes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wmcache.envs.policies import POLICIES


@POLICIES.register("random")
def random(rng: np.random.Generator, length: int) -> NDArray[np.float32]:
    """Draw a new uniform action at every env step: DINO-WM's dataset."""
    return rng.uniform(-1.0, 1.0, (length, 2)).astype(np.float32)


@POLICIES.register("held")
def held(rng: np.random.Generator, length: int) -> NDArray[np.float32]:
    """Draw uniform actions, each repeated for 1 to 10 env steps: pushes as long as a planner's, so that the data contains its actions."""
    actions: list[NDArray[np.float32]] = []
    while len(actions) < length:
        action = rng.uniform(-1.0, 1.0, 2).astype(np.float32)
        actions += [action] * int(rng.integers(1, 11))
    return np.stack(actions[:length])
