"""The step table of a frame dataset."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from wmcache.common.errors import UserError
from wmcache.common.paths import AnyPath, open_to_read
from wmcache.common.reading import reading


@dataclass(frozen=True)
class Steps:
    """The step table, one row per frame.

    Attributes:
        episode: int32 [frames], non-decreasing.
        step: int32 [frames], from 0 in each episode.
        action: float32 [frames, A], taken at that frame.
        state: float64 [frames, S]; float64, so that the frame can be drawn again exactly.
    """

    episode: NDArray[np.int32]
    step: NDArray[np.int32]
    action: NDArray[np.float32]
    state: NDArray[np.float64]

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.episode)

    def in_order(self) -> bool:
        """Return whether episodes and steps count up, and every number is finite."""
        new = np.diff(self.episode, prepend=-1)
        step = np.where(new == 1, 0, np.roll(self.step, 1) + 1)
        finite = np.isfinite(self.action).all() and np.isfinite(self.state).all()
        return bool(finite and np.isin(new, (0, 1)).all() and (self.step == step).all() and len(self) > 0)

    def columns(self) -> dict[str, NDArray[Any]]:
        """Return the columns of a token store."""
        return {"action": self.action, "state": self.state, "episode": self.episode, "step": self.step}

    def key(self, frame: int) -> str:
        """Return the frame's key in the tar shards."""
        return f"{self.episode[frame]:06d}-{self.step[frame]:05d}"

    def sha256(self) -> str:
        """SHA-256 over the values; the bytes of the Parquet file depend on pyarrow's version."""
        digest = hashlib.sha256()
        for array in (self.episode, self.step, self.action, self.state):
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def to_table(self) -> pa.Table:
        """Make the Parquet table."""
        columns = {"episode": pa.array(self.episode), "step": pa.array(self.step)}
        for name, array in (("action", self.action), ("state", self.state)):
            columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(array.ravel()), array.shape[1])
        return pa.table(columns)

    @classmethod
    def from_table(cls, table: pa.Table) -> Steps:
        """Read the Parquet table; raises KeyError for a missing column."""

        def matrix(name: str, dtype: type[np.generic]) -> NDArray[Any]:
            column = table[name].combine_chunks()
            return np.asarray(column.flatten(), dtype=dtype).reshape(len(table), -1)

        return cls(
            np.asarray(table["episode"], dtype=np.int32),
            np.asarray(table["step"], dtype=np.int32),
            matrix("action", np.float32),
            matrix("state", np.float64),
        )


def read_steps(path: AnyPath, frames: int | None = None) -> Steps:
    """Read the step table of a dataset; raises UserError if it is missing or damaged, or does not have `frames` rows."""
    file, hint = path / "steps.parquet", "restore it, or make the dataset under another --out"
    with reading(file, f"{file} cannot be read", hint), open_to_read(file) as stream:
        table = pq.ParquetFile(stream)
        if frames not in (None, rows := table.metadata.num_rows):
            raise UserError(f"{file} has {rows} rows for {frames} frames; {hint}")
        return Steps.from_table(table.read())
