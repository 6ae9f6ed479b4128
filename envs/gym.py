"""Any gymnasium environment with `rgb_array` frames, by its id."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from itertools import repeat
from typing import Any, ClassVar

import gymnasium
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wmcache.common.cpus import own_cpus
from wmcache.common.errors import UserError
from wmcache.envs.base import (
    ENVIRONMENTS,
    Environment,
    EnvSpec,
    Frames,
    Observation,
    Start,
    States,
    Steps,
    Task,
)
from wmcache.envs.distract.looks import Look
from wmcache.envs.gym_world import World, draws_states, seconds_of
from wmcache.envs.processes import Processes

# Without a screen, pygame draws off screen; the user's own choice is kept.
if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")

PREFIX = "gym:"
QUALIFIED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z][\w./-]*")
"""An id with the module that registers it, as gymnasium spells it: `my_package:MyEnv-v0`."""
SLOW = 0.05
"""Seconds of a step and a drawing of all copies, above which they run in several processes. These take about two seconds to start."""
Looks = Sequence[Look] | None


@ENVIRONMENTS.register(f"{PREFIX}ID")
class GymEnvironment(Environment):
    """A gymnasium environment; an episode starts from a seed, or in MuJoCo also from a state.

    Columns are the numeric parts of the observation (`observation`, or the keys of a Dict), reward and ends. Where the environment has a
    MuJoCo model, the state is qpos, qvel and act, and frames are drawn from it; elsewhere the observation is the state too.
    """

    forms: ClassVar[tuple[str, ...]] = ("module:ID",)
    starts_from_states = True
    """Whether qpos, qvel and act are all of a MuJoCo state."""

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
            renders_states=self.starts_from_states and here.worlds[0].data is not None and draws_states(name),
            thresholds=(),
            dataset=re.split("[:/]", name)[-1].lower(),
        )
        self.scene = here.worlds[0].has_scene

    @classmethod
    def accepts(cls, name: str, layout: Sequence[str] = ()) -> bool:
        """Accept `gym:ID`, and `module:ID` unless the module is another family's prefix."""
        if layout or name.startswith(PREFIX):
            return not layout
        families = {other.partition(":")[0] for other in ENVIRONMENTS if ":" in other}
        return QUALIFIED.fullmatch(name) is not None and name.partition(":")[0] not in families

    @classmethod
    def make(cls, name: str) -> gymnasium.Env[Any, Any]:
        """Make the gymnasium environment of a name; raises whatever another package raises."""
        return gymnasium.make(name.removeprefix(PREFIX), render_mode="rgb_array", disable_env_checker=True)

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

    def draw_looks(self, looks: Sequence[Look], states: States | None = None) -> Frames:
        """Draw MuJoCo states, or the current frames."""
        self._use_processes(drawing=True)
        return self._copies.draw(looks) if states is None else self._copies.paint(states, looks)

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
        step, draw = seconds_of(self.spec.id, self.spec.image_size)
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
        self.worlds = [World(name, image_size)]
        self._count, self._size = count, image_size
        self._painter: World | None = None

    def reset(self, starts: Sequence[Start]) -> Steps:
        """Start episodes; returns the columns of their first frames, [E, ...]."""
        self.worlds += [World(self.worlds[0].name, self._size) for _ in range(self._count - len(self.worlds))]
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

    def draw(self, looks: Looks = None) -> Frames:
        """Draw the current frames, [E, S, S, 3]."""
        each = zip(self.worlds, looks or repeat(None, len(self.worlds)), strict=True)
        return np.stack([resized(world.draw(look), self._size) for world, look in each])

    def paint(self, states: States, looks: Looks = None) -> Frames:
        """Draw MuJoCo states [n, S], in a world of its own."""
        if self._painter is None:
            self._painter = World(self.worlds[0].name, self._size)
        each = zip(states, looks or repeat(None, len(states)), strict=True)
        return np.stack([resized(self._painter.draw_state(state, look), self._size) for state, look in each])

    def close(self) -> None:
        """Close all worlds."""
        for world in (*self.worlds, *([self._painter] if self._painter else [])):
            world.close()


def resized(frame: Frames, size: int) -> Frames:
    """Resize a frame to a square, by areas."""
    if frame.shape[:2] == (size, size):
        return frame
    return np.asarray(Image.fromarray(frame).resize((size, size), Image.Resampling.BOX))
