"""Images or videos beside a table of actions and states -> frame dataset.

The table, CSV or Parquet, has one row a frame:

    episode, step               whole numbers that count up from 0; the rows may be in any order
    file                        the frame's image, relative to the folder (png, jpg, webp, bmp); or
    video                       the episode's video (mp4, mkv, webm, avi, mov), whose frame number `step` is taken
    action_0, action_1, ...     numbers; or one column `action` of lists (Parquet)
    state_0, state_1, ...       numbers; or one column `state` of lists

An index column, as pandas writes it, is ignored. The last row of an episode may have no action; then its frame is not imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from wmcache.common.errors import UserError, reason
from wmcache.common.video import require_ffmpeg
from wmcache.pipeline.importers.base import IMPORTERS, Source
from wmcache.pipeline.importers.conversions import ImageImporter, Shape, note
from wmcache.pipeline.importers.media import IMAGES, VIDEOS, VideoReader, open_image
from wmcache.pipeline.importers.table import StepTable, read_table
from wmcache.pipeline.tars import Frames


@IMPORTERS.register("frames")
@dataclass(frozen=True, kw_only=True)
class FramesImporter(ImageImporter):
    """Import the images or videos in FOLDER beside a table of actions and states."""

    local: ClassVar[frozenset[str]] = frozenset({"source", "actions"})
    actions: str = field(
        metadata={"help": "CSV or Parquet, a row a frame: episode, step, file or video, action_0 ..., state_0 ..."}
    )

    def open(self) -> Source:
        """See `Importer.open`; values keep their precision, but actions are rounded to float32."""
        folder, path = Path(self.source), Path(self.actions)
        table = read_table(path)
        paths = _paths(folder, table.names, VIDEOS if table.kind == "video" else tuple(IMAGES), path)
        starts = np.flatnonzero(table.steps.step == 0)
        is_video = table.kind == "video"
        read = _Videos(table, path, paths, starts, self.shape) if is_video else _Images(paths, starts, self.shape)
        env = f"frames of {folder.absolute().name}{self.shape}"
        return Source(folder, table.steps, read.size, read, env, (), "imported from frames", self.fps)


class _Images:
    """Reads the frames of one image each."""

    def __init__(self, paths: list[Path], starts: NDArray[np.int64], shape: Shape) -> None:
        self.paths, self.starts, self.shape = paths, starts, shape
        self.size = shape.side(*open_image(paths[0]).size, paths[0])

    def __call__(self, episode: int, wanted: range) -> Iterator[Frames]:
        start = self.starts[episode]
        for path in self.paths[start + wanted.start : start + wanted.stop]:
            yield self.shape.frame(open_image(path), self.size, path)


class _Videos:
    """Reads the frames of one video an episode."""

    def __init__(
        self, table: StepTable, path: Path, paths: list[Path], starts: NDArray[np.int64], shape: Shape
    ) -> None:
        require_ffmpeg()
        self.lengths = np.diff(starts, append=len(table.steps))
        for start, length in zip(starts, self.lengths, strict=True):
            if len(set(table.names[start : start + length])) > 1:
                raise UserError(
                    f"{path} names several videos for episode {table.steps.episode[start]}; an episode is one video"
                )
        self.table, self.path, self.shape = table, path, shape
        self.paths = [paths[start] for start in starts]
        self.videos = VideoReader()
        if (first := next(self.videos.frames(paths[0], 0), None)) is None:
            raise UserError(f"{paths[0]} contains no frames")
        self.size = shape.side(*first.size, paths[0])
        self.noted = False

    def __call__(self, episode: int, wanted: range) -> Iterator[Frames]:
        video, length = self.paths[episode], int(self.lengths[episode])
        stream = self.videos.frames(video, wanted.start)
        for step in wanted:
            if (image := next(stream, None)) is None:
                raise UserError(
                    f"{video} ends after {step} frames, {self.path} has {length} rows with an action for it; correct either"
                )
            yield self.shape.frame(image, self.size, f"{video}, frame {step},")
        if wanted.stop == length and next(stream, None) is not None:
            if next(stream, None) is not None:
                raise UserError(
                    f"{video} has more frames than the {length} rows of {self.path} with an action, and the one after them; "
                    "correct either"
                )
            if not (self.table.dropped[episode] or self.noted):
                note(
                    f"{video} has one frame more than {self.path} has rows for it; the last frame of such a video, "
                    "which has no action, is not imported"
                )
                self.noted = True


def _paths(folder: Path, names: NDArray[Any], suffixes: tuple[str, ...], table: Path) -> list[Path]:
    """Return the files of the table; each must exist inside the folder and have a known suffix."""
    known: dict[str, Path] = {}
    try:
        inside = folder.resolve(strict=True)
        for name in names:
            if name in known:
                continue
            path = folder / name
            if Path(name).is_absolute() or not path.resolve().is_relative_to(inside):
                raise UserError(f"{table} names {name[:200]!r}, which is outside {folder}; give paths relative to it")
            if path.suffix.lower() not in suffixes:
                raise UserError(f"{table} names {name[:200]!r}; known are {', '.join(suffixes)}")
            if not path.is_file():
                raise UserError(f"{path} of {table} does not exist")
            known[name] = path
    except (OSError, ValueError) as error:
        raise UserError(f"{table} names files of {folder} that cannot be opened ({reason(error)})") from error
    return [known[name] for name in names]
