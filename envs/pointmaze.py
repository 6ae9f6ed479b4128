"""PointMaze as a gymnasium environment: push a ball through a maze under a camera from above."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from wmcache.envs.maze import Maze, MazeError
from wmcache.envs.simulator import FPS, Float, Frame, PointMazeSimulator

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
    """Return the state as float64 [4]; raises MazeError if it has another shape, is not finite, or is inside a wall."""
    array = np.asarray(state, dtype=np.float64)
    if array.shape != (4,) or not np.isfinite(array).all():
        raise MazeError(f"a state is 4 finite numbers (x, y, vx, vy), not {state!r}")
    if not maze.is_clear(array[:2], 0.0):
        raise MazeError(f"the state {array.round(3).tolist()} is inside a wall of maze {maze.name}")
    return array


def observation_space(maze: Maze, image_size: int) -> gym.spaces.Dict:
    """`image`: uint8 [image_size, image_size, 3] from above; `proprio`: float32 (x, y, vx, vy)."""
    x_min, x_max, y_min, y_max = maze.extent
    low = np.array([x_min, y_min, -_SPEED_BOUND, -_SPEED_BOUND], dtype=np.float32)
    high = np.array([x_max, y_max, _SPEED_BOUND, _SPEED_BOUND], dtype=np.float32)
    image = gym.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
    return gym.spaces.Dict({"image": image, "proprio": gym.spaces.Box(low, high, dtype=np.float32)})


def action_space() -> gym.spaces.Box:
    """The force on x and y, each in [-1, 1]."""
    return gym.spaces.Box(-1.0, 1.0, (2,), np.float32)


def describe(state: Float, goal: Float) -> dict[str, Any]:
    """Return the `info` of states and goals, each [..., 4]: themselves, their distance in (x, y), and success."""
    distance = np.linalg.norm(state[..., :2] - goal[..., :2], axis=-1)
    return {"state": state.copy(), "goal": goal.copy(), "distance": distance, "success": distance < SUCCESS_DISTANCE}


class PointMazeEnv(gym.Env[Observation, NDArray[np.float32]]):
    """One ball in one maze; dynamics and success rule as DINO-WM's (see `simulator.py`).

    The observation is a frame from above and the proprioception (x, y, vx, vy). The goal is never drawn. The reward is 1 while the
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
        self.maze = maze if isinstance(maze, Maze) else Maze.load(maze)
        self.render_mode = render_mode
        self.observation_space: gym.Space[Any] = observation_space(self.maze, image_size)
        self.action_space: gym.Space[Any] = action_space()
        self._simulator = PointMazeSimulator(self.maze, image_size)
        self._state = np.zeros(4)
        self._goal = np.zeros(4)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode; `options` may have `state` and `goal`, each (x, y, vx, vy), instead of random ones."""
        super().reset(seed=seed)
        options = options or {}
        start, goal = sample_state(self.maze, self.np_random), sample_state(self.maze, self.np_random)
        self._state = check_state(self.maze, options.get("state", start))
        self._goal = check_state(self.maze, options.get("goal", goal))
        return self._observe(), self._info()

    def step(self, action: NDArray[np.float32]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Advance by 0.05 s under a force [2] in [-1, 1]."""
        self._state = self._simulator.step(self._state, action)
        info = self._info()
        return self._observe(), float(info["success"]), False, False, info

    def render(self) -> Frame:
        """Return the current frame, uint8 [image_size, image_size, 3]."""
        return self._simulator.render(self._state)

    def close(self) -> None:
        """Free the GL context."""
        self._simulator.close()

    def _observe(self) -> Observation:
        return {"image": self.render(), "proprio": self._state.astype(np.float32)}

    def _info(self) -> dict[str, Any]:
        info = describe(self._state, self._goal)
        return {**info, "distance": float(info["distance"]), "success": bool(info["success"])}
