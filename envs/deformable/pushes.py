"""Pushes: the behaviour policy, and the expert."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from wmcache.envs.base import Environment, States, Steps
from wmcache.envs.deformable.objects import Particles
from wmcache.envs.deformable.table import REACH, Table

Action = NDArray[np.float64]

MIDDLE = 2.0
"""Particles that are aimed at are so close to the object's median."""
CLEAR = 0.3
"""Distance of a push's start from all particles."""
BEYOND = (0.5, 1.5)
"""Distance from the particle that is aimed at to the end of the push."""
END = 1.5
"""Ends of pushes are so close to the middle of the table, along x and along y, so that the object stays there."""
MISSES = 0.2
"""Share of uniform pushes, most of which miss: a planner tries such pushes too."""
TRIES = 1000

RANKS = (0.0, 0.2)
"""Of particles and of places in the goal, from the farthest, that the expert considers."""
BACK = np.arange(0.4, 2 * REACH, 0.2)
"""Distances from the particle that the expert pushes to its start, of which it takes the first with room for the tool."""


class Pushes:
    """A policy that pushes through a random particle (DINO-WM, flex_env.py: sample_deform_actions), and sometimes anywhere."""

    def __init__(self, rng: np.random.Generator, env: Environment) -> None:  # noqa: ARG002 (a policy's signature)
        """Draw pushes from `rng`."""
        self._rng = rng

    def __call__(self, seen: Steps) -> NDArray[np.float32]:
        """Return the action [4] in a state."""
        if self._rng.uniform() < MISSES:
            return self._rng.uniform(-1.0, 1.0, 4).astype(np.float32)
        particles = seen["particles"][:, :2]
        middle = np.linalg.norm(particles - np.median(particles, 0), axis=1) < MIDDLE
        aims = particles[middle] if middle.any() else particles
        for _ in range(TRIES):
            start, aim = self._rng.uniform(-REACH, REACH, 2), aims[self._rng.integers(len(aims))]
            along = (aim - start) / np.linalg.norm(aim - start)
            end = aim + self._rng.uniform(*BEYOND) * along
            if np.abs(end).max() < END and cdist(start[None], particles).min() > CLEAR:
                break
        return (np.concatenate([start, end]) / REACH).clip(-1.0, 1.0).astype(np.float32)


def chamfer(particles: States, goal: States) -> float:
    """Add the mean distances of particles [n, 3] to the nearest of the goal's [m, 3], and the other way round."""
    apart = cdist(particles, goal)
    return float(apart.min(1).mean() + apart.min(0).mean())


class Greedy:
    """Pushes a particle that is far from the goal's to the nearest of these, or the nearest particle to where one is missing.

    It executes what the simulator finds best of some such pushes and of one that touches nothing.
    """

    def __init__(self, table: Table) -> None:
        """Simulate on a table."""
        self._table = table

    def __call__(self, state: States, goal: States, steps: int) -> Action:
        """Return actions [steps, 4] from a state [3 n] to a goal [3 n]."""
        particles, target = state.reshape(-1, 3), goal.reshape(-1, 3)
        actions = np.empty((steps, 4))
        for step in range(steps):
            tried = [(action, self._table.push(particles, action)) for action in self._candidates(particles, target)]
            actions[step], particles = min(tried, key=lambda one: chamfer(one[1], target))
        return actions

    def _candidates(self, particles: Particles, goal: Particles) -> list[Action]:
        apart = cdist(particles, goal)
        far, missing = (apart.min(axis).argsort()[::-1] for axis in (1, 0))
        ranked = [(far[int(rank * len(far))], missing[int(rank * len(missing))]) for rank in RANKS]
        pairs = [
            pair for one, place in ranked for pair in ((one, apart[one].argmin()), (apart[:, place].argmin(), place))
        ]
        pushed = self._table.pushed
        ahead = pushed.tool_radius + pushed.radius
        actions = []
        for particle, place in pairs:
            here, there = particles[particle, :2], goal[place, :2]
            along = (there - here) / max(1e-9, float(np.linalg.norm(there - here)))
            starts = here - BACK[:, None] * along
            free = cdist(starts, particles[:, :2]).min(1) > pushed.room
            start, end = starts[free.argmax()], there - ahead * along
            actions.append(np.clip(np.concatenate([start, end]) / REACH, -1.0, 1.0))
        corners = np.array([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
        free = corners[cdist(REACH * corners, particles[:, :2]).min(1).argmax()]
        return [*actions, np.tile(free, 2)]
