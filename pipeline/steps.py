"""The step table of a frame dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from wmcache.common.columns import Column, Columns, default_columns, described_in_json, fits, join_role, require_columns
from wmcache.common.errors import UserError
from wmcache.common.jsonfiles import json_digest
from wmcache.common.paths import AnyPath, open_to_read
from wmcache.common.reading import reading


@dataclass(frozen=True)
class Steps:
    """The step table, one row per frame.

    Attributes:
        episode: int32 [frames], non-decreasing.
        step: int32 [frames], from 0 in each episode.
        columns: name -> [frames, …]. Columns that draw a frame again are float64, so that it is exact.
        described: name -> what the column is.
    """

    episode: NDArray[np.int32]
    step: NDArray[np.int32]
    columns: dict[str, NDArray[Any]]
    described: dict[str, Column]

    def __post_init__(self) -> None:
        """Raise ValueError where the arrays do not fit their description."""
        require_columns(self.described)
        for name, column in self.described.items():
            values = self.columns[name]
            if not fits(values, column) or len(values) != len(self.episode):
                wanted = f"{column.dtype} {(len(self.episode), *column.shape)}"
                raise ValueError(f"column {name} is {values.dtype} {values.shape}, not {wanted}")

    @classmethod
    def plain(
        cls,
        episode: NDArray[np.int32],
        step: NDArray[np.int32],
        action: NDArray[np.float32],
        state: NDArray[np.float64],
    ) -> Steps:
        """Make a table of actions [frames, A] in [-1, 1] and states [frames, S], which are proprio too."""
        described = default_columns(action.shape[1], state.shape[1])
        return cls(episode, step, {"action": action, "state": state}, described)

    @classmethod
    def join(cls, parts: Sequence[Steps]) -> Steps:
        """Join tables of the same columns, one after another."""
        episode, step = (np.concatenate([getattr(part, name) for part in parts]) for name in ("episode", "step"))
        described = parts[0].described
        return cls(
            episode,
            step,
            {name: np.concatenate([part.columns[name] for part in parts]) for name in described},
            described,
        )

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.episode)

    @property
    def action(self) -> NDArray[np.float32]:
        """float32 [frames, A], taken at that frame; A = 0 where no column is an action."""
        joined = join_role(self.columns, self.described, "action", "float32")
        return np.zeros((len(self), 0), np.float32) if joined is None else joined

    @property
    def state(self) -> NDArray[Any] | None:
        """[frames, S], or None where no column is a state."""
        return join_role(self.columns, self.described, "state")

    @property
    def proprio(self) -> NDArray[np.float32] | None:
        """float32 [frames, P], or None where no column is proprio."""
        return join_role(self.columns, self.described, "proprio", "float32")

    def in_order(self) -> bool:
        """Return whether episodes and steps count up, and every number is finite."""
        new = np.diff(self.episode, prepend=-1)
        step = np.where(new == 1, 0, np.roll(self.step, 1) + 1)
        finite = all(np.isfinite(values).all() for values in self.columns.values())
        return bool(finite and np.isin(new, (0, 1)).all() and (self.step == step).all() and len(self) > 0)

    def store_columns(self) -> dict[str, NDArray[Any]]:
        """Return the columns of a token store."""
        return {**self.columns, "episode": self.episode, "step": self.step}

    def key(self, frame: int) -> str:
        """Return the frame's key in the tar shards."""
        return f"{self.episode[frame]:06d}-{self.step[frame]:05d}"

    def sha256(self) -> str:
        """SHA-256 over values and description; the bytes of the Parquet file depend on pyarrow's version."""
        digest = hashlib.sha256()
        for array in (self.episode, self.step, *(self.columns[name] for name in sorted(self.described))):
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        if described := described_in_json(self.described):
            digest.update(json_digest(described).encode())
        return digest.hexdigest()

    def to_table(self) -> pa.Table:
        """Make the Parquet table: a scalar or a fixed-size list of each column."""
        columns = {"episode": pa.array(self.episode), "step": pa.array(self.step)}
        for name in sorted(self.described):
            values = pa.array(self.columns[name].ravel())
            shape = self.described[name].shape
            columns[name] = pa.FixedSizeListArray.from_arrays(values, self.described[name].width) if shape else values
        return pa.table(columns)

    @classmethod
    def from_table(cls, table: pa.Table, described: Columns | None) -> Steps:
        """Read the Parquet table; `described` is None for the default columns. Raises KeyError for a missing column."""

        def values(name: str, dtype: str, *, nested: bool = True) -> NDArray[Any]:
            column = table[name].combine_chunks()
            return np.asarray(column.flatten() if nested else column, dtype=dtype)

        if described is not None:
            known = dict(described)
            columns = {
                name: values(name, column.dtype, nested=bool(column.shape)).reshape(len(table), *column.shape)
                for name, column in known.items()
            }
        else:
            columns = {
                "action": values("action", "float32").reshape(len(table), -1),
                "state": values("state", "float64").reshape(len(table), -1),
            }
            known = default_columns(columns["action"].shape[1], columns["state"].shape[1])
        episode, step = (np.asarray(table[name], dtype=np.int32) for name in ("episode", "step"))
        return cls(episode, step, columns, known)


def read_steps(path: AnyPath, frames: int | None = None, described: Columns | None = None) -> Steps:
    """Read the step table of a dataset with the columns that its card describes.

    Raises:
        UserError: it is missing or damaged, or does not have `frames` rows.
    """
    file, hint = path / "steps.parquet", "restore it, or make the dataset under another --out"
    with reading(file, f"{file} cannot be read", hint), open_to_read(file) as stream:
        table = pq.ParquetFile(stream)
        if frames not in (None, rows := table.metadata.num_rows):
            raise UserError(f"{file} has {rows} rows for {frames} frames; {hint}")
        return Steps.from_table(read_rows(table), described)


def read_rows(table: pq.ParquetFile) -> pa.Table:
    """Read all rows of an open file. Other threads could still hold it when the interpreter ends, which then aborts now and then."""
    return table.read(use_threads=False)
