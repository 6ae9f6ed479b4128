"""Who starts where, and what the goal is (DINO-WM, planning/evaluator.py and plan.py: goal_source)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from wmcache.cache.errors import UserError
from wmcache.cache.store import TokenStore
from wmcache.cache.windows import split_episodes, window_starts
from wmcache.envs import Maze, PointMazeSimulator, sample_state

SOURCES = ("random-state", "dataset", "random-action")
States = NDArray[np.float64]


def start_and_goal(
    source: str, numbers: Sequence[int], maze: Maze, store: TokenStore, steps: int, split_seed: int = 42
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

    Returns:
        float64 [E, 4] each.

    Raises:
        UserError: an unknown source, an unusable file, episodes that are too short, or places in a wall.
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
    for number in numbers:
        rng = np.random.default_rng(99 * number + 1)
        if source == "dataset":
            first = int(rng.choice(candidates))
            start, goal = store.state[first], store.state[first + steps]
        else:
            start = sample_state(maze, rng)
            goal = sample_state(maze, rng) if source == "random-state" else start
            for action in rng.normal(size=(steps if source == "random-action" else 0, 2)):
                goal = simulator.step(goal, action)
        starts.append(np.asarray(start, np.float64))
        goals.append(np.asarray(goal, np.float64))
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
