"""Episodes that were played for an unfinished dataset: step tables in its folder, which are deleted when it is finished."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from wmcache.common.columns import Column
from wmcache.common.files import atomic_write
from wmcache.common.jsonfiles import json_digest
from wmcache.common.paths import AnyPath, names_in, open_to_read, remove_files
from wmcache.common.reading import reading
from wmcache.pipeline.options import CollectOptions
from wmcache.pipeline.steps import Steps, read_rows

Rows = dict[str, NDArray[Any]]
"""Column -> values, [frames, ...]."""

PREFIX = ".played-"


class PlayedEpisodes:
    """The episodes of a collection with these settings that are saved in the folder of its dataset."""

    def __init__(self, out: AnyPath, options: CollectOptions, described: dict[str, Column]) -> None:
        """Nothing is read or written before it is asked for."""
        self.out, self.described = out, described
        self._prefix = f"{PREFIX}{json_digest(asdict(options))[:16]}-"

    def save(self, episodes: Mapping[int, Rows]) -> None:
        """Save episodes by number in one file, named by the first."""
        with atomic_write(self.file(min(episodes))) as file:
            pq.write_table(join_episodes(episodes, self.described).to_table(), file)

    def load(self) -> dict[int, Rows]:
        """Return all saved episodes by number; raises UserError for a damaged file."""
        found: dict[int, Rows] = {}
        for name in sorted(names_in(self.out, self._prefix)):
            path, hint = self.out / name, "delete it, and run the same command again"
            with reading(path, f"{path} cannot be read", hint), open_to_read(path) as stream:
                steps = Steps.from_table(read_rows(pq.ParquetFile(stream)), self.described)
            firsts = np.flatnonzero(steps.step == 0)
            for first, end in zip(firsts, np.append(firsts[1:], len(steps)), strict=True):
                rows = {column: values[first:end] for column, values in steps.columns.items()}
                found[int(steps.episode[first])] = rows
        return found

    def remove(self) -> None:
        """Delete all saved episodes, also those of other settings."""
        if names := names_in(self.out, PREFIX):
            remove_files([self.out / name for name in names])

    def file(self, first: int) -> AnyPath:
        """Return where episodes are saved, of which this number is the first."""
        return self.out / f"{self._prefix}{first:06d}.tmp"


def join_episodes(episodes: Mapping[int, Rows], described: dict[str, Column]) -> Steps:
    """Make the step table of episodes by number."""
    played = sorted(episodes.items())
    lengths = [len(rows["action"]) for _, rows in played]
    return Steps(
        np.repeat(np.array([number for number, _ in played], np.int32), lengths),
        np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
        {name: np.concatenate([rows[name] for _, rows in played]) for name in described},
        described,
    )
