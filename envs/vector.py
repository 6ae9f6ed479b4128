"""Many PointMazes at once, with one compiled model and one GL context for all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from wmcache.envs.maze import Maze
from wmcache.envs.pointmaze import Observation, action_space, check_state, describe, observation_space, sample_state
from wmcache.envs.simulator import FPS, PointMazeSimulator


class PointMazeVectorEnv(VectorEnv[Observation, NDArray[np.floating], NDArray[Any]]):
    """`num_envs` independent balls; observations, rewards and infos as those of `PointMazeEnv`, stacked on axis 0.

    Episodes never end by themselves, so no env resets automatically. Drawing takes much longer than physics: `advance` executes several
    env steps without drawing.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": FPS, "autoreset_mode": AutoresetMode.DISABLED}  # noqa: RUF012

    def __init__(
        self,
        num_envs: int = 1,
        maze: Maze | str | Path = "UMaze",
        image_size: int = 224,
        render_mode: str | None = None,
    ) -> None:
        """Make `num_envs` balls; other arguments as for `PointMazeEnv`."""
        self.num_envs = num_envs
        self.maze = maze if isinstance(maze, Maze) else Maze.load(maze)
        self.render_mode = render_mode
        self.single_observation_space = observation_space(self.maze, image_size)
        self.single_action_space = action_space()
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._simulator = PointMazeSimulator(self.maze, image_size)
        self._rngs = [np.random.default_rng() for _ in range(num_envs)]
        self._states = np.zeros((num_envs, 4))
        self._goals = np.zeros((num_envs, 4))

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start all episodes.

        Args:
            seed: one number (env i gets seed + i, as in gymnasium) or one a sub-env.
            options: `state` and `goal`, each [num_envs, 4], instead of random ones.
        """
        seeds = seed if isinstance(seed, list) else [None if seed is None else seed + i for i in range(self.num_envs)]
        options = options or {}
        for i, one in enumerate(seeds):
            if one is not None:
                self._rngs[i] = np.random.default_rng(one)
            for name, values in (("state", self._states), ("goal", self._goals)):
                drawn = sample_state(self.maze, self._rngs[i])
                values[i] = check_state(self.maze, options[name][i] if name in options else drawn)
        return self.observe(), describe(self._states, self._goals)

    def step(
        self, actions: NDArray[np.floating]
    ) -> tuple[Observation, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Advance every ball by one env step; `actions` is [num_envs, 2]."""
        self.advance(np.asarray(actions)[:, None])
        info, never = describe(self._states, self._goals), np.zeros(self.num_envs, dtype=bool)
        return self.observe(), info["success"].astype(np.float64), never, never.copy(), info

    def advance(self, actions: NDArray[np.floating]) -> NDArray[np.float64]:
        """Execute actions [num_envs, steps, 2] without drawing; return the states after each step, [num_envs, steps, 4]."""
        states = np.empty((*actions.shape[:2], 4))
        for i, sequence in enumerate(actions):
            for t, action in enumerate(sequence):
                self._states[i] = states[i, t] = self._simulator.step(self._states[i], action)
        return states

    def observe(self) -> Observation:
        """Draw and return the current observations."""
        return {"image": np.stack(self.render()), "proprio": self._states.astype(np.float32)}

    def render(self) -> tuple[NDArray[np.uint8], ...]:
        """Return the current frame of every ball."""
        return tuple(self._simulator.render(state) for state in self._states)

    def close_extras(self, **kwargs: object) -> None:  # noqa: ARG002 (gymnasium's signature)
        """Free the GL context."""
        self._simulator.close()
