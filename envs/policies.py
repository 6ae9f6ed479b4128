"""Behaviour policies: where the actions of a frame dataset come from. A user adds one by adding a function to POLICIES."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Policy = Callable[[np.random.Generator, int], NDArray[np.float32]]
"""(rng, length) -> actions [length, 2] in [-1, 1]."""


def random(rng: np.random.Generator, length: int) -> NDArray[np.float32]:
    """A fresh uniform action at every env step: DINO-WM's data set."""
    return rng.uniform(-1.0, 1.0, (length, 2)).astype(np.float32)


def held(rng: np.random.Generator, length: int) -> NDArray[np.float32]:
    """Uniform actions, each held for 1 to 10 env steps: pushes as long as a planner's, so that its actions are in the data."""
    actions: list[NDArray[np.float32]] = []
    while len(actions) < length:
        action = rng.uniform(-1.0, 1.0, 2).astype(np.float32)
        actions += [action] * int(rng.integers(1, 11))
    return np.stack(actions[:length])


POLICIES: dict[str, Policy] = {"random": random, "held": held}
