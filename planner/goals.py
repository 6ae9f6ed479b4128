"""Starts and goals of episodes (DINO-WM, planning/evaluator.py and plan.py: goal_source)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from wmcache.cache.store import TokenStore
from wmcache.cache.windows import window_starts
from wmcache.common.errors import UserError, reason
from wmcache.envs import Maze, PointMazeSimulator, sample_state
from wmcache.planner.options import SOURCES

MAX_DRAWS = 2000
"""Pairs that are drawn for an episode before it is refused."""

States = NDArray[np.float64]
Draw = Callable[[np.random.Generator], tuple[States, States]]


@dataclass(frozen=True)
class Separation:
    """How far apart start and goal are at least, so that no episode begins at its goal or arrives with its first model step.

    The straight distance, which the judge compares with thresholds, is at least `threshold`, the largest one that is reported. The shortest
    path through the maze is at least `threshold` + `step`, the longest move of a model step, see `envs.longest_move`.
    """

    threshold: float = 0.0
    step: float = 0.0

    @property
    def path(self) -> float:
        """The least path length."""
        return self.threshold + self.step

    def allows(self, maze: Maze, start: States, goal: States) -> bool:
        """Return whether states [4] are that far apart."""
        straight = float(np.linalg.norm(start[:2] - goal[:2]))
        if straight >= self.path:  # no path is shorter
            return True
        return straight >= self.threshold and float(maze.geodesic(start[:2], goal[None, :2])[0]) >= self.path


def start_and_goal(
    source: str,
    numbers: Sequence[int],
    maze: Maze,
    store: TokenStore,
    steps: int,
    split_seed: int = 42,
    separation: Separation | None = None,
) -> tuple[States, States]:
    """Return start and goal states of episodes. Episode n depends on n alone, by a generator of seed 99 n + 1 (DINO-WM, plan.py).

    Args:
        source: `random-state`: random positions and velocities. `dataset`: frames of a held-out episode, `steps` env steps apart.
            `random-action`: a random state, and where Gaussian actions lead from it in `steps` env steps. Else a Parquet file with
            columns `start` and `goal`, states (x, y, vx, vy); episode n takes row n. An evaluation's episodes.parquet is such a file.
        steps: env steps from start to goal, for `dataset` and `random-action`.
        separation: closer pairs are drawn again from the same generator. A file's pairs are taken as they are.

    Returns:
        float64 [E, 4] each.
    """
    if source not in SOURCES:
        return _read_states(Path(source), numbers, maze)
    draw = _draw_from(source, maze, store, steps, split_seed)
    separation = separation or Separation()
    start, goal = np.stack([_draw_pair(draw, source, number, maze, separation) for number in numbers], 1)
    if not maze.is_clear(np.concatenate([start, goal])[:, :2], 0.0).all():
        raise UserError(
            f"--goals {source}: frames of {store.path} are in walls of maze {maze.name}; choose another --goals or --env"
        )
    return start, goal


def _draw_from(source: str, maze: Maze, store: TokenStore, steps: int, split_seed: int) -> Draw:
    if source == "dataset":
        candidates, _ = window_starts(store.episode, store.split("val", split_seed), steps + 1)
        if not len(candidates):
            raise UserError(f"no held-out episode of {store.path} has {steps + 1} frames; lower --goal-steps")

        def draw_frames(rng: np.random.Generator) -> tuple[States, States]:
            first = int(rng.choice(candidates))
            return np.asarray(store.require_state()[first], np.float64), np.asarray(
                store.require_state()[first + steps], np.float64
            )

        return draw_frames
    simulator = PointMazeSimulator(maze)

    def draw_states(rng: np.random.Generator) -> tuple[States, States]:
        start = goal = sample_state(maze, rng)
        if source == "random-state":
            return start, sample_state(maze, rng)
        for action in rng.normal(size=(steps, 2)):
            goal = simulator.step(goal, action)
        return start, goal

    return draw_states


def _draw_pair(draw: Draw, source: str, number: int, maze: Maze, separation: Separation) -> tuple[States, States]:
    rng = np.random.default_rng(99 * number + 1)
    for _ in range(MAX_DRAWS):
        start, goal = draw(rng)
        if separation.allows(maze, start, goal):
            return start, goal
    hint = "" if source == "random-state" else "raise --goal-steps, or "
    raise UserError(
        f"--goals {source}: episode {number}: none of {MAX_DRAWS} pairs in maze {maze.name} is {separation.path:.2f} apart, the largest "
        f"threshold and one model step; {hint}draw pairs at any distance with --no-strict"
    )


def _read_states(file: Path, numbers: Sequence[int], maze: Maze) -> tuple[States, States]:
    try:
        table = pq.read_table(file, columns=["start", "goal"])
        both = [np.array(table[name].to_pylist(), dtype=np.float64) for name in ("start", "goal")]
    except (OSError, KeyError, ValueError, TypeError, pa.ArrowException) as error:
        raise UserError(
            f"--goals {file} is neither {', '.join(SOURCES)} nor a Parquet file with columns start and goal: {reason(error)}"
        ) from error
    if any(states.shape != (len(table), 4) or not (np.abs(states) < 1e6).all() for states in both):
        raise UserError(f"--goals {file}: each start and goal must be 4 finite numbers, x, y, vx, vy")
    if max(numbers) >= len(table):
        raise UserError(f"--goals {file} has {len(table)} rows, none for episode {max(numbers)}; lower --episodes")
    start, goal = (states[list(numbers)] for states in both)
    if (walled := ~(maze.is_clear(start[:, :2], 0.0) & maze.is_clear(goal[:, :2], 0.0))).any():
        row = numbers[int(walled.argmax())]
        raise UserError(f"--goals {file}: row {row} is in a wall of maze {maze.name}; choose the right --env")
    return start, goal
