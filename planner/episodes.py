"""Recorded episodes: what the judge and the report read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmcache.common.files import atomic_write

Distance = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]
"""States [..., S] and goals [..., S] -> what the judge compares with thresholds."""


@dataclass(frozen=True)
class Episodes:
    """Recorded episodes, for the judge and the report.

    Attributes:
        start, goal: float64 [E, S]; a goal is [E, 0] where success is a return.
        states: float64 [E, budget, S], after each env step.
        chunk: env steps between replans.
        encoder_frames, replans: counts over all episodes.
        seconds: spent on encoding live frames and planning.
        distance: the environment's; not saved.
        rewards: float64 [E, budget] of each env step; [E, 0] where there are none.
        actions: float32 [E, budget, A], to replay episodes whose states cannot be drawn; else [E, 0, 0].
    """

    start: NDArray[np.float64]
    goal: NDArray[np.float64]
    states: NDArray[np.float64]
    chunk: int
    encoder_frames: int
    replans: int
    seconds: float
    distance: Distance
    rewards: NDArray[np.float64] = field(default_factory=lambda: np.zeros((1, 0)))
    actions: NDArray[np.float32] = field(default_factory=lambda: np.zeros((1, 0, 0), np.float32))

    def distances(self) -> NDArray[np.float64]:
        """Compute the distance to the goal at the end of every executed chunk, [E, chunks]."""
        return self.distance(self.states[:, self.chunk_ends() - 1], self.goal[:, None])

    def chunk_ends(self) -> NDArray[np.int64]:
        """List the env steps after which a chunk ended, [chunks]; the last is the budget."""
        budget = self.states.shape[1]
        return np.minimum(np.arange(self.chunk, budget + self.chunk, self.chunk), budget)

    def save(self, file: Path) -> None:
        """Write a finished batch, atomically."""
        with atomic_write(file) as stream:
            saved = {name: np.asarray(value) for name, value in vars(self).items() if name != "distance"}
            np.savez(stream, allow_pickle=False, **saved)

    @classmethod
    def load(cls, files: Iterable[Path], distance: Distance) -> Episodes:
        """Read files of `save`, and join their episodes."""
        return cls.join([cls._read(file, distance) for file in files])

    @classmethod
    def join(cls, parts: Sequence[Episodes]) -> Episodes:
        """Join the episodes of several batches."""
        joined: dict[str, Any] = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("start", "goal", "states", "rewards", "actions")
        }
        joined |= {
            name: sum(getattr(part, name) for part in parts) for name in ("encoder_frames", "replans", "seconds")
        }
        return cls(chunk=parts[0].chunk, distance=parts[0].distance, **joined)

    @classmethod
    def _read(cls, file: Path, distance: Distance) -> Episodes:
        with np.load(file) as arrays:
            saved = {name: array if array.ndim else array.item() for name, array in arrays.items()}
            return cls(**saved, distance=distance)
