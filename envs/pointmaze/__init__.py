"""PointMaze: push a ball through a maze, seen from above. Each file in `mazes/` is an environment of its name."""

import gymnasium

from wmcache.envs.base import ENVIRONMENTS
from wmcache.envs.pointmaze.environment import PointMaze
from wmcache.envs.pointmaze.gym_envs import PointMazeEnv, PointMazeVectorEnv, sample_state
from wmcache.envs.pointmaze.maze import ENV_PREFIX, Maze, MazeError, env_id, find_maze, maze_names
from wmcache.envs.pointmaze.noisy import NoisyPointMaze
from wmcache.envs.pointmaze.simulator import FPS, PointMazeSimulator, longest_move

for _name in maze_names():
    ENVIRONMENTS.register(_name)(PointMaze)
    gymnasium.register(
        id=f"{ENV_PREFIX}{_name}-v0",
        entry_point="wmcache.envs.pointmaze:PointMazeEnv",
        vector_entry_point="wmcache.envs.pointmaze:PointMazeVectorEnv",
        kwargs={"maze": _name},
    )

__all__ = [
    "ENV_PREFIX",
    "FPS",
    "Maze",
    "MazeError",
    "NoisyPointMaze",
    "PointMaze",
    "PointMazeEnv",
    "PointMazeSimulator",
    "PointMazeVectorEnv",
    "env_id",
    "find_maze",
    "longest_move",
    "maze_names",
    "sample_state",
]
