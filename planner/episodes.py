"""What happened in planned episodes, on disk and before the judge. Success is read from recorded states, when all is over."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from wmcache.common.files import atomic_write
from wmcache.envs import Maze

THRESHOLDS = (0.5, 0.25, 0.1)


@dataclass(frozen=True)
class Episodes:
    """What happened, for the judge and the report.

    Attributes:
        start, goal: float64 [E, 4].
        states: float64 [E, budget, 4], after each env step.
        chunk: env steps between replans.
        encoder_frames, replans: counts over all episodes.
        seconds: spent on encoding live frames and planning.
    """

    start: NDArray[np.float64]
    goal: NDArray[np.float64]
    states: NDArray[np.float64]
    chunk: int
    encoder_frames: int
    replans: int
    seconds: float

    def distances(self) -> NDArray[np.float64]:
        """Distance in (x, y) to the goal at the end of every executed chunk, [E, chunks]."""
        ends = self.chunk_ends() - 1
        distance: NDArray[np.float64] = np.linalg.norm(self.states[:, ends, :2] - self.goal[:, None, :2], axis=-1)
        return distance

    def chunk_ends(self) -> NDArray[np.int64]:
        """Env steps after which a chunk ended, [chunks]; the last is the budget."""
        budget = self.states.shape[1]
        return np.minimum(np.arange(self.chunk, budget + self.chunk, self.chunk), budget)


def save_episodes(file: Path, episodes: Episodes) -> None:
    """Write a finished batch, atomically."""
    with atomic_write(file) as stream:
        arrays = {field.name: np.asarray(getattr(episodes, field.name)) for field in fields(episodes)}
        np.savez(stream, allow_pickle=False, **arrays)


def load_episodes(file: Path) -> Episodes:
    """Read what `save_episodes` wrote."""
    with np.load(file) as arrays:
        values = {name: array if array.ndim else array.item() for name, array in arrays.items()}
    return Episodes(**values)


def join(parts: list[Episodes]) -> Episodes:
    """Several batches of episodes as one."""
    return Episodes(
        start=np.concatenate([part.start for part in parts]),
        goal=np.concatenate([part.goal for part in parts]),
        states=np.concatenate([part.states for part in parts]),
        chunk=parts[0].chunk,
        encoder_frames=sum(part.encoder_frames for part in parts),
        replans=sum(part.replans for part in parts),
        seconds=sum(part.seconds for part in parts),
    )


def began_at_goal(episodes: Episodes, threshold: float) -> int:
    """How many episodes started within `threshold` of their goal."""
    return int((np.linalg.norm(episodes.start[:, :2] - episodes.goal[:, :2], axis=1) < threshold).sum())


def thresholds_of(threshold: float) -> list[float]:
    """The thresholds that are reported beside an evaluation's own, the largest first."""
    return sorted({*THRESHOLDS, threshold}, reverse=True)


def judge(
    episodes: Episodes, threshold: float, maze: Maze, shortest: NDArray[np.float64] | None = None
) -> dict[str, Any]:
    """Success at one threshold, from the recorded states.

    Args:
        episodes: what happened. threshold: distance to the goal. maze: where.
        shortest: of `shortest_ways`, where that is known already.

    Returns:
        successes: episodes within `threshold` of the goal at the end of some executed chunk. success_rate, ci95: of those, with
        Wilson's interval. mean_env_steps: until then; an episode that never arrives counts with its whole budget. held, held_ci95:
        episodes within `threshold` at the end of the budget. path_ratio: length of the ways that the successes took over that of their
        shortest (None without a success); spl: success weighted by the inverse of that ratio, episode by episode (arXiv 1807.06757).
    """
    close = episodes.distances() < threshold
    reached = close.any(1)
    count, successes, held = len(close), int(reached.sum()), int(close[:, -1].sum())
    taken, shortest = (lengths[reached] for lengths in ways(episodes, threshold, maze, shortest))
    inverse = np.where(shortest > 0, shortest / np.maximum(taken, np.maximum(shortest, 1e-9)), 1.0)
    return {
        "threshold": threshold,
        "successes": successes,
        "success_rate": successes / count,
        "ci95": wilson(successes, count),
        "mean_env_steps": float(env_steps(episodes, threshold).mean()),
        "held": held,
        "held_rate": held / count,
        "held_ci95": wilson(held, count),
        "path_ratio": float(taken.sum() / shortest.sum()) if shortest.any() else None,
        "spl": float(inverse.sum()) / count,
    }


def wilson(successes: int, count: int) -> list[float]:
    """Wilson's 95 % interval of a rate."""
    interval = binomtest(successes, count).proportion_ci(method="wilson")
    return [interval.low, interval.high]


def env_steps(episodes: Episodes, threshold: float) -> NDArray[np.int64]:
    """Env steps until the end of the first chunk within `threshold`, [E]; the budget where there is none."""
    close = episodes.distances() < threshold
    steps: NDArray[np.int64] = np.where(close.any(1), episodes.chunk_ends()[close.argmax(1)], episodes.states.shape[1])
    return steps


def ways(
    episodes: Episodes, threshold: float, maze: Maze, shortest: NDArray[np.float64] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Length of the way until `env_steps`, and of the shortest to within `threshold` of the goal, [E] each; 0 for who starts there."""
    taken = np.empty(len(episodes.start))
    for i, steps in enumerate(env_steps(episodes, threshold)):
        way = np.concatenate([episodes.start[i : i + 1, :2], episodes.states[i, :steps, :2]])
        taken[i] = np.linalg.norm(np.diff(way, axis=0), axis=1).sum()
    shortest = shortest_ways(episodes, maze) if shortest is None else shortest
    return taken, np.maximum(0.0, shortest - threshold)


def shortest_ways(episodes: Episodes, maze: Maze) -> NDArray[np.float64]:
    """Length of the shortest way from start to goal, [E]."""
    ways = [
        maze.geodesic(start[:2], goal[None, :2])[0] for start, goal in zip(episodes.start, episodes.goal, strict=True)
    ]
    return np.array(ways)
