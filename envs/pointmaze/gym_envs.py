"""PointMaze as gymnasium environments, of one ball and of many: push it through a maze under a camera from above."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from wmcache.envs.pointmaze.maze import Maze, MazeError
from wmcache.envs.pointmaze.simulator import FPS, Float, Frame, PointMazeSimulator

SUCCESS_DISTANCE = 0.5
"""A goal is reached below this distance in (x, y); velocity does not matter (DINO-WM, pointmaze eval)."""

MAX_START_SPEED = 5.226
"""Starts have each velocity component uniform in +- this (DINO-WM, random_state)."""

# Velocity is clipped to 5 before a step; a step of full force adds at most 1.2.
_SPEED_BOUND = 10.0

Observation = dict[str, NDArray[Any]]


def sample_state(maze: Maze, rng: np.random.Generator) -> Float:
    """Draw a state [4]: a position uniform in the free region, velocities uniform in +-5.226 (DINO-WM, random_state)."""
    return np.concatenate([maze.sample_xy(rng), rng.uniform(-MAX_START_SPEED, MAX_START_SPEED, 2)])


def check_state(maze: Maze, state: object) -> Float:
    """Return the state as float64 [4]; raises MazeError if it has another shape, is not finite, or is not free."""
    array = np.asarray(state, dtype=np.float64)
    if array.shape != (4,) or not np.isfinite(array).all():
        raise MazeError(f"a state is 4 finite numbers (x, y, vx, vy), not {state!r}")
    if not maze.is_free(array):
        where = "an entrance" if maze.in_entrance(array[:2]) else "a wall"
        raise MazeError(f"the state {array.round(3).tolist()} is inside {where} of maze {maze.name}")
    return array


def observation_space(maze: Maze, image_size: int) -> gym.spaces.Dict:
    """`image`: uint8 [image_size, image_size, 3] from above; `proprio`: float32 (x, y, vx, vy)."""
    x_min, x_max, y_min, y_max = maze.extent
    low = np.array([x_min, y_min, -_SPEED_BOUND, -_SPEED_BOUND], dtype=np.float32)
    high = np.array([x_max, y_max, _SPEED_BOUND, _SPEED_BOUND], dtype=np.float32)
    image = gym.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
    return gym.spaces.Dict({"image": image, "proprio": gym.spaces.Box(low, high, dtype=np.float32)})


def describe(state: Float, goal: Float) -> dict[str, Any]:
    """Return the `info` of states and goals, each [..., 4]: themselves, their distance in (x, y), and success."""
    distance = np.linalg.norm(state[..., :2] - goal[..., :2], axis=-1)
    return {"state": state.copy(), "goal": goal.copy(), "distance": distance, "success": distance < SUCCESS_DISTANCE}


class PointMazeVectorEnv(VectorEnv[Observation, NDArray[np.floating], NDArray[Any]]):
    """`num_envs` independent balls; dynamics and success rule as DINO-WM's (see `simulator.py`).

    Observations, rewards and infos are those of `PointMazeEnv`, stacked on axis 0. Episodes never end by themselves, so no env resets
    automatically. Drawing takes much longer than physics: `advance` executes several env steps without drawing.
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
        self.single_action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._simulator = PointMazeSimulator(self.maze, image_size)
        self.rngs = [np.random.default_rng() for _ in range(num_envs)]
        self._states = np.zeros((num_envs, 4))
        self._goals = np.zeros((num_envs, 4))

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start all episodes; env i gets `seed` + i or `seed[i]`. `options` may have `state` and `goal`, each [num_envs, 4]."""
        seeds = seed if isinstance(seed, list) else [None if seed is None else seed + i for i in range(self.num_envs)]
        options = options or {}
        for i, one in enumerate(seeds):
            if one is not None:
                self.rngs[i] = np.random.default_rng(one)
            for name, values in (("state", self._states), ("goal", self._goals)):
                drawn = sample_state(self.maze, self.rngs[i])
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
                moved = self._simulator.step(self._states[i], action)
                self._states[i] = states[i, t] = self.maze.teleport(moved, self.rngs[i])
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


class PointMazeEnv(gym.Env[Observation, NDArray[np.float32]]):
    """One ball in one maze, a `PointMazeVectorEnv` of one.

    Observations are the frame from above and the proprioception (x, y, vx, vy). The goal is never drawn. The reward is 1 while the
    ball is within 0.5 of the goal and 0 otherwise; an episode never ends by itself. `info` has `state`, `goal`, `distance` and
    `success`, for judges and not for planners.

    Example:
        >>> env = gym.make("wmcache/PointMaze-UMaze-v0", image_size=64)
        >>> observation, info = env.reset(seed=0, options={"state": [0.8, 0.8, 0.0, 0.0]})
        >>> observation["image"].shape
        (64, 64, 3)
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": FPS}  # noqa: RUF012 (gymnasium's own attribute)

    def __init__(
        self, maze: Maze | str | Path = "UMaze", image_size: int = 224, render_mode: str | None = None
    ) -> None:
        """Make one ball in `maze` (a layout, its name or a text file) with frames of `image_size` pixels a side."""
        self._balls = PointMazeVectorEnv(1, maze, image_size)
        self.maze = self._balls.maze
        self.render_mode = render_mode
        self.observation_space: gym.Space[Any] = self._balls.single_observation_space
        self.action_space: gym.Space[Any] = self._balls.single_action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode; `options` may have `state` and `goal`, each (x, y, vx, vy), instead of random ones."""
        super().reset(seed=seed)
        self._balls.rngs = [self.np_random]
        observation, info = self._balls.reset(options={name: [value] for name, value in (options or {}).items()})
        return _first(observation), _first(info)

    def step(self, action: NDArray[np.float32]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Advance by 0.05 s under a force on x and y, each in [-1, 1]."""
        observation, reward, *_, info = self._balls.step(np.asarray(action)[None])
        return _first(observation), float(reward[0]), False, False, _first(info)

    def render(self) -> Frame:
        """Return the current frame, uint8 [image_size, image_size, 3]."""
        return self._balls.render()[0]

    def close(self) -> None:
        """Free the GL context."""
        self._balls.close()


def _first(values: dict[str, NDArray[Any]]) -> dict[str, Any]:
    return {name: value[0] if value.ndim > 1 else value[0].item() for name, value in values.items()}
