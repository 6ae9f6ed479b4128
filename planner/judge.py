"""The judge: computes success and directness from recorded states, after all episodes have ended."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from wmcache.envs import Maze
from wmcache.planner.episodes import Episodes

THRESHOLDS = (0.5, 0.25, 0.1)


def reported_thresholds(threshold: float) -> list[float]:
    """List the thresholds that an evaluation reports: `THRESHOLDS` and its own, the largest first."""
    return sorted({*THRESHOLDS, threshold}, reverse=True)


def judge(
    episodes: Episodes, threshold: float, maze: Maze, shortest: NDArray[np.float64] | None = None
) -> dict[str, Any]:
    """Judge episodes by one threshold, a distance in (x, y) to the goal.

    Args:
        shortest: result of `shortest_path_lengths`; computed when it is None.

    Returns:
        `successes`: episodes within the threshold at the end of some executed chunk, with `success_rate` and Wilson's interval `ci95`.
        `mean_env_steps`: env steps until then; the whole budget for an episode that never arrives. `held`, `held_rate`, `held_ci95`:
        episodes within the threshold at the end of the budget. `path_ratio`: path length of the successes over their shortest path
        length, None without a success. `spl`: success weighted by the inverse of that ratio, per episode (arXiv 1807.06757).
    """
    close = episodes.distances() < threshold
    reached = close.any(1)
    count, successes, held = len(close), int(reached.sum()), int(close[:, -1].sum())
    shortest = shortest_path_lengths(episodes, maze) if shortest is None else shortest
    needed = np.maximum(0.0, shortest - threshold)[reached]
    taken = path_lengths(episodes, threshold)[reached]
    inverse = np.where(needed > 0, needed / np.maximum(taken, np.maximum(needed, 1e-9)), 1.0)
    return {
        "threshold": threshold,
        "successes": successes,
        "success_rate": successes / count,
        "ci95": wilson(successes, count),
        "mean_env_steps": float(env_steps(episodes, threshold).mean()),
        "held": held,
        "held_rate": held / count,
        "held_ci95": wilson(held, count),
        "path_ratio": float(taken.sum() / needed.sum()) if needed.any() else None,
        "spl": float(inverse.sum()) / count,
    }


def wilson(successes: int, count: int) -> list[float]:
    """Compute Wilson's 95 % interval of a rate."""
    interval = binomtest(successes, count).proportion_ci(method="wilson")
    return [interval.low, interval.high]


def count_at_goal(episodes: Episodes, threshold: float) -> int:
    """Count the episodes that started within `threshold` of their goal."""
    return int((np.linalg.norm(episodes.start[:, :2] - episodes.goal[:, :2], axis=1) < threshold).sum())


def env_steps(episodes: Episodes, threshold: float) -> NDArray[np.int64]:
    """Count env steps until the end of the first chunk within `threshold`, [E]; the budget without one."""
    close = episodes.distances() < threshold
    steps: NDArray[np.int64] = np.where(close.any(1), episodes.chunk_ends()[close.argmax(1)], episodes.states.shape[1])
    return steps


def path_lengths(episodes: Episodes, threshold: float) -> NDArray[np.float64]:
    """Measure the path of each episode until `env_steps`, [E]."""
    lengths = np.empty(len(episodes.start))
    for i, steps in enumerate(env_steps(episodes, threshold)):
        path = np.concatenate([episodes.start[i : i + 1, :2], episodes.states[i, :steps, :2]])
        lengths[i] = np.linalg.norm(np.diff(path, axis=0), axis=1).sum()
    return lengths


def shortest_path_lengths(episodes: Episodes, maze: Maze) -> NDArray[np.float64]:
    """Measure the shortest path through the maze from start to goal, [E]."""
    pairs = zip(episodes.start, episodes.goal, strict=True)
    return np.array([maze.geodesic(start[:2], goal[None, :2])[0] for start, goal in pairs])
