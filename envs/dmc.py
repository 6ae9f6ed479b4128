"""Tasks of the DeepMind Control Suite (arXiv 1801.00690) by their names, such as `dmc:reacher-easy`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, ClassVar

import gymnasium

from wmcache.common.errors import UserError, suggest
from wmcache.envs.base import ENVIRONMENTS, Array
from wmcache.envs.gym import GymEnvironment
from wmcache.envs.mujoco_gl import open_renderer
from wmcache.envs.packages import installed_for

PREFIX = "dmc:"
SIZE = 240


@ENVIRONMENTS.register(f"{PREFIX}DOMAIN-TASK")
class ControlSuite(GymEnvironment):
    """A task of dm-control's suite. Observations are dm-control's, a column for each part; frames are of its first camera."""

    forms: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def accepts(cls, name: str, layout: Sequence[str] = ()) -> bool:
        """Accept `dmc:DOMAIN-TASK`."""
        return not layout and name.startswith(PREFIX)

    @classmethod
    def make(cls, name: str) -> gymnasium.Env[Any, Any]:
        """Load a task; raises UserError where it does not exist, or where dm-control does not work."""
        with installed_for(name, "dm-control", "dmc"):
            suite = import_module("dm_control.suite")
            compatibility = import_module("shimmy.dm_control_compatibility").DmControlCompatibilityV0
        known = {f"{domain}-{task}": (domain, task) for domain, task in suite.ALL_TASKS}
        if (task := name.removeprefix(PREFIX)) not in known:
            raise UserError(f"dm-control has no task {task!r}; {suggest(task, list(known))}")
        with installed_for(name, "dm-control", "dmc"), quiet_compiler():
            return Suite(compatibility(suite.load(*known[task]), render_mode="rgb_array"))


@contextmanager
def quiet_compiler() -> Iterator[None]:
    """Keep MuJoCo's warnings of what dm-control's own models use to itself."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


class Suite(gymnasium.Env[dict[str, Array], Array]):
    """A task of dm-control as shimmy converts it, with what `World` uses beside gymnasium's methods."""

    fixed_camera = 0

    def __init__(self, converted: Any) -> None:
        """Take shimmy's environment."""
        self._converted, self._physics = converted, converted.unwrapped.physics
        self.observation_space, self.action_space = converted.observation_space, converted.action_space
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": 1 / converted.dt}
        self.render_mode = "rgb_array"
        self._size = SIZE
        self._renderer: Any = None

    @property
    def model(self) -> Any:
        """MuJoCo's model."""
        return self._physics.model.ptr

    @property
    def data(self) -> Any:
        """MuJoCo's data."""
        return self._physics.data.ptr

    def set_frame_size(self, size: int) -> None:
        """Choose the side of the frames in pixels, before the first is drawn."""
        self._size = size

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode."""
        observation, info = self._converted.reset(seed=seed, options=options)
        return observation, info

    def step(self, action: Array) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Execute an action."""
        observation, reward, *ends = self._converted.step(action)
        return observation, float(reward), *ends

    def render(self) -> Any:
        """Draw the first camera's frame; dm-control's own renderer reports errors at exit."""
        if self._renderer is None:
            self._renderer = open_renderer(self.model, self._size)
        self._renderer.update_scene(self.data, self.fixed_camera)
        return self._renderer.render()

    def close(self) -> None:
        """Free the renderer and the physics."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        self._converted.close()

    def _get_obs(self) -> Any:
        return self._converted.unwrapped.task.get_observation(self._physics)
