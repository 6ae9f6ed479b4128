"""Rope and Granular: DINO-WM's deformable objects (arXiv 2411.04983, env/deformable_env) on MuJoCo instead of PyFleX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from wmcache.common.columns import Column
from wmcache.common.errors import UserError
from wmcache.envs.base import ENVIRONMENTS, Environment, EnvSpec, Expert, Frames, Observation, States, Steps, Task
from wmcache.envs.deformable.objects import GrainsOnTable, Particles, Pushable, RopeOnTable
from wmcache.envs.deformable.pushes import Greedy, Pushes, chamfer
from wmcache.envs.deformable.table import Table
from wmcache.envs.distract.looks import Look

FPS = 1
"""A push takes about 2 seconds; a dataset's frames per second are whole numbers."""
GOAL_PUSHES = 5
"""Pushes from the start to the goal of a task: DINO-WM's goals are 5 model steps away (conf/plan.yaml: goal_H)."""


class Deformable(Environment):
    """An object on a table. An env step is a whole push, and a state is the positions of the particles afterwards, in units of 10 cm.

    An action is (start x, start y, end x, end y) of the push. Distance is Chamfer's.
    """

    policies: ClassVar = {"pushes": Pushes}
    scene = True
    kind: ClassVar[type[Pushable]]
    thresholds: ClassVar[tuple[float, ...]]

    def __init__(self, name: str, count: int = 1, image_size: int = 224, layout: Sequence[str] = ()) -> None:  # noqa: ARG002
        """Compile its scene."""
        self.count, self._table = count, Table(self.kind(), image_size)
        self._states = np.stack([self._table.pushed.sample(np.random.default_rng(0))] * count)
        columns = {
            "action": Column(("action",), "float32", (4,), (-1.0,) * 4, (1.0,) * 4),
            "particles": Column(("state",), "float64", self._states.shape[1:]),
        }
        self.spec = EnvSpec(
            name, FPS, columns, image_size, renders_states=True, thresholds=self.thresholds, dataset=name.lower()
        )

    def sample_task(self, rng: np.random.Generator, *, goal: bool = True) -> Task:
        """Draw the object near the middle of the table; the goal is where some random pushes lead from there."""
        start = particles = self._table.settle(self._table.pushed.sample(rng))
        if not goal:
            return Task(start.ravel())
        act = Pushes(rng, self)
        for _ in range(GOAL_PUSHES):
            particles = self._table.push(particles, act({"particles": particles}))
        return Task(start.ravel(), particles.ravel())

    def reset(self, tasks: Sequence[Task]) -> Observation:
        """Start at states [3 n]."""
        self._states = np.stack([self._particles(task.start) for task in tasks])
        return self.observe()

    def step(self, actions: NDArray[np.floating]) -> Steps:
        """Push; an episode never ends by itself."""
        states = np.empty((*actions.shape[:2], *self._states.shape[1:]))
        for i, sequence in enumerate(actions):
            for t, action in enumerate(sequence):
                self._states[i] = states[i, t] = self._table.push(self._states[i], action)
        return {"particles": states}

    def observe(self) -> Observation:
        """Return frames and states; there is no proprio, as the tool is away between pushes."""
        states = self._states.copy()
        flat = states.reshape(len(states), -1)
        return Observation({"particles": states}, self.spec.columns, lambda: self.render(flat))

    def render(self, states: States) -> Frames:
        """Draw the table from above; raises RendererError without OpenGL."""
        return np.stack([self._table.draw(self._particles(state)) for state in states])

    def draw_looks(self, looks: Sequence[Look], states: States | None = None) -> Frames:
        """Draw the table from above."""
        drawn = zip(self._states if states is None else states, looks, strict=True)
        return np.stack([self._table.draw_look(self._particles(state), look) for state, look in drawn])

    def distance(self, states: States, goal: States) -> States:
        """Compute the Chamfer distance (DINO-WM, FlexEnvWrapper.py: chamfer_distance)."""
        states, goal = np.broadcast_arrays(states, goal)
        pairs = zip(states.reshape(-1, states.shape[-1]), goal.reshape(-1, goal.shape[-1]), strict=True)
        found = [chamfer(one.reshape(-1, 3), other.reshape(-1, 3)) for one, other in pairs]
        return np.array(found).reshape(states.shape[:-1])

    def expert(self) -> Expert:
        """Push as `Greedy` does."""
        return Greedy(self._table)

    def close(self) -> None:
        """Free the GL contexts."""
        self._table.close()

    def _particles(self, state: object) -> Particles:
        particles, shape = np.asarray(state, np.float64), self._states.shape[1:]
        if particles.size != shape[0] * 3 or not np.isfinite(particles).all():
            raise UserError(f"a state of {self.spec.id} is {shape[0]} positions of 3 finite numbers, not {state!r}")
        if not self._table.pushed.is_possible(particles := particles.reshape(shape)):
            raise UserError(f"a state of {self.spec.id} has particles at the object's distances; {state!r} has others")
        return particles


@ENVIRONMENTS.register("Rope")
class Rope(Deformable):
    """A rope of 3 units, and a stick."""

    kind, thresholds = RopeOnTable, (0.5, 0.25)


@ENVIRONMENTS.register("Granular")
class Granular(Deformable):
    """100 grains, and a board."""

    kind, thresholds = GrainsOnTable, (0.3, 0.15)
