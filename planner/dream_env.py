"""The dream as a gymnasium environment; importing this module registers it.

import wmcache.planner.dream_env
env = gymnasium.make("wmcache/Dream-v0", run="runs/doom", temperature=1.15)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wmcache.common.columns import Column
from wmcache.planner.decode import open_decode
from wmcache.planner.dream import Dream
from wmcache.trainer.metrics import Images

ENV_ID = "wmcache/Dream-v0"

Features = dict[str, NDArray[np.float32]]


class DreamEnv(gym.Env[Features, Any]):
    """One episode of a `Dream`, in which policies learn without the real environment.

    An observation has the features of the dream, a vector each. An action is one of the real environment's, and is repeated for the
    env steps of a model step. An episode terminates where the model imagines its end, and is truncated at the length of the longest
    one in the data. Where the model imagines neither reward nor end, the reward is minus the distance to a goal, a held-out frame.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012 (gymnasium's own attribute)

    def __init__(
        self,
        run: str | Path,
        temperature: float | None = None,
        decoder: str | Path | None = None,
        split: str = "train",
        device: str = "cpu",
        render_mode: str | None = None,
    ) -> None:
        """Load a run; arguments as for `Dream` and, for `render`, `open_decode`."""
        self.render_mode = render_mode
        self._dream = Dream(Path(run), temperature=temperature, device=device, split=split)
        self._decode = None
        if render_mode is not None:
            self._decode = open_decode(Path(run), Path(decoder) if decoder else None, device=device)
        self.metadata = {**self.metadata, "render_fps": self._dream.fps}
        self.action_space: gym.Space[Any] = space_of(self._dream.action)
        features = self._reset(0)
        self.observation_space: gym.Space[Any] = gym.spaces.Dict(
            {name: gym.spaces.Box(-np.inf, np.inf, values.shape, np.float32) for name, values in features.items()}
        )
        self._steps = 0

    def reset(
        self,
        *,
        seed: int | None = None,
        options: dict[str, Any] | None = None,  # noqa: ARG002 (gymnasium's signature)
    ) -> tuple[Features, dict[str, Any]]:
        """Start an episode, that of `seed` in `Dream.reset`."""
        super().reset(seed=seed)
        self._steps = 0
        return self._reset(int(self.np_random.integers(2**31)) if seed is None else seed), {}

    def step(self, action: Any) -> tuple[Features, float, bool, bool, dict[str, Any]]:
        """Imagine one model step."""
        features, reward, ended = self._dream.step(self._to_model(action))
        self._steps += 1
        truncated = self._steps >= self._dream.length
        return _first(features), float(reward[0]), bool(ended[0]), truncated, {}

    def render(self) -> Images | None:
        """Draw the newest imagined frame, uint8 [S, S, 3]."""
        return None if self._decode is None else self._decode(self._dream.latents)[0]

    def _reset(self, seed: int) -> Features:
        return _first(self._dream.reset([seed], goals=self._dream.aimless))

    def _to_model(self, action: Any) -> Tensor:
        space = self._dream.action
        if space.discrete:
            values = np.eye(space.width, dtype=np.float32)[int(action)]
        else:
            low, high = (np.asarray(bound, np.float32) for bound in (space.low, space.high))
            values = np.ravel(np.asarray(action, np.float32)).clip(low, high)
        return torch.from_numpy(np.tile(values, self._dream.frameskip))[None]


def space_of(column: Column) -> gym.Space[Any]:
    """Return the space of actions that a column describes."""
    if column.discrete:
        return gym.spaces.Discrete(column.width)
    return gym.spaces.Box(np.asarray(column.low, np.float32), np.asarray(column.high, np.float32), dtype=np.float32)


def _first(features: dict[str, Tensor]) -> Features:
    return {name: value[0].cpu().numpy().copy() for name, value in features.items()}


gym.register(id=ENV_ID, entry_point="wmcache.planner.dream_env:DreamEnv")
