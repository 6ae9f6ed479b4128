"""The interface of an import format, and what turns its data into a frame dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from wmcache.cluster.tasks import run_tasks
from wmcache.common.errors import UserError
from wmcache.common.jsonfiles import read_json
from wmcache.common.paths import AnyPath, exists
from wmcache.common.registry import Registry
from wmcache.common.space import require_space
from wmcache.pipeline.frames import DatasetCard, FrameDatasetWriter, Frames, encode_png, write_shard
from wmcache.pipeline.steps import Steps

Read = Callable[[int, range], Iterable[Frames]]
"""(episode, steps) -> the frames of those steps, uint8 [image_size, image_size, 3] each; raises UserError for an unreadable file."""


@dataclass(frozen=True)
class Source:
    """Data to import: all steps in memory, the frames on disk. `env`, `layout`, `policy` and `fps` are those of `DatasetCard`.

    Attributes:
        origin: the files, for errors.
        image_size: side of the frames in pixels.
    """

    origin: AnyPath | str
    steps: Steps
    image_size: int
    read: Read
    env: str
    layout: tuple[str, ...]
    policy: str
    fps: int


@dataclass(frozen=True)
class Importer:
    """One import of `wmcache import NAME SOURCE`. A subclass is a frozen dataclass.

    The fields of a subclass are the command's options (`common.options.option`), its docstring is the command's help.

    Attributes:
        metavar: of SOURCE in the help.
        local: fields that are paths of this machine.
        source: path or id of the data.
    """

    metavar: ClassVar[str] = "FOLDER"
    local: ClassVar[frozenset[str]] = frozenset({"source"})
    source: str

    def open(self) -> Source:
        """Check the data and return it; execute nothing from outside. Raises UserError, naming the file that does not fit."""
        raise NotImplementedError


IMPORTERS: Registry[type[Importer]] = Registry(
    "import format", package="wmcache.pipeline.importers", group="wmcache.importers"
)


def write_dataset(source: Source, out: AnyPath, *, frames_per_shard: int) -> DatasetCard:
    """Write a source as a frame dataset; a repeated call continues where the last one stopped."""
    steps = _as_started(source.steps, out)
    if not steps.in_order():
        raise UserError(f"{source.origin} has no frames, or its steps are out of order")
    # Read the first frame before anything is written: it shows most faults, and the size of a frame.
    first = encode_png(next(iter(source.read(0, range(1)))))
    card = DatasetCard(
        name=out.absolute().name,
        env=source.env,
        maze=list(source.layout),
        image_size=source.image_size,
        policy=source.policy,
        seed=0,
        episodes=int(steps.episode[-1]) + 1,
        frames=len(steps),
        frames_per_shard=frames_per_shard,
        fps=source.fps,
    )
    if not exists(out):
        require_space(out, len(first) * len(steps) // 2, f"a dataset of {len(steps)} frames")
    writer = FrameDatasetWriter(out, card, steps)

    def write(shard: int) -> int:
        frames = writer.card.shard_frames(shard)
        write_shard(writer.path, shard, _samples(source, frames))
        return len(frames)

    pending = writer.pending()
    run_tasks(write, pending, total=sum(len(writer.card.shard_frames(shard)) for shard in pending), label="import")
    return writer.finish()


def _as_started(steps: Steps, out: AnyPath) -> Steps:
    """Return the columns that `out` was started with: an import without a description has actions and states alone."""
    for name in ("dataset.json", "unfinished.json"):
        if exists(out / name):
            undescribed = "columns" not in read_json(out / name, "restore it, or choose another --out")
            if undescribed and steps.state is not None and steps.columns.keys() >= {"action", "state"}:
                return Steps.plain(steps.episode, steps.step, steps.columns["action"], steps.columns["state"])
    return steps


def _samples(source: Source, frames: range) -> Iterator[tuple[str, Frames]]:
    steps, start = source.steps, frames.start
    while start < frames.stop:
        episode = steps.episode[start]
        stop = min(frames.stop, int(np.searchsorted(steps.episode, episode, side="right")))
        wanted = range(int(steps.step[start]), int(steps.step[stop - 1]) + 1)
        for frame, image in zip(range(start, stop), source.read(int(episode), wanted), strict=True):
            yield steps.key(frame), image
        start = stop
