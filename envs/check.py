"""`python -m wmcache.envs.check`: draw one frame, or report in one line what is missing."""

from __future__ import annotations

import sys

import numpy as np

from wmcache.envs.gl import RendererError
from wmcache.envs.maze import Maze
from wmcache.envs.simulator import PointMazeSimulator


def main() -> int:
    """Draw a frame; return the exit status."""
    try:
        frame = PointMazeSimulator(Maze.load("UMaze"), 64).render(np.zeros(4))
    except RendererError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    if frame.max() == frame.min():
        sys.stderr.write("MuJoCo draws empty frames; choose another MUJOCO_GL (egl, osmesa, glfw)\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
