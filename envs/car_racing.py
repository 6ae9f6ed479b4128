"""CarRacing that draws only frames that are asked for: `wmcache.envs.car_racing:wmcache/CarRacing-v0`.

gymnasium's CarRacing-v3 draws its observation at every env step. Nothing here reads that observation, because frames come from `render`;
without it the same episodes, with the same frames and rewards, are several times as fast.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

ID = "wmcache/CarRacing-v0"


def make_car_racing(**settings: Any) -> gymnasium.Env[Any, Any]:
    """Make the environment with the settings of CarRacing-v3. The observation of an env step is black."""
    from gymnasium.envs.box2d import car_racing  # here, because this module is imported with all environments

    blank = np.zeros((car_racing.STATE_H, car_racing.STATE_W, 3), np.uint8)

    class CarRacing(car_racing.CarRacing):
        def _render(self, mode: str) -> Any:
            return blank if mode == "state_pixels" else super()._render(mode)

    return CarRacing(**settings)


if ID not in gymnasium.registry:
    gymnasium.register(ID, entry_point=make_car_racing, max_episode_steps=1000, reward_threshold=900)
