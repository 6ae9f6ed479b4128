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
from wmcache.pipeline.importers.base import IMPORTERS, Read, Source
from wmcache.pipeline.importers.conversions import ImageImporter, note
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
        is_video = table.kind == "video"
        paths = _paths(folder, table.names, VIDEOS if is_video else tuple(IMAGES), path)
        size, read = self._videos(table, path, paths) if is_video else self._images(table, paths)
        env = f"frames of {folder.absolute().name}{self.changes}"
        return Source(folder, table.steps, size, read, env, (), "imported from frames", self.fps)

    def _images(self, table: StepTable, paths: list[Path]) -> tuple[int, Read]:
        """Return the size of frames, and what reads them from one image each."""
        starts = np.flatnonzero(table.steps.step == 0)
        size = self.side(*open_image(paths[0]).size, paths[0])

        def read(episode: int, wanted: range) -> Iterator[Frames]:
            start = starts[episode]
            for path in paths[start + wanted.start : start + wanted.stop]:
                yield self.frame(open_image(path), size, path)

        return size, read

    def _videos(self, table: StepTable, path: Path, paths: list[Path]) -> tuple[int, Read]:
        """Return the size of frames, and what reads them from one video an episode."""
        require_ffmpeg()
        starts = np.flatnonzero(table.steps.step == 0)
        lengths = np.diff(starts, append=len(table.steps))
        for episode, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            if len(set(table.names[start : start + length])) > 1:
                raise UserError(f"{path} names several videos for episode {episode}; an episode is one video")
        videos, noted = VideoReader(), False
        if (first := next(videos.frames(paths[0], 0), None)) is None:
            raise UserError(f"{paths[0]} contains no frames")
        size = self.side(*first.size, paths[0])

        def read(episode: int, wanted: range) -> Iterator[Frames]:
            nonlocal noted
            video, length = paths[starts[episode]], int(lengths[episode])
            stream = videos.frames(video, wanted.start)
            for step in wanted:
                if (image := next(stream, None)) is None:
                    raise UserError(f"{video} ends after {step} frames, {path} has {length} rows; correct either")
                yield self.frame(image, size, f"{video}, frame {step},")
            if wanted.stop < length or next(stream, None) is None:
                return
            if next(stream, None) is not None:
                raise UserError(f"{video} has over one frame more than the {length} rows of {path}; correct either")
            if not (table.dropped[episode] or noted):
                noted = True
                note(f"{video} has one frame more than {path} has rows; last frames without an action are not imported")

        return size, read


def _paths(folder: Path, names: NDArray[Any], suffixes: tuple[str, ...], table: Path) -> list[Path]:
    """Return the files of the table; each must exist inside the folder and have a known suffix."""
    known: dict[str, Path] = {}
    try:
        inside = folder.resolve(strict=True)
        for name in dict.fromkeys(names):
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
