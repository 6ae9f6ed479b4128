"""The world: maze layouts, PointMaze's physics and camera, a vector env and behaviour policies. Imports nothing of ours."""

import gymnasium

from wmcache.envs.gl import RendererError
from wmcache.envs.maze import Maze, MazeError, maze_names
from wmcache.envs.pointmaze import PointMazeEnv, sample_state
from wmcache.envs.policies import POLICIES, Policy
from wmcache.envs.simulator import FPS, PointMazeSimulator, longest_move
from wmcache.envs.vector import PointMazeVectorEnv

ENV_PREFIX = "wmcache/PointMaze-"


def find_maze(env: str) -> Maze:
    """The maze of an environment id (`wmcache/PointMaze-UMaze-v0`), of a layout's name (`UMaze`) or of a text file.

    Raises:
        MazeError: there is no such maze.
    """
    if env.startswith(ENV_PREFIX):
        env = env.removeprefix(ENV_PREFIX).removesuffix("-v0")
    return Maze.load(env)


for _name in maze_names():
    gymnasium.register(
        id=f"{ENV_PREFIX}{_name}-v0",
        entry_point="wmcache.envs.pointmaze:PointMazeEnv",
        vector_entry_point="wmcache.envs.vector:PointMazeVectorEnv",
        kwargs={"maze": _name},
    )

__all__ = [
    "FPS",
    "POLICIES",
    "Maze",
    "MazeError",
    "PointMazeEnv",
    "PointMazeSimulator",
    "PointMazeVectorEnv",
    "Policy",
    "RendererError",
    "find_maze",
    "longest_move",
    "maze_names",
    "sample_state",
]
