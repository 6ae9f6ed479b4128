"""Images or videos, beside a table of actions and other columns or alone -> frame dataset; docs/import.md describes the table's columns."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from wmcache.common.errors import UserError, reason
from wmcache.common.options import option
from wmcache.common.reading import reading
from wmcache.common.video import require_ffmpeg
from wmcache.pipeline.frames import Frames
from wmcache.pipeline.importers.base import IMPORTERS, Read, Source
from wmcache.pipeline.importers.conversions import ImageImporter, note, number_steps
from wmcache.pipeline.importers.media import IMAGES, VIDEOS, VideoReader, decode_video, open_image
from wmcache.pipeline.importers.table import StepTable, read_table
from wmcache.pipeline.steps import Steps


@IMPORTERS.register("frames")
@dataclass(frozen=True, kw_only=True)
class FramesImporter(ImageImporter):
    """Import the images or videos in FOLDER, beside a table of actions and states or alone."""

    local: ClassVar[frozenset[str]] = frozenset({"source", "actions"})
    actions: str | None = option(
        None,
        "CSV or Parquet, a row a frame: episode, step, file or video, action_0 ..., and other numbers.  [default: no actions; each video "
        "in FOLDER, or each folder of images, is an episode]",
    )

    def open(self) -> Source:
        """See `Importer.open`; values keep their precision, but actions are rounded to float32."""
        folder = Path(self.source)
        path = Path(self.actions or self.source)
        table = read_table(path) if self.actions else _all_frames(folder)
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


def _all_frames(folder: Path) -> StepTable:
    """List the frames of all videos under a folder, an episode each, or else of all folders of images, in the order of numbers in names."""
    with reading(folder, f"{folder} cannot be listed", "pass a folder of images or videos"):
        files = sorted((file for file in folder.rglob("*") if file.is_file()), key=_by_numbers)
    videos = [file for file in files if file.suffix.lower() in VIDEOS]
    images = [file for file in files if file.suffix.lower() in IMAGES]
    if bool(videos) == bool(images):
        found = "both images and videos" if videos else "neither images nor videos"
        raise UserError(
            f"{folder} contains {found}; pass a folder of either, or name its files in a table with --actions"
        )
    if videos:
        require_ffmpeg()
        lengths = [sum(1 for _ in decode_video(video)) for video in videos]
        if not all(lengths):
            raise UserError(f"{videos[lengths.index(0)]} contains no frames; remove it")
        named = np.repeat([str(video.relative_to(folder)) for video in videos], lengths)
    else:
        lengths = [len([*group]) for _, group in itertools.groupby(images, lambda image: image.parent)]
        named = np.array([str(image.relative_to(folder)) for image in images])
    episode, step = number_steps(lengths, folder)
    kind = "video" if videos else "file"
    return StepTable(kind, named, Steps(episode, step, {}, {}), np.zeros(len(lengths), np.bool_))


def _by_numbers(path: Path) -> tuple[Any, ...]:
    """Return the sort key of a path: by folder, then by name, with the numbers in both as numbers."""
    *folders, name = (
        [(text, int(digits or -1)) for text, digits in re.findall(r"(\D*)(\d*)", part)] for part in path.parts
    )
    return folders, name, path


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
