"""Behaviour policies, which generate the actions of a frame dataset. A new one is a file in this folder, or of another package."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from wmcache.common.columns import Column
from wmcache.common.registry import Registry

Policy = Callable[[np.random.Generator, int, Column], NDArray[np.float32]]
"""(rng, length, action space) -> actions [length, A] within its bounds, or one-hot where it is discrete."""

POLICIES: Registry[Policy] = Registry("policy", package="wmcache.envs.policies", group="wmcache.policies")
