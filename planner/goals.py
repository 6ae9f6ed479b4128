"""Who starts where, and what the goal is (DINO-WM, planning/evaluator.py and plan.py: goal_source)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from wmcache.cache.store import TokenStore
from wmcache.cache.windows import split_episodes, window_starts
from wmcache.common.errors import UserError
from wmcache.envs import Maze, PointMazeSimulator, sample_state

SOURCES = ("random-state", "dataset", "random-action")
MAX_DRAWS = 2000
"""Pairs that are drawn for an episode before none is taken to be far enough apart."""

States = NDArray[np.float64]


@dataclass(frozen=True)
class Apart:
    """How far apart start and goal are at least.

    An episode that begins at its goal, or is carried there by its first model step, says nothing about a planner. So the straight
    distance, which the judge compares with thresholds, is at least `threshold`, and the shortest path through the maze at least
    `threshold` + `step`. The path, not the straight line, because the ball cannot cross walls: of two places on both sides of a wall
    the planner has the longest way to go.

    Attributes:
        threshold: the largest one that is reported.
        step: the largest distance that the ball can cover in one model step, see `envs.longest_move`.
    """

    threshold: float = 0.0
    step: float = 0.0

    def holds(self, maze: Maze, start: States, goal: States) -> bool:
        """Whether states [4] are that far apart."""
        straight, enough = float(np.linalg.norm(start[:2] - goal[:2])), self.threshold + self.step
        if straight >= enough:  # no path is shorter
            return True
        return straight >= self.threshold and float(maze.geodesic(start[:2], goal[None, :2])[0]) >= enough


ANY = Apart()


def start_and_goal(
    source: str,
    numbers: Sequence[int],
    maze: Maze,
    store: TokenStore,
    steps: int,
    split_seed: int = 42,
    apart: Apart = ANY,
) -> tuple[States, States]:
    """Start and goal states of some episodes. Episode n depends on n alone, by a generator of seed 99 n + 1 (DINO-WM, plan.py).

    Args:
        source: `random-state`: places and velocities, both at random. `dataset`: frames of an episode that was not trained on, `steps` env
            steps apart. `random-action`: a random state, and where Gaussian actions lead from it in `steps` env steps. Else a Parquet
            file with columns `start` and `goal`, a state (x, y, vx, vy) in each row, of which episode n takes row n; an
            evaluation's episodes.parquet is one.
        numbers: of the episodes.
        maze: where.
        store: for `dataset`.
        steps: env steps from start to goal, for `dataset` and `random-action`.
        split_seed: of the run's split into train and val episodes.
        apart: pairs that are closer are drawn again, from the same generator; a file's are taken as they are.

    Returns:
        float64 [E, 4] each.

    Raises:
        UserError: an unknown source, an unusable file, episodes that are too short, places in a wall, or no pair that is far enough
            apart.
    """
    if source not in SOURCES:
        return read_states(Path(source), numbers, maze)
    starts, goals = [], []
    if source == "dataset":
        held_out = split_episodes(int(store.episode[-1]) + 1, "val", split_seed)
        candidates, _ = window_starts(store.episode, held_out, steps + 1)
        if not len(candidates):
            raise UserError(f"no held-out episode of {store.path} has {steps + 1} frames; lower --goal-steps")
    simulator = PointMazeSimulator(maze)

    def draw(rng: np.random.Generator) -> tuple[States, States]:
        if source == "dataset":
            first = int(rng.choice(candidates))
            return np.asarray(store.state[first], np.float64), np.asarray(store.state[first + steps], np.float64)
        start = sample_state(maze, rng)
        goal = sample_state(maze, rng) if source == "random-state" else start
        for action in rng.normal(size=(steps if source == "random-action" else 0, 2)):
            goal = simulator.step(goal, action)
        return start, goal

    for number in numbers:
        rng = np.random.default_rng(99 * number + 1)
        for _ in range(MAX_DRAWS):
            start, goal = draw(rng)
            if apart.holds(maze, start, goal):
                break
        else:
            longer = "" if source == "random-state" else "raise --goal-steps, or "
            raise UserError(
                f"--goals {source}: episode {number}: none of {MAX_DRAWS} pairs of maze {maze.name} is {apart.threshold + apart.step:.2f} "
                f"apart (the largest threshold and one model step); {longer}take pairs of any distance with --no-strict"
            )
        starts.append(start)
        goals.append(goal)
    start, goal = np.stack(starts), np.stack(goals)
    if not maze.is_clear(np.concatenate([start, goal])[:, :2], 0.0).all():
        raise UserError(
            f"--goals {source}: some frames of {store.path} show places in walls of maze {maze.name}; choose another --goals"
        )
    return start, goal


def read_states(file: Path, numbers: Sequence[int], maze: Maze) -> tuple[States, States]:
    """Rows of a Parquet file; see `start_and_goal`."""
    try:
        table = pq.read_table(file, columns=["start", "goal"])
        both = [np.array(table[name].to_pylist(), dtype=np.float64) for name in ("start", "goal")]
    except (OSError, KeyError, ValueError, TypeError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"--goals {file} is neither {', '.join(SOURCES)} nor a readable Parquet file with columns start and goal ({reason})"
        ) from error
    for states in both:
        if states.shape != (len(table), 4) or not (np.abs(states) < 1e6).all():
            raise UserError(f"--goals {file}: each start and goal must be 4 finite numbers, x, y, vx, vy")
    if max(numbers) >= len(table):
        raise UserError(f"--goals {file} has {len(table)} rows, episode {max(numbers)} has none; lower --episodes")
    start, goal = (states[list(numbers)] for states in both)
    for states in (start, goal):
        if (walled := ~maze.is_clear(states[:, :2], 0.0)).any():
            row = numbers[int(walled.argmax())]
            raise UserError(f"--goals {file}: row {row} lies in a wall of maze {maze.name}; choose the right --env")
    return start, goal
