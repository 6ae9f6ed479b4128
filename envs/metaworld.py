"""Tasks of Meta-World (arXiv 1910.10897) by their names, such as `metaworld:drawer-open-v3`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, ClassVar

import gymnasium
import numpy as np

from wmcache.common.errors import UserError, suggest
from wmcache.envs.base import ENVIRONMENTS, Array
from wmcache.envs.gym import GymEnvironment
from wmcache.envs.mujoco_gl import mujoco
from wmcache.envs.packages import installed_for

PREFIX = "metaworld:"
CAMERA, POSITION = "corner2", (0.75, 0.075, 0.7)
"""Nearer than Meta-World's own, as work from pixels has it (Masked World Models, arXiv 2206.14244)."""
UPRIGHT = np.array([0.0, 0.0, 0.0, 1.0])
"""Half a turn around its axis: Meta-World's frames are upside down."""
SIZE = 480


@ENVIRONMENTS.register(f"{PREFIX}TASK")
class MetaWorld(GymEnvironment):
    """A task of Meta-World: objects and goal are drawn from the seed of an episode, and the observation contains the goal."""

    forms: ClassVar[tuple[str, ...]] = ()
    starts_from_states = False  # the gripper follows a mocap body, which is not in qpos

    @classmethod
    def accepts(cls, name: str, layout: Sequence[str] = ()) -> bool:
        """Accept `metaworld:TASK`."""
        return not layout and name.startswith(PREFIX)

    @classmethod
    def make(cls, name: str) -> gymnasium.Env[Any, Any]:
        """Load a task; raises UserError where it does not exist, or where metaworld does not work."""
        with installed_for(name, "metaworld", "metaworld"):
            known = import_module("metaworld.env_dict").ALL_V3_ENVIRONMENTS
        if (task := name.removeprefix(PREFIX)) not in known:
            raise UserError(f"metaworld has no task {task!r}; {suggest(task, list(known))}")
        with installed_for(name, "metaworld", "metaworld"):
            return Sawyer(known[task](render_mode="rgb_array", camera_name=CAMERA, width=SIZE, height=SIZE))


class Sawyer(gymnasium.Env[Array, Array]):
    """A task of Meta-World whose episodes are a function of the seed of `reset`."""

    def __init__(self, inner: Any) -> None:
        """Take Meta-World's environment, and make goals visible as its own benchmarks of one task do (metaworld, `_make_tasks`)."""
        self._inner = inner
        inner._set_task_called = True
        inner._partially_observable = False
        del inner.sawyer_observation_space  # it depends on the goal's visibility
        inner.seeded_rand_vec = True
        self.observation_space, self.action_space = inner.sawyer_observation_space, inner.action_space
        self.metadata, self.render_mode = inner.metadata, "rgb_array"
        self.model, self.data, self.mujoco_renderer = inner.model, inner.data, inner.mujoco_renderer
        self.fixed_camera = int(self.mujoco_renderer.camera_id)
        self.model.cam_pos[self.fixed_camera] = POSITION
        usual = self.model.cam_quat[self.fixed_camera].copy()
        mujoco.mju_mulQuat(self.model.cam_quat[self.fixed_camera], usual, UPRIGHT)

    def set_frame_size(self, size: int) -> None:
        """Choose the side of the frames in pixels, before the first is drawn."""
        buffer, renderer = self.model.vis.global_, self.mujoco_renderer
        buffer.offwidth, buffer.offheight = max(buffer.offwidth, size), max(buffer.offheight, size)
        renderer.width = renderer.height = size

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:  # noqa: ARG002
        """Draw objects and goal, then start with them; one reset of Meta-World's draws twice, and shows the first."""
        inner = self._inner
        if seed is not None:
            inner.seed(seed)
        inner._freeze_rand_vec = False
        inner.reset()
        inner._freeze_rand_vec = True
        observation, info = inner.reset()
        return observation, info

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Execute an action."""
        observation, reward, *ends = self._inner.step(action)
        return observation, float(reward), *ends

    def render(self) -> Any:
        """Draw a frame."""
        return self._inner.render()

    def close(self) -> None:
        """Free the GL context."""
        self._inner.close()
