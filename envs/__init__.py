"""The world: maze layouts, PointMaze's physics and camera, gymnasium environments and behaviour policies."""

import gymnasium

from wmcache.envs.maze import ENV_PREFIX, Maze, MazeError, env_id, find_maze, maze_names
from wmcache.envs.pointmaze import PointMazeEnv, PointMazeVectorEnv, sample_state
from wmcache.envs.policies import POLICIES, Policy
from wmcache.envs.simulator import FPS, PointMazeSimulator, RendererError, longest_move

for _name in maze_names():
    gymnasium.register(
        id=f"{ENV_PREFIX}{_name}-v0",
        entry_point="wmcache.envs.pointmaze:PointMazeEnv",
        vector_entry_point="wmcache.envs.pointmaze:PointMazeVectorEnv",
        kwargs={"maze": _name},
    )

__all__ = [
    "ENV_PREFIX",
    "FPS",
    "POLICIES",
    "Maze",
    "MazeError",
    "PointMazeEnv",
    "PointMazeSimulator",
    "PointMazeVectorEnv",
    "Policy",
    "RendererError",
    "env_id",
    "find_maze",
    "longest_move",
    "maze_names",
    "sample_state",
]
