"""The contract of environments, and the registry that finds them by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from wmcache.common.columns import Column, join_role
from wmcache.common.errors import UserError, suggest
from wmcache.common.registry import Registry
from wmcache.envs.distract.looks import Look, split_name

Array = NDArray[Any]
Frames = NDArray[np.uint8]
States = NDArray[np.float64]
Steps = dict[str, Array]
"""Column -> values, [E, ...] of one frame or [E, k, ...] of k env steps."""
Act = Callable[[Steps], NDArray[np.float32]]
"""Columns of the current frame, without the axis of episodes -> action [A]."""
Expert = Callable[[States, States, int], NDArray[np.floating]]
"""(state [S], goal [S], env steps) -> actions [env steps, A] that lead from the state towards the goal."""


@dataclass(frozen=True)
class EnvSpec:
    """What an environment is.

    Attributes:
        id: name that opens it again, together with `layout`.
        fps: env steps per simulated second.
        columns: of the step table. `action` is always there; the others describe a frame, or the env step that starts at it.
        image_size: side of the square frames in pixels.
        renders_states: a frame is a picture of a state; else of a replay.
        thresholds: of `distance`, the largest first; () where success is a return.
        dataset: default name of a dataset's folder.
        layout: lines of text that describe this world beyond its id.
        distraction: as the id ends with it, `colors,camera@3`; empty without.
    """

    id: str
    fps: float
    columns: dict[str, Column]
    image_size: int
    renders_states: bool
    thresholds: tuple[float, ...]
    dataset: str
    layout: tuple[str, ...] = ()
    distraction: str = ""

    @property
    def world(self) -> str | tuple[str, ...]:
        """What tells this world from others: its layout, which may have several names, or else its id."""
        if not self.layout:
            return self.id
        return (*self.layout, self.distraction) if self.distraction else self.layout

    @property
    def action(self) -> Column:
        """The action space."""
        return self.columns["action"]


@dataclass(frozen=True)
class Replay:
    """A moment of a recorded episode, in a world whose frames are drawn by replay.

    Attributes:
        start: where the episode starts, as `sample_task` draws it.
        actions: env actions [k, A] that lead from there to the moment.
    """

    start: States | int
    actions: NDArray[np.floating]


Start = States | int | Replay
"""A state [S]; a seed, in a world that only starts from one; or a `Replay`, in a world that does not draw a given state."""


@dataclass(frozen=True)
class Task:
    """Where an episode starts, and the goal it should reach.

    Attributes:
        goal: None where success is a return.
    """

    start: Start
    goal: Start | None = None


DrawTask = Callable[[np.random.Generator], Task]


class Observation:
    """What `count` episodes look like now.

    Attributes:
        columns: those that describe a frame, [E, ...] each.
    """

    def __init__(self, columns: Steps, described: Mapping[str, Column], draw: Callable[[], Frames]) -> None:
        """`draw` is called when the image is read, which must be before the next env step."""
        self.columns, self._described, self._draw = columns, described, draw

    @cached_property
    def image(self) -> Frames:
        """Frames, uint8 [E, S, S, 3]."""
        return self._draw()

    @cached_property
    def proprio(self) -> NDArray[np.float32] | None:
        """Proprioception, float32 [E, P]."""
        described = {name: self._described[name] for name in self.columns}
        return cast("NDArray[np.float32] | None", join_role(self.columns, described, "proprio", "float32"))


class Geometry(Protocol):
    """Free space of a world, and shortest paths through it.

    Attributes:
        name: of this world.
        walls: bool [rows, columns], a coarse picture of the world; the row runs along x, the column along y.
        extent: x_min, x_max, y_min, y_max of that picture, in the coordinates of positions.
    """

    @property
    def name(self) -> str:
        """See the attributes."""

    @property
    def walls(self) -> NDArray[np.bool_]:
        """See the attributes."""

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """See the attributes."""

    def position(self, states: States) -> States:
        """Return positions [..., 2] of states [..., S]."""

    def is_free(self, states: States) -> NDArray[np.bool_]:
        """Return whether states [..., S] are outside the walls."""

    def distance(self, start: States, ends: States) -> States:
        """Compute shortest path lengths from a state [S] to states [n, S]; inf if unreachable."""

    def path_length(self, path: States) -> float:
        """Measure a path [n, 2] of successive positions; jumps of the world, which no shortest path counts, have no length."""


class Environment(Protocol):
    """`count` copies of one world, stepped together. An implementation derives from this class.

    Attributes:
        geometry: shortest paths, where they are known.
        scene: frames are drawn by MuJoCo, so that `draw_looks` works.
        distractions: kinds of distraction that this environment draws itself.
        policies: behaviour policies of this environment alone: name -> function of a generator and the environment.
        forms: other names that a family accepts, as errors list them.
    """

    spec: EnvSpec
    count: int
    geometry: Geometry | None = None
    scene: bool = False
    distractions: ClassVar[tuple[str, ...]] = ()
    policies: ClassVar[Mapping[str, Callable[[np.random.Generator, Environment], Act]]] = {}
    forms: ClassVar[tuple[str, ...]] = ()

    def __init__(self, name: str, count: int = 1, image_size: int = 224, layout: Sequence[str] = ()) -> None:
        """Open `name`; raises UserError where that is not possible. With `layout`, see `EnvSpec`, no file is read."""

    @classmethod
    def accepts(cls, name: str, layout: Sequence[str] = ()) -> bool:  # noqa: ARG003 (for a family of environments)
        """Return whether a name that is not registered is one of this family's."""
        return False

    def sample_task(self, rng: np.random.Generator, *, goal: bool = True) -> Task:
        """Draw a start, then a goal unless `goal` is false."""

    def fixed_tasks(self) -> Mapping[str, DrawTask]:
        """Return the tasks that evaluations share, by name, each drawn with its noise; {} where there are none."""
        return {}

    def sample_goal(self, rng: np.random.Generator, start: States) -> Start | None:  # noqa: ARG002 (for worlds that differ)
        """Draw a goal for an episode that is at a state; by default that of another task."""
        return self.sample_task(rng).goal

    def reset(self, tasks: Sequence[Task]) -> Observation:
        """Start `count` episodes."""

    def step(self, actions: NDArray[np.floating]) -> Steps:
        """Execute actions [E, k, A].

        An episode that has ended does not move: its columns stay, its reward is 0.

        Returns:
            Columns [E, k, ...]: what describes a frame, after each env step; reward and ends, of that env step.
        """

    def observe(self) -> Observation:
        """Return the current observations."""

    def render(self, states: States) -> Frames:
        """Draw states [n, S], uint8 [n, S, S, 3], the same as live frames; only where `spec.renders_states`."""

    def draw_looks(self, looks: Sequence[Look], states: States | None = None) -> Frames:  # noqa: ARG002 (for those with a scene)
        """Draw states [n, S], or without them, where states are not drawn, the current frames; each with a look. Only where `scene`."""
        raise UserError(f"environment {self.spec.id} has no MuJoCo scene, so it does not draw looks")

    def distance(self, states: States, goal: States) -> States:
        """Compute the distance of states [..., S] to a goal [..., S], as the judge compares it with `spec.thresholds`.

        It is inf where the goal belongs to another world, such as one with other walls.
        """

    def longest_move(self, env_steps: int) -> float:  # noqa: ARG002 (for worlds with a geometry)
        """Return the longest path, in units of `geometry`, that some env steps can cover; 0 where it is not known."""
        return 0.0

    def expert(self) -> Expert | None:
        """Return what reaches goals with knowledge of the physics, a reference for policies; None where there is none."""
        return None

    def close(self) -> None:
        """Free windows and GL contexts."""


ENVIRONMENTS: Registry[type[Environment]] = Registry(
    "environment", package="wmcache.envs", group="wmcache.environments"
)


def find_environment(name: str, layout: Sequence[str] = ()) -> type[Environment]:
    """Find the class that opens a name, with or without distraction; raises UserError that lists what exists."""
    name, known = split_name(name)[0], list(ENVIRONMENTS)
    if name in known:
        return ENVIRONMENTS.get(name)
    for kind in dict.fromkeys(ENVIRONMENTS.get(other) for other in known):
        if kind.accepts(name, layout):
            return kind
    forms = dict.fromkeys(form for other in known for form in ENVIRONMENTS.get(other).forms)
    raise UserError(f"unknown environment {name!r}; {suggest(name, [*known, *forms])}")


def open_environment(name: str, count: int = 1, image_size: int = 224, layout: Sequence[str] = ()) -> Environment:
    """Open `count` copies of an environment by its name.

    Args:
        name: such as `UMaze`, `wmcache/PointMaze-UMaze-v0`, a path of a .txt grid, `PushT`, `gym:CartPole-v1` or
            `my_package:MyEnv-v0`, as gymnasium spells it; followed by `+colors,camera@3` it is distracted, see `distract`.
        layout: of the environment's spec, or of a dataset's card.

    Raises:
        UserError: no environment has that name, or it cannot be opened.
    """
    from wmcache.envs.distract.environment import Distracted  # here, because it derives from Environment

    plain, distraction = split_name(name)
    env = find_environment(plain, layout)(plain, count, image_size, layout)
    return env if distraction is None else Distracted(env, distraction)


def open_geometry(name: str, layout: Sequence[str]) -> Geometry | None:
    """Return the geometry of an environment, None where none is known; raises UserError as `open_environment` does."""
    opened = open_environment(name, layout=layout)
    opened.close()
    return opened.geometry
