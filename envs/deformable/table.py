"""The table: pushes what is on it, and draws it from above, on MuJoCo. It keeps no state.

The tool moves at a fixed speed: down at the start of the push, along it whatever is in its way, and up at its end; then the object comes to
rest. It is pressed down by a limited force, so that it may land on the object. Velocities are 0 afterwards: positions are all of a state.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wmcache.common.errors import UserError
from wmcache.envs.deformable.objects import Particles, Pushable
from wmcache.envs.distract.looks import Look
from wmcache.envs.distract.scene import Scene
from wmcache.envs.mujoco_gl import mujoco, open_renderer

HALF = 3.0
"""Half the side of the table, which has invisible walls."""
REACH = 2.6
"""Where an action of 1 is; the tool itself is inside the walls then."""
SPEED = 2.0
"""Of the tool, in units per second: 20 cm/s."""
LIFT = 0.5
"""How far the tool is above the table before a push and after it."""
PRESS = 20.0
"""Force that presses the tool down, that of the weight of a few particles."""
TIMESTEP = 0.005
REST = 0.5
"""Seconds for which the object comes to rest."""
FIELD_OF_VIEW = 45.0

_WALLS = "".join(
    f'<geom class="hidden" type="plane" size="1 1 1" pos="{-HALF * x} {-HALF * y} 0" zaxis="{x} {y} 0"/>'
    for x, y in ((1, 0), (-1, 0), (0, 1), (0, -1))
)


def _mjcf(pushed: Pushable, image_size: int) -> str:
    bodies, apart = pushed.mjcf()
    height = (HALF + 0.15) / np.tan(np.radians(FIELD_OF_VIEW / 2))
    return f"""
<mujoco model="table">
  <compiler autolimits="true"/>
  <option timestep="{TIMESTEP}" gravity="0 0 -98.1" integrator="implicitfast" cone="elliptic" impratio="10" iterations="20"/>
  <size memory="64M"/>
  <visual>
    <global offwidth="{image_size}" offheight="{image_size}"/>
    <quality shadowsize="1024" offsamples="4" numslices="16" numstacks="12"/>
    <headlight ambient="0.35 0.35 0.35" diffuse="0.25 0.25 0.25" specular="0 0 0"/>
    <rgba haze="0.2 0.2 0.22 1"/>
  </visual>
  <default>
    <geom friction="0.5 0.005 0.0001"/>
    <default class="particle"><geom type="sphere" density="10" contype="1" conaffinity="3" rgba="0.85 0.35 0.1 1"/></default>
    <default class="seen"><geom contype="0" conaffinity="0" mass="0" rgba="0.85 0.35 0.1 1"/></default>
    <default class="tool"><geom contype="2" conaffinity="0" density="0.001" group="3" friction="0.1" priority="1"/></default>
    <default class="hidden"><geom contype="1" conaffinity="0" group="3"/></default>
  </default>
  <worldbody>
    <camera name="top" pos="0 0 {height}" fovy="{FIELD_OF_VIEW}"/>
    <light pos="-2 3 8" dir="0.2 -0.3 -0.8" directional="true" diffuse="0.5 0.5 0.5" specular="0 0 0"/>
    {bodies}
    <geom class="hidden" type="plane" size="{HALF} {HALF} 1"/>
    {_WALLS}
    <geom type="box" contype="0" conaffinity="0" size="{HALF} {HALF} 0.1" pos="0 0 -0.1" rgba="0.8 0.8 0.76 1"/>
    <geom type="plane" contype="0" conaffinity="0" size="10 10 1" pos="0 0 -0.3" rgba="0.25 0.27 0.3 1"/>
    <body name="tool">
      <joint name="x" type="slide" axis="1 0 0" armature="1e5"/>
      <joint name="y" type="slide" axis="0 1 0" armature="1e5"/>
      <joint name="z" type="slide" axis="0 0 1" armature="0.2" damping="{PRESS / SPEED}" range="0 1000"/>
      <joint name="turn" type="hinge" axis="0 0 1" armature="1e5"/>
      {pushed.tool}
    </body>
  </worldbody>
  <contact>{apart}</contact>
</mujoco>"""


class Table:
    """Pushes and draws an object, whose state is its particles [n, 3]."""

    def __init__(self, pushed: Pushable, image_size: int = 224) -> None:
        """Compile the scene; `image_size` is the side of the square frames in pixels."""
        self.pushed, self._size = pushed, image_size
        self._model = mujoco.MjModel.from_xml_string(_mjcf(pushed, image_size))
        self._data = mujoco.MjData(self._model)
        self._renderer: mujoco.Renderer | None = None
        self._scene: Scene | None = None

    def push(self, particles: Particles, action: NDArray[np.floating]) -> Particles:
        """Push from action[:2] to action[2:], in [-1, 1] across what the tool reaches; beyond that the action is clipped.

        Raises:
            UserError: the simulation became unstable.
        """
        start, end = REACH * np.clip(np.asarray(action, np.float64), -1.0, 1.0).reshape(2, 2)
        for timestep in (TIMESTEP, TIMESTEP / 4):  # the shorter one, where something is squeezed too hard
            self._model.opt.timestep = timestep
            pushed = self._push(particles, start, end)
            self._model.opt.timestep = TIMESTEP
            if pushed is not None:
                return pushed
        raise UserError(f"the simulation of push {np.asarray(action).tolist()} became unstable; choose another one")

    def settle(self, particles: Particles) -> Particles:
        """Let particles come to rest without a push."""
        self._place(particles, [0.0, 0.0, 100.0, 0.0])
        rested = self._rest()
        assert rested is not None  # no tool is near
        return rested

    def draw(self, particles: Particles) -> NDArray[np.uint8]:
        """Draw the frame [image_size, image_size, 3] from above, without the tool; raises RendererError without OpenGL."""
        if self._renderer is None:
            self._renderer = open_renderer(self._model, self._size)
        self._show(particles)
        self._renderer.update_scene(self._data, camera="top")
        frame: NDArray[np.uint8] = self._renderer.render()
        return frame

    def draw_look(self, particles: Particles, look: Look) -> NDArray[np.uint8]:
        """Draw the frame of `draw` with a look."""
        if self._scene is None:
            self._scene = Scene(self._model, self._size, self._size)
        self._show(particles)
        return self._scene.draw(self._data, "top", look)

    def close(self) -> None:
        """Free the GL contexts."""
        for opened in (self._renderer, self._scene):
            if opened is not None:
                opened.close()
        self._renderer = self._scene = None

    def _place(self, particles: Particles, tool: list[float]) -> None:
        mujoco.mj_resetData(self._model, self._data)
        self._data.qpos[:] = [*self.pushed.to_joints(particles), *tool]

    def _show(self, particles: Particles) -> None:
        self._place(particles, [0.0, 0.0, 100.0, 0.0])
        mujoco.mj_forward(self._model, self._data)

    def _push(self, particles: Particles, start: NDArray[np.float64], end: NDArray[np.float64]) -> Particles | None:
        travel = float(np.linalg.norm(end - start))
        along = (end - start) / travel if travel > 0 else np.array([1.0, 0.0])
        self._place(particles, [*start, LIFT, np.arctan2(along[1], along[0])])
        self._move(np.zeros(2), -PRESS, LIFT)
        self._move(SPEED * along, -PRESS, travel)
        self._move(np.zeros(2), PRESS, LIFT)
        return self._rest()

    def _move(self, velocity: NDArray[np.float64], force: float, distance: float) -> None:
        self._data.qvel[-4:-2] = velocity
        self._data.qfrc_applied[-2] = force
        mujoco.mj_step(self._model, self._data, round(distance / SPEED / self._model.opt.timestep))

    def _rest(self) -> Particles | None:
        """Let the object come to rest; returns its particles, None where the simulation became unstable."""
        self._data.qvel[-4:-2] = 0.0
        mujoco.mj_step(self._model, self._data, round(REST / self._model.opt.timestep))
        if any(warning.number for warning in self._data.warning):
            return None
        mujoco.mj_kinematics(self._model, self._data)
        return self.pushed.to_particles(self._data)
