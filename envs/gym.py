"""Any gymnasium environment with `rgb_array` frames, by its id."""

from __future__ import annotations

import functools
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wmcache.common.columns import Column
from wmcache.common.cpus import own_cpus
from wmcache.common.errors import UserError, reason
from wmcache.envs.base import (
    ENVIRONMENTS,
    Array,
    Environment,
    EnvSpec,
    Frames,
    Observation,
    Replay,
    Start,
    States,
    Steps,
    Task,
)
from wmcache.envs.mujoco_gl import RendererError, mujoco
from wmcache.envs.processes import Processes
from wmcache.envs.spaces import action_column, observed_parts

# Without a screen, pygame draws off screen; the user's own choice is kept.
if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")

PREFIX = "gym:"
QUALIFIED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z][\w./-]*")
"""An id with the module that registers it, as gymnasium spells it: `my_package:MyEnv-v0`."""
SLOW = 0.05
"""Seconds of a step and a drawing of all copies, above which they run in several processes. These take about two seconds to start."""
TRIES = 3
NOT_ENDED = {"terminated": False, "truncated": False}


@ENVIRONMENTS.register(f"{PREFIX}ID")
class GymEnvironment(Environment):
    """A gymnasium environment; an episode starts from a seed, or in MuJoCo also from a state.

    Columns are the numeric parts of the observation (`observation`, or the keys of a Dict), reward and ends. Where the environment has a
    MuJoCo model, the state is qpos, qvel and act, and frames are drawn from it; elsewhere the observation is the state too.
    """

    forms = ("module:ID",)

    def __init__(self, name: str, count: int = 1, image_size: int = 224, layout: Sequence[str] = ()) -> None:  # noqa: ARG002
        """Make an environment by its id, such as `gym:CartPole-v1` or `my_package:MyEnv-v0`."""
        self.count = count
        here = Copies(name, count, image_size)
        self._copies: Copies | Processes = here
        self._workers = min(count, own_cpus())
        self._starts: list[Start] = []  # of episodes that have not moved yet
        self._seen: Steps = {}
        self.spec = EnvSpec(
            name,
            float(here.worlds[0].env.metadata.get("render_fps") or 20),
            here.worlds[0].columns,
            image_size,
            renders_states=here.worlds[0].data is not None and draws_states(name),
            thresholds=(),
            dataset=re.split("[:/]", name)[-1].lower(),
        )

    @classmethod
    def accepts(cls, name: str, layout: Sequence[str] = ()) -> bool:
        """Accept `gym:ID` and `module:ID`."""
        return not layout and (name.startswith(PREFIX) or QUALIFIED.fullmatch(name) is not None)

    def sample_task(self, rng: np.random.Generator, *, goal: bool = True) -> Task:  # noqa: ARG002 (there is none)
        """Draw the seed of an episode; success is its return."""
        return Task(int(rng.integers(2**31)))

    def reset(self, tasks: Sequence[Task]) -> Observation:
        """Start at seeds, at moments of recorded episodes, or at MuJoCo states."""
        self._starts = [task.start for task in tasks]
        self._use_processes(drawing=False)
        self._seen = self._copies.reset(self._starts)
        return self.observe()

    def step(self, actions: NDArray[np.floating]) -> Steps:
        """Execute actions; an episode that has ended stays as it is."""
        self._starts = []
        moved = self._copies.step(actions)
        self._seen = {name: moved[name][:, -1] for name in self._seen}
        return moved

    def observe(self) -> Observation:
        """Return the current observations."""
        columns = dict(self._seen)
        return Observation(columns, self.spec.columns, lambda: self._draw(columns))

    def render(self, states: States) -> Frames:
        """Draw MuJoCo states."""
        if not self.spec.renders_states:
            raise UserError(f"environment {self.spec.id} does not draw a given state; replay the episode")
        return self._copies.paint(states)

    def distance(self, states: States, goal: States) -> States:
        """Compute the Euclidean distance of states."""
        return np.asarray(np.linalg.norm(states - goal, axis=-1))

    def close(self) -> None:
        """Close the environments."""
        self._copies.close()

    def _draw(self, columns: Steps) -> Frames:
        self._use_processes(drawing=True)
        return self._copies.paint(columns["state"]) if self.spec.renders_states else self._copies.draw()

    def _use_processes(self, *, drawing: bool) -> None:
        """Move episodes that have not begun to worker processes, where that is faster; they give the same numbers."""
        if self._workers == 1 or not self._starts or isinstance(self._copies, Processes):
            return
        step, draw = seconds_of(self.spec.id)
        if self.count * (step + draw * drawing) < SLOW:
            return
        try:
            moved = Processes(self.spec.id, self.count, self.spec.image_size, self._workers)
        except (OSError, UserError):
            self._workers = 1  # an environment that only this process knows
            return
        self._copies.close()
        self._copies = moved
        if drawing:
            moved.reset(self._starts)


class Copies:
    """Copies of a world, stepped together in this process.

    Attributes:
        worlds: the copies; one before the first reset.
    """

    def __init__(self, name: str, count: int, image_size: int) -> None:
        """Make one; raises UserError as `World` does."""
        self.worlds = [World(name)]
        self._count, self._size = count, image_size
        self._painter: World | None = None

    def reset(self, starts: Sequence[Start]) -> Steps:
        """Start episodes; returns the columns of their first frames, [E, ...]."""
        self.worlds += [World(self.worlds[0].name) for _ in range(self._count - len(self.worlds))]
        for world, start in zip(self.worlds, starts, strict=True):
            world.reset(start)
        return {name: np.stack([world.seen[name] for world in self.worlds]) for name in self.worlds[0].seen}

    def step(self, actions: NDArray[np.floating]) -> Steps:
        """Execute actions [E, k, A]; returns all other columns, [E, k, ...]."""
        rows = [
            [world.step(action) for action in sequence] for world, sequence in zip(self.worlds, actions, strict=True)
        ]
        names = [name for name in self.worlds[0].columns if name != "action"]
        return {name: np.stack([np.stack([row[name] for row in sequence]) for sequence in rows]) for name in names}

    def draw(self) -> Frames:
        """Draw the current frames, [E, S, S, 3]."""
        return np.stack([resized(world.draw(), self._size) for world in self.worlds])

    def paint(self, states: States) -> Frames:
        """Draw MuJoCo states [n, S], in a world of its own."""
        if self._painter is None:
            self._painter = World(self.worlds[0].name)
        return np.stack([resized(self._painter.draw_state(state), self._size) for state in states])

    def close(self) -> None:
        """Close all worlds."""
        for world in (*self.worlds, *([self._painter] if self._painter else [])):
            world.env.close()


class World:
    """One gymnasium environment and what was last seen of it.

    Attributes:
        model, data: MuJoCo's, None in other environments.
        columns: of its steps.
        seen: columns of the current frame.
    """

    def __init__(self, name: str) -> None:
        """Make it; raises UserError where it cannot be made, or cannot be recorded."""
        self.name = name
        with self._running("cannot be made"):
            self.env: gymnasium.Env[Any, Any] = gymnasium.make(
                name.removeprefix(PREFIX), render_mode="rgb_array", disable_env_checker=True
            )
        if "rgb_array" not in self.env.metadata.get("render_modes", ()):
            raise UserError(f"environment {name} has no render mode rgb_array; add it to its metadata, or wrap it")
        model, data = (getattr(self.env.unwrapped, part, None) for part in ("model", "data"))
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
        self._aimed = False
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
            read = getattr(self.env.unwrapped, "_get_obs", None)
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

    def draw(self) -> Frames:
        """Draw the current frame, uint8 [H, W, 3]."""
        with self._running("cannot draw a frame", drawing=True):
            if self.data is not None and not self._aimed:
                self._aim()
            frame: Any = self.env.render()
        if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            kind = f"{frame.dtype} {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
            raise UserError(f"frames of environment {self.name} are {kind}; rgb_array must be uint8 [height, width, 3]")
        return frame

    def draw_state(self, state: States) -> Frames:
        """Draw a MuJoCo state [S]; the episode is lost."""
        if not self.seen:
            self.reset(0)
        self._set_state(state)
        return self.draw()

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
def seconds_of(name: str) -> tuple[float, float]:
    """Measure an env step and a drawing of a world of its own; 0 in one that fails, which is reported when it is used."""
    world = World(name)
    try:
        world.reset(0)
        step = min(_time(lambda: world.step(np.asarray(world.columns["action"].low))) for _ in range(TRIES))
        return step, min(_time(world.draw) for _ in range(TRIES))
    except UserError:
        return 0.0, 0.0
    finally:
        world.env.close()


def _time(call: Callable[[], object]) -> float:
    begun = perf_counter()
    call()
    return perf_counter() - begun


@functools.cache
def draws_states(name: str) -> bool:
    """Return whether a MuJoCo state shows all that a frame does: goals, for example, may be drawn outside of it."""
    live, painter = World(name), World(name)
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
    live.env.close()
    painter.env.close()
    return equal


def resized(frame: Frames, size: int) -> Frames:
    """Resize a frame to a square, by areas."""
    if frame.shape[:2] == (size, size):
        return frame
    return np.asarray(Image.fromarray(frame).resize((size, size), Image.Resampling.BOX))
