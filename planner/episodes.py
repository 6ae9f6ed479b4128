"""Recorded episodes: what the judge and the report read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
        offset = self.states[:, self.chunk_ends() - 1, :2] - self.goal[:, None, :2]
        return np.asarray(np.linalg.norm(offset, axis=-1))

    def chunk_ends(self) -> NDArray[np.int64]:
        """List the env steps after which a chunk ended, [chunks]; the last is the budget."""
        budget = self.states.shape[1]
        return np.minimum(np.arange(self.chunk, budget + self.chunk, self.chunk), budget)

    def save(self, file: Path) -> None:
        """Write a finished batch, atomically."""
        with atomic_write(file) as stream:
            np.savez(stream, allow_pickle=False, **{name: np.asarray(value) for name, value in vars(self).items()})

    @classmethod
    def load(cls, files: Iterable[Path]) -> Episodes:
        """Read files of `save`, and join their episodes."""
        return cls.join([cls._read(file) for file in files])

    @classmethod
    def join(cls, parts: Sequence[Episodes]) -> Episodes:
        """Join the episodes of several batches."""
        joined: dict[str, Any] = {
            name: np.concatenate([getattr(part, name) for part in parts]) for name in ("start", "goal", "states")
        }
        joined |= {
            name: sum(getattr(part, name) for part in parts) for name in ("encoder_frames", "replans", "seconds")
        }
        return cls(chunk=parts[0].chunk, **joined)

    @classmethod
    def _read(cls, file: Path) -> Episodes:
        with np.load(file) as arrays:
            return cls(**{name: array if array.ndim else array.item() for name, array in arrays.items()})
