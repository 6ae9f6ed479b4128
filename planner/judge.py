"""The judge: computes success and directness from recorded states, after all episodes have ended."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest
from scipy.stats import t as student

from wmcache.envs import Geometry
from wmcache.planner.episodes import Episodes


def reported_thresholds(usual: Sequence[float], threshold: float | None) -> list[float]:
    """List the thresholds that an evaluation reports: the environment's and its own, the largest first."""
    return sorted({*usual, *([] if threshold is None else [threshold])}, reverse=True)


def judge(
    episodes: Episodes, threshold: float, geometry: Geometry | None, shortest: NDArray[np.float64] | None = None
) -> dict[str, Any]:
    """Judge episodes by one threshold, a distance to the goal.

    Args:
        geometry: of the environment; None where it is not known.
        shortest: result of `shortest_path_lengths`; computed when it is None.

    Returns:
        `successes`: episodes within the threshold at the end of some executed chunk, with `success_rate` and Wilson's interval `ci95`.
        `mean_env_steps`: env steps until then; the whole budget for an episode that never arrives. `held`, `held_rate`, `held_ci95`:
        episodes within the threshold at the end of the budget. `path_ratio`: path length of the successes over their shortest path
        length, None without a success. `spl`: success weighted by the inverse of that ratio, per episode (arXiv 1807.06757). Both are
        None without a geometry. `mean_distance`: to the goal at the end of the budget, whatever the threshold.
    """
    distances = episodes.distances()
    close = distances < threshold
    reached = close.any(1)
    count, successes, held = len(close), int(reached.sum()), int(close[:, -1].sum())
    return {
        "threshold": threshold,
        "successes": successes,
        "success_rate": successes / count,
        "ci95": wilson(successes, count),
        "mean_env_steps": float(env_steps(episodes, threshold).mean()),
        "held": held,
        "held_rate": held / count,
        "held_ci95": wilson(held, count),
        "mean_distance": float(distances[:, -1].mean()),
        **_directness(episodes, threshold, geometry, shortest),
    }


def _directness(
    episodes: Episodes, threshold: float, geometry: Geometry | None, shortest: NDArray[np.float64] | None
) -> dict[str, float | None]:
    if geometry is None:
        return {"path_ratio": None, "spl": None}
    reached = np.asarray((episodes.distances() < threshold).any(1))
    shortest = shortest_path_lengths(episodes, geometry) if shortest is None else shortest
    needed = np.maximum(0.0, shortest - threshold)[reached]
    taken = path_lengths(episodes, threshold, geometry)[reached]
    inverse = np.where(needed > 0, needed / np.maximum(taken, np.maximum(needed, 1e-9)), 1.0)
    ratio = float(taken.sum() / needed.sum()) if needed.any() else None
    return {"path_ratio": ratio, "spl": float(inverse.sum()) / len(reached)}


def judge_by_task(episodes: Episodes, threshold: float, tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Count successes as `judge` does, and `episodes`, by the name of each episode's task [E]."""
    close, found = episodes.distances() < threshold, {}
    for name in dict.fromkeys(tasks):
        own = close[[task == name for task in tasks]]
        count, successes, held = len(own), int(own.any(1).sum()), int(own[:, -1].sum())
        found[name] = {
            "episodes": count,
            "successes": successes,
            "ci95": wilson(successes, count),
            "held": held,
            "held_ci95": wilson(held, count),
        }
    return found


def judge_return(episodes: Episodes) -> dict[str, Any]:
    """Judge episodes by the sum of their rewards, see `mean_of`."""
    return mean_of(episodes.rewards.sum(1))


def mean_of(values: NDArray[np.float64]) -> dict[str, Any]:
    """Compute `mean` of values [n] with Student's 95 % interval `ci95` (None of one value), `lowest` and `highest`."""
    mean, count, interval = float(values.mean()), len(values), None
    if count > 1:
        half = float(student.ppf(0.975, count - 1)) * float(values.std(ddof=1)) / math.sqrt(count)
        interval = [mean - half, mean + half]
    return {"mean": mean, "ci95": interval, "lowest": float(values.min()), "highest": float(values.max())}


def wilson(successes: int, count: int) -> list[float]:
    """Compute Wilson's 95 % interval of a rate."""
    interval = binomtest(successes, count).proportion_ci(method="wilson")
    return [interval.low, interval.high]


def count_at_goal(episodes: Episodes, threshold: float) -> int:
    """Count the episodes that started within `threshold` of their goal."""
    return int((episodes.distance(episodes.start, episodes.goal) < threshold).sum())


def env_steps(episodes: Episodes, threshold: float) -> NDArray[np.int64]:
    """Count env steps until the end of the first chunk within `threshold`, [E]; the budget without one."""
    close = episodes.distances() < threshold
    steps: NDArray[np.int64] = np.where(close.any(1), episodes.chunk_ends()[close.argmax(1)], episodes.states.shape[1])
    return steps


def path_lengths(episodes: Episodes, threshold: float, geometry: Geometry) -> NDArray[np.float64]:
    """Measure the path of each episode until `env_steps`, [E]."""
    lengths = np.empty(len(episodes.start))
    for i, steps in enumerate(env_steps(episodes, threshold)):
        path = geometry.position(np.concatenate([episodes.start[i : i + 1], episodes.states[i, :steps]]))
        lengths[i] = geometry.path_length(path)
    return lengths


def shortest_path_lengths(episodes: Episodes, geometry: Geometry) -> NDArray[np.float64]:
    """Measure the shortest path from start to goal, [E]."""
    pairs = zip(episodes.start, episodes.goal, strict=True)
    return np.array([geometry.distance(start, goal[None])[0] for start, goal in pairs])
