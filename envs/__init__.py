"""The world: the contract of environments, their registry, implementations and behaviour policies."""

from wmcache.envs.base import (
    ENVIRONMENTS,
    Environment,
    EnvSpec,
    Geometry,
    Observation,
    Replay,
    Steps,
    Task,
    find_environment,
    open_environment,
    open_geometry,
)
from wmcache.envs.distract import Distraction, distraction_of
from wmcache.envs.distract.environment import VIEW
from wmcache.envs.mujoco_gl import RendererError
from wmcache.envs.pointmaze import (
    ENV_PREFIX,
    FPS,
    Maze,
    MazeError,
    PointMazeEnv,
    PointMazeSimulator,
    PointMazeVectorEnv,
    env_id,
    find_maze,
    longest_move,
    maze_names,
    sample_state,
)
from wmcache.envs.policies import POLICIES, Policy

__all__ = [
    "ENVIRONMENTS",
    "ENV_PREFIX",
    "FPS",
    "POLICIES",
    "VIEW",
    "Distraction",
    "EnvSpec",
    "Environment",
    "Geometry",
    "Maze",
    "MazeError",
    "Observation",
    "PointMazeEnv",
    "PointMazeSimulator",
    "PointMazeVectorEnv",
    "Policy",
    "RendererError",
    "Replay",
    "Steps",
    "Task",
    "distraction_of",
    "env_id",
    "find_environment",
    "find_maze",
    "longest_move",
    "maze_names",
    "open_environment",
    "open_geometry",
    "sample_state",
]
