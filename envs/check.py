"""`python -m wmcache.envs.check`: draw one frame, or report in one line what is missing."""

from __future__ import annotations

import sys

import numpy as np

from wmcache.envs.maze import Maze
from wmcache.envs.simulator import PointMazeSimulator, RendererError

if __name__ == "__main__":
    try:
        frame = PointMazeSimulator(Maze.load("UMaze"), 64).render(np.zeros(4))
    except RendererError as error:
        sys.exit(str(error))
    if frame.max() == frame.min():
        sys.exit("MuJoCo draws empty frames; choose another MUJOCO_GL (egl, osmesa, glfw)")
