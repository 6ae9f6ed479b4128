"""A dataset of stable-worldmodel -> frame dataset: HDF5 (github.com/galilai-group/stable-worldmodel, data/formats/hdf5.py) or Lance.

    ep_len, ep_offset       [episodes]: rows of each episode
    pixels                  uint8 [rows, H, W, C]
    action, …               [rows, …]: any named columns

`World.collect` writes a row for each observation. The action of an episode's last row is NaN. Reward, terminated and truncated are in the
row of the observation that they led to; in a frame dataset they are in the row of the action. A Lance table is read as the same arrays.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from wmcache.common.errors import UserError
from wmcache.common.options import option
from wmcache.pipeline.frames import Frames
from wmcache.pipeline.importers.arrays import Array, choose_image, open_arrays
from wmcache.pipeline.importers.base import IMPORTERS, Source
from wmcache.pipeline.importers.conversions import (
    ACTION,
    PROPRIO,
    ROLES,
    STATE,
    ColumnImporter,
    build_steps,
    describe_columns,
    is_action_missing,
    note,
    number_steps,
)
from wmcache.pipeline.importers.lance import open_lance
from wmcache.pipeline.steps import Steps

INDEX = ("ep_len", "ep_offset")


@IMPORTERS.register("swm")
@dataclass(frozen=True, kw_only=True)
class SwmImporter(ColumnImporter):
    """Import stable-worldmodel's SOURCE, an HDF5 file or the folder of a Lance table."""

    metavar: ClassVar[str] = "SOURCE"
    image_key: str | None = option(None, "Column of images.  [default: pixels, or the only one]")

    def open(self) -> Source:
        """See `Importer.open`; actions are rounded to float32."""
        path = Path(self.source)
        is_table = path.suffix.lower() == ".lance"
        if path.is_dir() and not is_table:
            tables = sorted(found.name for found in path.glob("*.lance"))
            raise UserError(f"{path} is a folder; name a table in it ({', '.join(tables) or 'there is no NAME.lance'})")
        arrays = open_lance(path) if is_table else open_arrays(path)
        if missing := [name for name in INDEX if name not in arrays]:
            raise UserError(f"{path} has no {missing[0]}; it is no dataset of stable-worldmodel")
        lengths, offsets = (arrays[name].read().astype(np.int64) for name in INDEX)
        columns = {name: array for name, array in arrays.items() if name not in INDEX}
        key = choose_image(columns, self.image_key, "pixels", path)
        _require_inside(lengths, offsets, columns, path)
        kept = self.kept((name for name in columns if not columns[name].is_image), path)
        if others := [name for name in columns if columns[name].is_image and name != key]:
            note(f"not imported from {path}: {', '.join(others)}")
        steps = _steps({name: columns[name].read() for name in kept}, lengths, offsets, path)
        images = columns[key]
        size = self.side_of(images.shape[1:], f"{key} of {path}")

        def read(episode: int, wanted: range) -> Iterator[Frames]:
            start = int(offsets[episode])
            rows = images.rows(start + wanted.start, start + wanted.stop)
            for step, row in zip(wanted, rows, strict=True):
                where = f"{key} of {path}, episode {episode}, step {step}"
                yield self.frame_of(row, size, where)

        return Source(path, steps, size, read, f"swm {path.stem}{self.changes}", (), "imported from swm", self.fps)


def _require_inside(
    lengths: NDArray[np.int64], offsets: NDArray[np.int64], columns: dict[str, Array], path: Path
) -> None:
    """Raise UserError unless each episode has rows, in all columns."""
    if lengths.shape != offsets.shape or lengths.ndim != 1 or not len(lengths):
        raise UserError(
            f"{path} has ep_len {lengths.shape} and ep_offset {offsets.shape}; they need a number per episode"
        )
    for name, array in columns.items():
        if len(wrong := np.flatnonzero((lengths < 1) | (offsets < 0) | (offsets + lengths > array.shape[0]))):
            found = f"{lengths[wrong[0]]} rows from {offsets[wrong[0]]} on"
            raise UserError(
                f"{path}: episode {wrong[0]} has {found}, but {name} has {array.shape[0]}; collect it again"
            )


def _steps(
    columns: dict[str, NDArray[Any]], lengths: NDArray[np.int64], offsets: NDArray[np.int64], path: Path
) -> Steps:
    """Make the step table; without the last row of each episode where it has no action."""
    rows = np.concatenate([np.arange(start, start + length) for start, length in zip(offsets, lengths, strict=True)])
    sources = {re.sub(r"\W", "_", name): name for name in columns}
    values = {plain: columns[name][rows] for plain, name in sources.items()}
    if len(values) < len(columns):
        raise UserError(f"{path}: two of the columns {', '.join(columns)} have the same name without dots; pass --drop")
    ends = np.cumsum(lengths) - 1
    action = values.get("action")
    if action is not None and action.ndim == 2 and action.dtype.kind == "f":
        missing = is_action_missing(action[ends])
        if missing.any():
            if not missing.all():
                episode = int(np.flatnonzero(~missing)[0])
                raise UserError(
                    f"{path}: episode {episode} has an action in its last row, other episodes have not; split the file"
                )
            if (lengths == 1).any():
                alone = int(np.flatnonzero(lengths == 1)[0])
                raise UserError(f"{path}: episode {alone} has one row, without an action; leave it out of the file")
            values = _of_actions(values, ends)
            lengths = lengths - 1
            note(f"episodes of {path} end in a row without an action, which is not imported")
    roles = {**ROLES, "action": ACTION, "proprio": PROPRIO, "observation": PROPRIO}
    roles["state"] = STATE if "proprio" not in values else STATE[:1]
    numbers = number_steps(lengths.tolist(), path)
    return build_steps(*numbers, values, describe_columns(values, roles, path, sources), path)


def _of_actions(values: dict[str, NDArray[Any]], ends: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """Remove the last row of each episode; what a step led to moves from the row after it to its own."""
    kept = np.setdiff1d(np.arange(ends[-1] + 1), ends)
    return {name: array[kept + 1] if name in ROLES else array[kept] for name, array in values.items()}
