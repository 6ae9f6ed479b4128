"""PointMaze behind the contract of environments."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from wmcache.common.columns import default_columns
from wmcache.envs.base import DrawTask, Environment, EnvSpec, Expert, Frames, Observation, States, Steps, Task
from wmcache.envs.distract.looks import Look
from wmcache.envs.pointmaze.expert import PathFollower
from wmcache.envs.pointmaze.gym_envs import check_state, sample_state
from wmcache.envs.pointmaze.maze import ENV_PREFIX, GENERATED, Maze, env_id, find_maze
from wmcache.envs.pointmaze.simulator import FPS, PointMazeSimulator, longest_move
from wmcache.envs.pointmaze.tasks import draw_task, fixed_cells
from wmcache.envs.pointmaze.walks import Navigate, Stitch

THRESHOLDS = (0.5, 0.25, 0.1)


class PointMaze(Environment):
    """Balls in a maze. A state is (x, y, vx, vy), which is also the proprio; distance is that of (x, y).

    The exits that teleporters draw are a function of the start and of the jumps so far.
    """

    forms = ("Maze7x7-SEED", "a .txt grid")
    scene = True
    distractions = ("ball",)
    policies: ClassVar = {"navigate": Navigate, "stitch": Stitch}

    def __init__(self, name: str, count: int = 1, image_size: int = 224, layout: Sequence[str] = ()) -> None:
        """Open a layout by its name (`UMaze`, `Maze7x7-3`), its id or its .txt file; `layout` is a grid."""
        self.maze = self.geometry = Maze(Path(name).stem, tuple(layout)) if layout else find_maze(name)
        self.count = count
        self.spec = EnvSpec(
            env_id(self.maze),
            FPS,
            default_columns(2, 4),
            image_size,
            renders_states=True,
            thresholds=THRESHOLDS,
            dataset=f"pointmaze-{self.maze.name.lower()}",
            layout=self.maze.rows,
        )
        self._simulator = PointMazeSimulator(self.maze, image_size)
        self._states: States = np.zeros((count, 4))
        self._jumps = [generator_of(state) for state in self._states]

    @classmethod
    def accepts(cls, name: str, layout: Sequence[str] = ()) -> bool:
        """Accept ids, random mazes, text files and grids."""
        known = name.startswith(ENV_PREFIX) or GENERATED.fullmatch(name) or Path(name).suffix == ".txt"
        return bool(layout or known)

    def sample_task(self, rng: np.random.Generator, *, goal: bool = True) -> Task:
        """Draw states, see `sample_state`; with teleporters until a path may lead from the start to the goal."""
        start = sample_state(self.maze, rng)
        if not goal:
            return Task(start)
        end = sample_state(self.maze, rng)
        while len(self.maze.exits) and not np.isfinite(self.maze.distance(start, end[None])).all():
            start, end = sample_state(self.maze, rng), sample_state(self.maze, rng)
        return Task(start, end)

    def fixed_tasks(self) -> dict[str, DrawTask]:
        """Return five tasks of this layout, see `tasks.py`."""
        cells = fixed_cells(self.maze)
        return {
            f"{number}: {start} to {goal}": partial(draw_task, start, goal)
            for number, (start, goal) in enumerate(cells, start=1)
        }

    def reset(self, tasks: Sequence[Task]) -> Observation:
        """Start at states; raises MazeError for one in a wall."""
        self._states = np.stack([check_state(self.maze, task.start) for task in tasks])
        self._jumps = [generator_of(state) for state in self._states]
        return self.observe()

    def step(self, actions: NDArray[np.floating]) -> Steps:
        """Push; an episode never ends by itself."""
        states = np.empty((*actions.shape[:2], 4))
        for i, sequence in enumerate(actions):
            for t, action in enumerate(sequence):
                moved = self._simulator.step(self._states[i], action)
                self._states[i] = states[i, t] = self.maze.teleport(moved, self._jumps[i])
        return {"state": states}

    def observe(self) -> Observation:
        """Return frames and states."""
        states = self._states.copy()
        return Observation({"state": states}, self.spec.columns, lambda: self.render(states))

    def render(self, states: States) -> Frames:
        """Draw the maze from above; raises RendererError without OpenGL."""
        return np.stack([self._simulator.render(state) for state in states])

    def draw_looks(self, looks: Sequence[Look], states: States | None = None) -> Frames:
        """Draw the maze from above."""
        drawn = zip(self._states if states is None else states, looks, strict=True)
        return np.stack([self._simulator.render_look(state, look) for state, look in drawn])

    def distance(self, states: States, goal: States) -> States:
        """Compute the distance in (x, y); velocity does not matter (DINO-WM, pointmaze eval)."""
        return np.asarray(np.linalg.norm(states[..., :2] - goal[..., :2], axis=-1))

    def longest_move(self, env_steps: int) -> float:
        """Compute it at full speed and force."""
        return longest_move(env_steps)

    def expert(self) -> Expert:
        """Follow the shortest path."""
        return PathFollower(self.maze).act

    def close(self) -> None:
        """Free the GL context."""
        self._simulator.close()


def generator_of(state: States) -> np.random.Generator:
    """Return the generator of what is random in an episode, a function of its start [4]."""
    return np.random.default_rng(np.frombuffer(state.tobytes(), np.uint32))
