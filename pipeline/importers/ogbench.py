"""A file of OGBench or D4RL with images -> frame dataset.

    observations            uint8 [rows, H, W, C]
    actions                 [rows, A]
    terminals               [rows]: OGBench: the last row of an episode. D4RL: the task ended with that step.
    timeouts                [rows]: D4RL: the last row of an episode that goes on
    rewards, qpos, qvel, …  [rows, …]: any named columns

OGBench: github.com/seohongpark/ogbench, ogbench/utils.py. D4RL: github.com/Farama-Foundation/D4RL, d4rl/offline_env.py.
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
from wmcache.pipeline.importers.arrays import choose_image, open_arrays
from wmcache.pipeline.importers.base import IMPORTERS, Source
from wmcache.pipeline.importers.conversions import (
    ACTION,
    ROLES,
    ColumnImporter,
    build_steps,
    describe_columns,
    note,
    number_steps,
)

NAMES = {"actions": "action", "rewards": "reward", "timeouts": "truncated"}
STATE = re.compile(r"(infos/)?(qpos|qvel)")
"""What the simulator was in; the policies of these benchmarks do not see it beside an image."""


@IMPORTERS.register("ogbench")
@dataclass(frozen=True, kw_only=True)
class OgbenchImporter(ColumnImporter):
    """Import a visual dataset of OGBench or D4RL, a .npz or .hdf5 FILE."""

    metavar: ClassVar[str] = "FILE"
    image_key: str | None = option(None, "Array of images.  [default: observations, or the only one]")

    def open(self) -> Source:
        """See `Importer.open`; actions are rounded to float32."""
        path = Path(self.source)
        arrays = open_arrays(path)
        key = choose_image(arrays, self.image_key, "observations", path)
        if "terminals" not in arrays:
            raise UserError(f"{path} has no terminals, which end its episodes")
        count = arrays["terminals"].shape[0]
        fitting = [name for name, array in arrays.items() if array.shape[0] == count]
        if arrays[key].shape[0] != count:
            raise UserError(f"{path}: {key} has {arrays[key].shape[0]} rows, terminals {count}; get the file again")
        images = [name for name in fitting if arrays[name].is_image]
        if others := [name for name in arrays if name not in fitting or (name in images and name != key)]:
            note(f"not imported from {path}: {', '.join(others)} (other images, or no row per frame)")
        kept = self.kept((name for name in fitting if name not in images), path)
        if "terminals" not in kept:
            raise UserError(f"--drop terminals: they end the episodes of {path}; leave it out")
        values = {name: arrays[name].read() for name in kept}
        lengths = _lengths(values, path)
        columns, roles, sources = _columns(values, path)
        described = describe_columns(columns, roles, path, sources)
        steps = build_steps(*number_steps(lengths, path), columns, described, path)
        starts = np.cumsum([0, *lengths])
        size = self.side_of(arrays[key].shape[1:], f"{key} of {path}")

        def read(episode: int, wanted: range) -> Iterator[Frames]:
            start = int(starts[episode])
            rows = arrays[key].rows(start + wanted.start, start + wanted.stop)
            for step, row in zip(wanted, rows, strict=True):
                yield self.frame_of(row, size, f"{key} of {path}, row {start + step}")

        return Source(
            path, steps, size, read, f"ogbench {path.stem}{self.changes}", (), "imported from ogbench", self.fps
        )


def _lengths(values: dict[str, NDArray[Any]], path: Path) -> list[int]:
    """Return the lengths of episodes; the last one may end without a mark."""
    marks = [values[name] for name in ("terminals", "timeouts") if name in values]
    if any(mark.ndim != 1 or not np.isin(mark, (0, 1)).all() for mark in marks):
        raise UserError(f"{path}: terminals or timeouts are no column of true and false; get the file again")
    ends = np.flatnonzero(np.any(marks, axis=0)) + 1
    count = len(marks[0])
    bounds = [0, *ends.tolist(), *([count] if count and (not len(ends) or ends[-1] < count) else [])]
    return [int(length) for length in np.diff(bounds)]


def _columns(
    values: dict[str, NDArray[Any]], path: Path
) -> tuple[dict[str, NDArray[Any]], dict[str, Any], dict[str, str]]:
    """Return columns, their roles and their names in the file, by name."""
    # OGBench marks with terminals where it stopped to record, not where a task has ended.
    names = {**NAMES, "terminals": "terminated" if "timeouts" in values else "truncated"}
    roles: dict[str, Any] = {**ROLES, "action": ACTION}
    columns: dict[str, NDArray[Any]] = {}
    sources: dict[str, str] = {}
    for name, array in values.items():
        plain = names.get(name) or re.sub(r"\W", "_", name.removeprefix("infos/"))
        if plain in columns:
            raise UserError(f"{path}: {sources[plain]} and {name} are both {plain}; leave one out with --drop {name}")
        sources[plain] = name
        if STATE.fullmatch(name):
            roles[plain] = ("state",)
        columns[plain] = array
    return columns, roles, sources
