"""The landscape of latent distances: whether a planner can descend the squared token distance to a goal in a maze."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from tqdm import tqdm

from wmcache.cache.store import TokenStore
from wmcache.cache.windows import split_frames
from wmcache.common.errors import UserError
from wmcache.common.landscapes import descend
from wmcache.common.paths import AnyPath
from wmcache.common.progress import seconds_between_updates
from wmcache.envs import Maze, MazeError
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.extract import read_for
from wmcache.pipeline.frames import FrameDataset

PROBED_FRAMES = 1000
PROBED_GOALS = 40
STEP_DISTANCE = 0.5
STUCK_DISTANCE = 0.5
"""Distances in the maze, where a cell is 1 wide: of a step of the descent, and from the goal at its end."""

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Landscape:
    """Figures of held-out frames.

    Attributes:
        spearman: rank correlation of token distance and true geodesic distance over pairs of frames; None if all distances are equal.
        stuck: share of frames from which descent over neighbouring frames does not end at the goal.
    """

    spearman: float | None
    stuck: float


def probe_landscape(dataset: FrameDataset, encoder: Encoder) -> Landscape:
    """Measure an encoder on held-out frames of a dataset with a maze."""
    held_out = split_frames(dataset.steps.episode, "val")
    chosen = np.sort(np.random.default_rng(0).choice(held_out, min(PROBED_FRAMES, len(held_out)), replace=False))
    frames = read_for(encoder, dataset, chosen)
    parts = np.array_split(frames, max(1, len(frames) // 64))
    tokens = torch.cat([encoder(part).float().cpu() for part in parts]).flatten(1).double().numpy()
    maze = make_maze(dataset.card.name, dataset.card.maze, dataset.path)
    return measure_landscape(squared_distances(tokens, tokens), dataset.steps.state[chosen, :2], maze)


def measure_landscape(distances: NDArray[np.floating], xy: Float, maze: Maze) -> Landscape:
    """Measure squared token distances [n, n] between frames at the positions xy [n, 2] of a maze."""
    goals = np.random.default_rng(0).choice(len(xy), min(PROBED_GOALS, len(xy)), replace=False)
    latent, update = distances[goals], seconds_between_updates()
    with tqdm(goals, desc="distances", unit=" goals", delay=2, leave=False, mininterval=update) as bar:
        true = np.stack([maze.geodesic(xy[goal], xy) for goal in bar])
    reachable = np.isfinite(true)
    near = neighbours(maze, xy)
    ends = [descend(values, near) for values in latent]
    stuck = [(true[i, end] > STUCK_DISTANCE)[reachable[i]].mean() for i, end in enumerate(ends)]
    return Landscape(rank_correlation(latent[reachable], true[reachable]), float(np.mean(stuck)))


def rank_correlation(values: NDArray[np.floating], others: NDArray[np.floating]) -> float | None:
    """Spearman's rank correlation of [n] and [n]; None if one of them is constant."""
    if not (np.ptp(values) and np.ptp(others)):
        return None
    return float(spearmanr(values, others).statistic)


def squared_distances(points: Float, others: Float) -> Float:
    """[n, k], [m, k] -> [n, m]."""
    from sklearn.metrics.pairwise import euclidean_distances

    distances: Float = euclidean_distances(points, others, squared=True)
    return distances


def neighbours(maze: Maze, xy: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which positions see each other within STEP_DISTANCE, [n, n]."""
    near: NDArray[np.bool_] = np.linalg.norm(xy[:, None] - xy, axis=-1) < STEP_DISTANCE
    for share in (0.25, 0.5, 0.75):
        near &= maze.is_clear(share * xy[:, None] + (1 - share) * xy, 0.0)
    return near


def find_maze(store: TokenStore, dataset: AnyPath | None = None) -> Maze | None:
    """The maze of a store's frames, from its card or else from its dataset; None for frames without one."""
    name, rows = store.card.dataset.get("name", ""), store.card.dataset.get("maze")
    if dataset is not None:
        frames = FrameDataset.open(dataset)
        if frames.card.fingerprint != store.identity.dataset_fingerprint:
            raise UserError(f"{dataset} does not contain the frames of {store.path}; pass the right --dataset")
        rows = rows or frames.card.maze
    return make_maze(str(name), rows, store.path) if rows and store.state.shape[1] >= 2 else None


def make_maze(name: str, rows: Any, where: AnyPath | str) -> Maze:
    """Build the maze of a card; raises UserError for an invalid one."""
    try:
        return Maze(name, tuple(rows))
    except (MazeError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: the maze in its card is invalid ({error}); extract or import it again") from error
