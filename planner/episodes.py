"""Recorded episodes, in memory and on disk."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmcache.common.files import atomic_write


@dataclass(frozen=True)
class Episodes:
    """Recorded episodes, for the judge and the report.

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
        """Compute the distance in (x, y) to the goal at the end of every executed chunk, [E, chunks]."""
        ends = self.chunk_ends() - 1
        distance: NDArray[np.float64] = np.linalg.norm(self.states[:, ends, :2] - self.goal[:, None, :2], axis=-1)
        return distance

    def chunk_ends(self) -> NDArray[np.int64]:
        """List the env steps after which a chunk ended, [chunks]; the last is the budget."""
        budget = self.states.shape[1]
        return np.minimum(np.arange(self.chunk, budget + self.chunk, self.chunk), budget)


def save_episodes(file: Path, episodes: Episodes) -> None:
    """Write a finished batch, atomically."""
    with atomic_write(file) as stream:
        arrays = {field.name: np.asarray(getattr(episodes, field.name)) for field in fields(episodes)}
        np.savez(stream, allow_pickle=False, **arrays)


def load_episodes(file: Path) -> Episodes:
    """Read a file of `save_episodes`."""
    with np.load(file) as arrays:
        values = {name: array if array.ndim else array.item() for name, array in arrays.items()}
    return Episodes(**values)


def join(parts: list[Episodes]) -> Episodes:
    """Join several batches of episodes."""
    columns = {field.name: [getattr(part, field.name) for part in parts] for field in fields(Episodes)}
    arrays: dict[str, Any] = {name: np.concatenate(columns[name]) for name in ("start", "goal", "states")}
    return replace(
        parts[0], **arrays, **{name: sum(columns[name]) for name in ("encoder_frames", "replans", "seconds")}
    )
