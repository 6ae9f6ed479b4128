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
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from torch import Tensor

from wmcache.common.columns import Column
from wmcache.planner.decode import open_decode
from wmcache.planner.dream import Dream
from wmcache.trainer.metrics import Images

ENV_ID = "wmcache/Dream-v0"

Features = dict[str, NDArray[np.float32]]


class DreamVectorEnv(VectorEnv[Features, Any, NDArray[Any]]):
    """`num_envs` episodes of a `Dream` at once, in which policies learn without the real environment.

    An observation has the features of the dream, a vector each. An action is one of the real environment's, and is repeated for the
    env steps of a model step. An episode terminates where the model imagines its end, and is truncated at the length of the longest
    one in the data, unless another is given; the step after that starts the next one. With goals, which are held-out frames, the
    reward is minus the distance to the goal.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20, "autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012 (gymnasium's own attribute)

    def __init__(
        self,
        num_envs: int = 1,
        *,
        run: str | Path,
        temperature: float | None = None,
        decoder: str | Path | None = None,
        split: str = "train",
        goals: bool | None = None,
        length: int | None = None,
        device: str = "cpu",
        render_mode: str | None = None,
    ) -> None:
        """Load a run; arguments as for `Dream` and, for `render`, `open_decode`.

        Args:
            goals: give each episode a goal, from which the reward is; None: where the model imagines neither reward nor end.
            length: model steps after which an episode is truncated; None: those of the longest one in the data.
        """
        self.num_envs, self.render_mode = num_envs, render_mode
        self._dream = Dream(Path(run), temperature=temperature, device=device, split=split)
        self._goals = self._dream.needs_goals if goals is None else goals
        self._length = self._dream.length if length is None else length
        self._decode = None
        if render_mode is not None:
            self._dream.require_latents()
            self._decode = open_decode(Path(run), Path(decoder) if decoder else None, device=device)
        self.metadata = {**self.metadata, "render_fps": self._dream.fps}
        self.single_action_space = space_of(self._dream.action)
        features = self._dream.reset([0], goals=self._goals)
        self.single_observation_space = gym.spaces.Dict(
            {name: gym.spaces.Box(-np.inf, np.inf, values.shape[1:], np.float32) for name, values in features.items()}
        )
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.rngs = [np.random.default_rng() for _ in range(num_envs)]

    def reset(
        self,
        *,
        seed: int | list[int | None] | None = None,
        options: dict[str, Any] | None = None,  # noqa: ARG002 (gymnasium's signature)
    ) -> tuple[Features, dict[str, Any]]:
        """Start all episodes: that of a seed s in `Dream.reset`, which is `seed` + i or `seed[i]` of env i, or a random one."""
        given = seed if isinstance(seed, list) else [None if seed is None else seed + i for i in range(self.num_envs)]
        self.rngs = [
            rng if one is None else np.random.default_rng(one) for rng, one in zip(self.rngs, given, strict=True)
        ]
        seeds = [draw_seed(rng) if one is None else one for rng, one in zip(self.rngs, given, strict=True)]
        self._steps, self._over = np.zeros(self.num_envs, np.int64), np.zeros(self.num_envs, np.bool_)
        return _arrays(self._dream.reset(seeds, goals=self._goals)), {}

    def step(self, actions: Any) -> tuple[Features, NDArray[Any], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Imagine one model step of every episode; those that were over start again instead, with reward 0."""
        found, given, ends = self._dream.step(self._to_model(np.asarray(actions)))
        rewards, ended = given.cpu().numpy().astype(np.float64), ends.cpu().numpy().copy()
        self._steps += 1
        if over := np.flatnonzero(self._over).tolist():
            found = self._dream.restart(over, [draw_seed(self.rngs[row]) for row in over])
            self._steps[over], rewards[over], ended[over] = 0, 0.0, False
        truncated = self._steps >= self._length
        self._over = ended | truncated
        return _arrays(found), rewards, ended, truncated, {}

    def render(self) -> tuple[Images, ...] | None:
        """Draw the newest imagined frames, uint8 [S, S, 3] each."""
        return None if self._decode is None else tuple(self._decode(self._dream.latents))

    def _to_model(self, actions: NDArray[Any]) -> Tensor:
        space = self._dream.action
        if space.discrete:
            values = np.eye(space.width, dtype=np.float32)[actions.astype(np.int64)]
        else:
            low, high = (np.asarray(bound, np.float32) for bound in (space.low, space.high))
            values = actions.astype(np.float32).clip(low, high)
        return torch.from_numpy(np.tile(values, (1, self._dream.frameskip)))


class DreamEnv(gym.Env[Features, Any]):
    """One episode of a dream, a `DreamVectorEnv` of one."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012 (gymnasium's own attribute)

    def __init__(self, run: str | Path, render_mode: str | None = None, **settings: Any) -> None:
        """Load a run; arguments as for `DreamVectorEnv`."""
        self._episodes = DreamVectorEnv(1, run=run, render_mode=render_mode, **settings)
        self.render_mode = render_mode
        self.metadata = {**self.metadata, "render_fps": self._episodes.metadata["render_fps"]}
        self.action_space: gym.Space[Any] = self._episodes.single_action_space
        self.observation_space: gym.Space[Any] = self._episodes.single_observation_space

    def reset(
        self,
        *,
        seed: int | None = None,
        options: dict[str, Any] | None = None,  # noqa: ARG002 (gymnasium's signature)
    ) -> tuple[Features, dict[str, Any]]:
        """Start an episode, that of `seed` in `Dream.reset`."""
        super().reset(seed=seed)
        chosen = draw_seed(self.np_random) if seed is None else seed
        return _first(self._episodes.reset(seed=chosen)[0]), {}

    def step(self, action: Any) -> tuple[Features, float, bool, bool, dict[str, Any]]:
        """Imagine one model step."""
        features, reward, ended, truncated, _ = self._episodes.step(np.asarray(action)[None])
        return _first(features), float(reward[0]), bool(ended[0]), bool(truncated[0]), {}

    def render(self) -> Images | None:
        """Draw the newest imagined frame, uint8 [S, S, 3]."""
        frames = self._episodes.render()
        return None if frames is None else frames[0]


def space_of(column: Column) -> gym.Space[Any]:
    """Return the space of actions that a column describes."""
    if column.discrete:
        return gym.spaces.Discrete(column.width)
    return gym.spaces.Box(np.asarray(column.low, np.float32), np.asarray(column.high, np.float32), dtype=np.float32)


def draw_seed(rng: np.random.Generator) -> int:
    """Draw the seed of an episode."""
    return int(rng.integers(2**31))


def _arrays(features: dict[str, Tensor]) -> Features:
    return {name: values.cpu().numpy().copy() for name, values in features.items()}


def _first(features: Features) -> Features:
    return {name: values[0] for name, values in features.items()}


gym.register(
    id=ENV_ID,
    entry_point="wmcache.planner.dream_env:DreamEnv",
    vector_entry_point="wmcache.planner.dream_env:DreamVectorEnv",
)
