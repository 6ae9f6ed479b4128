"""PointMaze's physics and camera on today's MuJoCo: one compiled model, any number of balls, one renderer.

The constants are D4RL's as DINO-WM uses them (env/pointmaze/maze_model.py): time step 0.01 s, 5 of them per env step, slide joints
with damping 1, motors of gear 100, a ball of radius 0.1 and density 1000, no gravity, velocity clipped to 5 before each env step.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from wmcache.envs.distract.looks import Look
from wmcache.envs.distract.scene import Scene
from wmcache.envs.mujoco_gl import mujoco, open_renderer
from wmcache.envs.pointmaze.maze import BALL_RADIUS, CENTRE, Maze
from wmcache.envs.pointmaze.wander import wander

PHYSICS_STEPS = 5
MAX_SPEED = 5.0
FPS = 20
"""Env steps per simulated second: 5 physics steps of 0.01 s each."""

Float = NDArray[np.float64]
Frame = NDArray[np.uint8]

_MARKER_RADIUS = 0.2
_FIELD_OF_VIEW = 45.0
_ENTRANCE, _EXIT = "0.6 0.2 0.6 1", "0.8 0.7 0.2 1"
"""Colours of cells of teleporters: purple and yellow."""
_OFFSET = 1.2
"""D4RL's ball starts at world (1.2, 1.2), the origin of the ball's coordinates."""


def _mjcf(maze: Maze, image_size: int) -> str:
    walls = "\n".join(
        f'<geom type="box" pos="{row + 1} {column + 1} 0" size="0.5 0.5 0.2" rgba="0.55 0.35 0.25 1"/>'
        for row, column in zip(*np.nonzero(~maze.free), strict=True)
    )
    walls += "".join(
        f'\n<geom type="box" pos="{x + _OFFSET} {y + _OFFSET} -0.1" size="0.5 0.5 0.01" contype="0" conaffinity="0" rgba="{colour}"/>'
        for colour, centres in ((_ENTRANCE, np.argwhere(maze.entrances) - CENTRE), (_EXIT, maze.exits))
        for x, y in centres
    )
    x_min, x_max, y_min, y_max = (bound + _OFFSET for bound in maze.extent)
    half = max(x_max - x_min, y_max - y_min) / 2
    height = half / np.tan(np.radians(_FIELD_OF_VIEW / 2))
    x_mid, y_mid = (x_min + x_max) / 2, (y_min + y_max) / 2
    # Azimuth 90, elevation -90: x to the right, y upwards.
    camera = f'<camera name="top" pos="{x_mid} {y_mid} {height}" fovy="{_FIELD_OF_VIEW}"/>'
    return f"""
<mujoco model="pointmaze">
  <compiler inertiafromgeom="true"/>
  <option timestep="0.01" gravity="0 0 0" iterations="20" integrator="Euler"/>
  <!-- One quad for the floor and coarser spheres: twice the frames per second in software rendering, the same picture. -->
  <visual>
    <global offwidth="{image_size}" offheight="{image_size}"/>
    <quality shadowsize="0" numquads="1" numslices="20" numstacks="10"/>
    <headlight ambient="0.6 0.6 0.6" diffuse="0.4 0.4 0.4" specular="0 0 0"/>
  </visual>
  <default>
    <joint damping="1" limited="false"/>
    <geom friction=".5 .1 .1" density="1000" margin="0.002" condim="1"/>
  </default>
  <worldbody>
    {camera}
    <geom type="plane" size="{half} {half} 0.25" pos="{x_mid} {y_mid} -0.1" contype="0" conaffinity="0" rgba="0.2 0.3 0.4 1"/>
    {walls}
    <body name="ball" pos="{_OFFSET} {_OFFSET} 0">
      <joint name="x" type="slide" axis="1 0 0"/>
      <joint name="y" type="slide" axis="0 1 0"/>
      <geom type="sphere" size="{BALL_RADIUS}" rgba="0.3 0.6 0.3 1"/>
      <site size="{_MARKER_RADIUS}" rgba="0.3 0.8 0.3 1"/>
    </body>
  </worldbody>
  <actuator>
    <motor joint="x" ctrlrange="-1 1" ctrllimited="true" gear="100"/>
    <motor joint="y" ctrlrange="-1 1" ctrllimited="true" gear="100"/>
  </actuator>
</mujoco>"""


class PointMazeSimulator:
    """Moves balls and draws them, without keeping their states: (x, y, vx, vy) in maze units and units per second, float64."""

    def __init__(self, maze: Maze, image_size: int = 224) -> None:
        """Compile the maze; `image_size` is the side of the square frames in pixels."""
        if image_size < 8:
            raise ValueError(f"image_size is {image_size}; it must be at least 8 pixels")
        self.maze = maze
        self.image_size = image_size
        self._model = mujoco.MjModel.from_xml_string(_mjcf(maze, image_size))
        self._data = mujoco.MjData(self._model)
        self._renderer: mujoco.Renderer | None = None
        self._scene: Scene | None = None

    def __reduce__(self) -> tuple[type[PointMazeSimulator], tuple[Maze, int]]:
        """Pickle the arguments: a GL context belongs to its process, and a copy opens its own when it draws."""
        return type(self), (self.maze, self.image_size)

    def step(self, state: Float, action: NDArray[np.floating]) -> Float:
        """Advance a state [4] by one env step of 0.05 s under a force [2], which is clipped to [-1, 1]."""
        finite = np.isfinite(state).all() and np.isfinite(action).all()
        if (np.shape(state), np.shape(action)) != ((4,), (2,)) or not finite:
            raise ValueError(f"a step takes 4 and 2 finite numbers, not state {state} and action {action}")
        data = self._data
        mujoco.mj_resetData(self._model, data)
        data.qpos[:] = state[:2]
        data.qvel[:] = np.clip(state[2:], -MAX_SPEED, MAX_SPEED)
        data.ctrl[:] = np.clip(action, -1.0, 1.0)
        mujoco.mj_step(self._model, data, PHYSICS_STEPS)
        return np.concatenate([data.qpos, data.qvel])

    def render(self, state: Float) -> Frame:
        """Draw the frame [image_size, image_size, 3] from above, without a goal marker; raises RendererError without OpenGL."""
        if self._renderer is None:
            self._renderer = open_renderer(self._model, self.image_size)
        self._data.qpos[:] = state[:2]
        mujoco.mj_forward(self._model, self._data)
        self._renderer.update_scene(self._data, camera="top")
        frame: Frame = self._renderer.render()
        return frame

    def render_look(self, state: Float, look: Look) -> Frame:
        """Draw the frame of `render` with a look."""
        if self._scene is None:
            self._scene = Scene(self._model, self.image_size, self.image_size)
        self._data.qpos[:] = state[:2]
        mujoco.mj_forward(self._model, self._data)
        copies = {}
        if "ball" in look.kinds:
            copies[self._model.body("ball").id] = np.append(
                wander(self.maze, look.rng("ball"), look.step) - state[:2], 0.0
            )
        return self._scene.draw(self._data, "top", look, copies)

    def close(self) -> None:
        """Free the GL contexts."""
        for opened in (self._renderer, self._scene):
            if opened is not None:
                opened.close()
        self._renderer = self._scene = None


@functools.cache
def longest_move(env_steps: int) -> float:
    """Return the largest distance that the ball can cover in some env steps, in maze units: full speed and force, about 0.401 each."""
    simulator = PointMazeSimulator(Maze("Hall", ("#####", "#OOO#", "#OOO#", "#OOO#", "#####")))
    start = np.array([1.0, 1.0, MAX_SPEED, MAX_SPEED])
    return env_steps * float(np.linalg.norm(simulator.step(start, np.ones(2))[:2] - start[:2]))
