"""One gymnasium environment: what it shows as columns, its MuJoCo state, and its frames."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

import gymnasium
import numpy as np

from wmcache.common.columns import Column
from wmcache.common.errors import UserError, reason
from wmcache.envs.base import Array, Frames, Replay, Start, States, Steps, find_environment
from wmcache.envs.distract.looks import Look
from wmcache.envs.distract.scene import Scene
from wmcache.envs.mujoco_gl import RendererError, close_at_exit, mujoco
from wmcache.envs.spaces import action_column, observed_parts

if TYPE_CHECKING:
    from wmcache.envs.gym import GymEnvironment

TRIES = 3
CHECKED_SIZE = 64
"""Side of the frames that are compared, where it can be chosen."""
NOT_ENDED = {"terminated": False, "truncated": False}


class World:
    """One gymnasium environment and what was last seen of it.

    Attributes:
        model, data: MuJoCo's, None in other environments.
        columns: of its steps.
        seen: columns of the current frame.

    An environment may have `set_frame_size`, which takes the side of its frames in pixels before it draws; and `fixed_camera`, the number
    of the MuJoCo camera that it draws through.
    """

    def __init__(self, name: str, image_size: int) -> None:
        """Make it; raises UserError where it cannot be made, or cannot be recorded."""
        self.name = name
        with self._running("cannot be made"):
            family = cast("type[GymEnvironment]", find_environment(name))
            self.env: gymnasium.Env[Any, Any] = family.make(name)
        self._core: Any = self.env.unwrapped
        if hasattr(self._core, "set_frame_size"):
            self._core.set_frame_size(image_size)
        if "rgb_array" not in self.env.metadata.get("render_modes", ()):
            raise UserError(f"environment {name} has no render mode rgb_array; add it to its metadata, or wrap it")
        model, data = (getattr(self._core, part, None) for part in ("model", "data"))
        has_model = isinstance(model, mujoco.MjModel) and isinstance(data, mujoco.MjData)
        self.model, self.data = (model, data) if has_model else (None, None)
        self._parts = observed_parts(self.env.observation_space, ("proprio",) if has_model else ("proprio", "state"))
        action, self._to_action = action_column(self.env.action_space, name)
        self.columns = {"action": action, **{part: known.column for part, known in self._parts.items()}}
        if has_model:
            size = sum(len(values) for values in self._physics())
            self.columns["state"] = Column(("state",), "float64", (size,))
        self.columns["reward"] = Column(("reward",), "float32")
        self.columns |= {"terminated": Column(("terminated",), "bool"), "truncated": Column(("truncated",), "bool")}
        self.seen: Steps = {}
        self._fixed_camera: int | None = getattr(self._core, "fixed_camera", None)
        self._aimed = self._fixed_camera is not None
        self._scene: Scene | None = None
        self._ended = dict(NOT_ENDED)

    def reset(self, start: Start) -> None:
        """Start an episode at a seed, at a moment of a recorded episode, or at a MuJoCo state [S]."""
        if isinstance(start, Replay):
            self.reset(start.start)
            for action in start.actions:
                self.step(action)
            return
        self._ended = dict(NOT_ENDED)
        with self._running("failed in reset"):
            observation, _ = self.env.reset(seed=start if isinstance(start, int) else 0)
        if not isinstance(start, int):
            self._set_state(start)
            read = getattr(self._core, "_get_obs", None)
            observation = observation if read is None else read()
        self._see(observation)

    def step(self, action: Array) -> Steps:
        """Execute one env step; returns all columns but the action."""
        reward = 0.0
        if not any(self._ended.values()):
            with self._running("failed in step"):
                observation, given, terminated, truncated, _ = self.env.step(self._to_action(action))
            self._see(observation)
            reward, self._ended = float(given), {"terminated": bool(terminated), "truncated": bool(truncated)}
            if not np.isfinite(reward):
                raise UserError(f"environment {self.name} returned the reward {reward}; rewards must be finite")
        ends = {end: np.asarray(value) for end, value in self._ended.items()}
        return {**self.seen, "reward": np.asarray(reward, np.float32), **ends}

    @property
    def has_scene(self) -> bool:
        """Whether MuJoCo draws through a camera that is known, so that frames may have a look."""
        known = self._fixed_camera is not None or hasattr(self._core, "mujoco_renderer")
        return self.data is not None and known

    def draw(self, look: Look | None = None) -> Frames:
        """Draw the current frame, uint8 [H, W, 3]."""
        with self._running("cannot draw a frame", drawing=True):
            if self.data is not None and not self._aimed:
                self._aim()
            if look is not None and self._scene is not None:
                return self._scene.draw(self.data, self._camera(), look)
            viewer = getattr(getattr(self._core, "mujoco_renderer", None), "viewer", None)
            if viewer is not None:  # gymnasium draws in the context that is current, which may be another copy's
                viewer.make_context_current()
            frame: Any = self.env.render()
            if self.data is not None:
                close_at_exit(self)
        if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            kind = f"{frame.dtype} {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
            raise UserError(f"frames of environment {self.name} are {kind}; rgb_array must be uint8 [height, width, 3]")
        if look is None:
            return frame
        self._scene = Scene(self.model, *frame.shape[:2])
        return self.draw(look)

    def draw_state(self, state: States, look: Look | None = None) -> Frames:
        """Draw a MuJoCo state [S]; the episode is lost."""
        if not self.seen:
            self.reset(0)
        self._set_state(state)
        return self.draw(look)

    def close(self) -> None:
        """Close the environment."""
        if self._scene is not None:
            self._scene.close()
            self._scene = None
        self.env.close()

    def _camera(self) -> Any:
        """Return what the environment draws through: the number of a camera, or a free camera."""
        if self._fixed_camera is not None:
            return self._fixed_camera
        renderer = self._core.mujoco_renderer
        number = renderer.camera_id
        return renderer.viewer.cam if number is None or number < 0 else number

    def _aim(self) -> None:
        """Open the viewer at MuJoCo's own first state: its free camera looks at the middle of what it sees first."""
        kind = mujoco.mjtState.mjSTATE_INTEGRATION
        kept = np.empty(mujoco.mj_stateSize(self.model, kind))
        mujoco.mj_getState(self.model, self.data, kept, kind)
        mujoco.mj_resetData(self.model, self.data)
        mujoco.mj_forward(self.model, self.data)
        self.env.render()
        mujoco.mj_setState(self.model, self.data, kept, kind)
        mujoco.mj_forward(self.model, self.data)
        mujoco.mj_setState(self.model, self.data, kept, kind)
        self._aimed = True

    def _physics(self) -> tuple[Array, Array, Array]:
        assert self.data is not None
        return self.data.qpos, self.data.qvel, self.data.act

    def _set_state(self, state: States) -> None:
        if self.data is None:
            raise UserError(f"environment {self.name} starts from a seed, not from a state")
        parts = self._physics()
        for part, values in zip(parts, np.split(state, np.cumsum([len(part) for part in parts[:-1]])), strict=True):
            part[:] = values
        mujoco.mj_forward(self.model, self.data)

    def _see(self, observation: Any) -> None:
        with self._running("returned an observation that its space does not allow"):
            self.seen = {name: part.read(observation) for name, part in self._parts.items()}
        if self.data is not None:
            self.seen["state"] = np.concatenate(self._physics())
        for name, values in self.seen.items():
            if not np.isfinite(values).all():
                raise UserError(f"environment {self.name} returned values of {name} that are not finite: {values[:8]}")

    @contextmanager
    def _running(self, failed: str, *, drawing: bool = False) -> Iterator[None]:
        """Turn whatever another package raises into one line."""
        try:
            with warnings.catch_warnings():
                # Deprecated versions and bindings warn; as errors they would crash the bindings.
                warnings.simplefilter("ignore")
                yield
        except UserError:
            raise
        except Exception as error:  # whatever the environment raises
            if drawing and self.data is not None:
                raise RendererError.of(error) from error
            kind, hint = type(error).__name__, "fix or install it"
            if isinstance(error, gymnasium.error.UnregisteredEnv):
                hint = "install it, or name the module that registers it, as module:ID"
            raise UserError(f"environment {self.name} {failed} ({kind}: {reason(error)}); {hint}") from error


@functools.cache
def seconds_of(name: str, image_size: int) -> tuple[float, float]:
    """Measure an env step and a drawing of a world of its own; 0 in one that fails, which is reported when it is used."""
    world = World(name, image_size)
    try:
        world.reset(0)
        step = min(_time(lambda: world.step(np.asarray(world.columns["action"].low))) for _ in range(TRIES))
        return step, min(_time(world.draw) for _ in range(TRIES))
    except UserError:
        return 0.0, 0.0
    finally:
        world.close()


def _time(call: Callable[[], object]) -> float:
    begun = perf_counter()
    call()
    return perf_counter() - begun


@functools.cache
def draws_states(name: str) -> bool:
    """Return whether a MuJoCo state shows all that a frame does: goals, for example, may be drawn outside of it."""
    live, painter = (World(name, CHECKED_SIZE) for _ in range(2))
    equal = True
    for seed in (1, 2):
        live.reset(seed)
        rng = np.random.default_rng(seed)
        low, high = live.columns["action"].low, live.columns["action"].high
        for steps in range(4):
            if steps:
                live.step(rng.uniform(low or 0.0, high or 1.0))
            mujoco.mj_forward(live.model, live.data)  # a step leaves positions of bodies one physics step behind
            equal = equal and np.array_equal(live.draw(), painter.draw_state(live.seen["state"]))
    live.close()
    painter.close()
    return equal
