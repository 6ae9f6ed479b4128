"""Images or videos, beside a table of actions and other columns or alone -> frame dataset; docs/import.md describes the table's columns."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from tqdm import tqdm

from wmcache.common.errors import UserError, reason
from wmcache.common.options import option
from wmcache.common.progress import seconds_between_updates
from wmcache.common.reading import reading
from wmcache.common.video import require_ffmpeg
from wmcache.pipeline.frames import Frames
from wmcache.pipeline.importers.base import IMPORTERS, Read, Source
from wmcache.pipeline.importers.conversions import ImageImporter, note, number_steps
from wmcache.pipeline.importers.images import IMAGES, has_16_bits, identify
from wmcache.pipeline.importers.table import StepTable, read_table
from wmcache.pipeline.importers.videos import (
    MOST_PIXELS,
    VIDEOS,
    VideoReader,
    decode_png,
    decode_video,
    frame_times,
    frames_at,
)
from wmcache.pipeline.steps import Steps

MOST_BYTES = 8 * MOST_PIXELS
BY_TIME = "correct either, or add a column timestamp"


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
        size = self.side(*self._open_image(paths[0]).size, paths[0])

        def read(episode: int, wanted: range) -> Iterator[Frames]:
            start = starts[episode]
            for path in paths[start + wanted.start : start + wanted.stop]:
                yield self.frame(self._open_image(path), size, path)

        return size, read

    def _open_image(self, path: Path) -> Image.Image:
        """Open an image file with 8 bits, rotated as its EXIF orientation requires; size and kind are checked before it is decoded."""
        with reading(path, f"{path} is no readable image", "replace the file"):
            if path.stat().st_size > MOST_BYTES:
                raise UserError(f"{path} is larger than any image of {MOST_PIXELS} pixels")
            data = path.read_bytes()
            image = identify(data, [IMAGES[path.suffix.lower()]], path)
            if has_16_bits(image, data):
                grey = image.mode == "I;16" and "transparency" not in image.info
                # Of colours Pillow reads 8 bits.
                deep, image = image, self.to_image(np.asarray(image) if grey else decode_png(path), path)
                image.getexif()[ExifTags.Base.Orientation] = deep.getexif().get(ExifTags.Base.Orientation, 1)
            return ImageOps.exif_transpose(image)

    def _videos(self, table: StepTable, path: Path, paths: list[Path]) -> tuple[int, Read]:
        """Return the size of frames, and what reads them from one video an episode."""
        require_ffmpeg()
        starts = np.flatnonzero(table.steps.step == 0)
        lengths = np.diff(starts, append=len(table.steps))
        for episode, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            if len(set(table.names[start : start + length])) > 1:
                raise UserError(f"{path} names several videos for episode {episode}; an episode is one video")
        with closing(decode_video(paths[0])) as stream:
            if (first := next(stream, None)) is None:
                raise UserError(f"{paths[0]} contains no frames")
        size = self.side(first.shape[1], first.shape[0], paths[0])
        timed = _match_times(table.steps, path, paths)
        numbers = table.steps.step if timed is None else timed

        videos = VideoReader()

        def read(episode: int, wanted: range) -> Iterator[Frames]:
            start, length = starts[episode], int(lengths[episode])
            video = paths[start]
            with ExitStack() as on_error:
                on_error.callback(videos.close)
                for step in wanted:
                    number = int(numbers[start + step])
                    if (pixels := videos.frame(video, number)) is None:
                        raise UserError(f"{video} ends after {number} frames, {path} has {length} rows; {BY_TIME}")
                    where = f"{video}, frame {number},"
                    yield self.frame(self.to_image(pixels, where), size, where)
                on_error.pop_all()
            if timed is None and wanted.stop == length:
                self._require_end(videos, video, table.dropped[episode], length, path)

        return size, read

    def _require_end(self, videos: VideoReader, video: Path, is_dropped: bool, rows: int, table: Path) -> None:
        """Raise UserError for a video of more frames than its rows; one more is noted, unless its row was dropped."""
        further = 0
        while further < 2 and videos.frame(video, rows + further) is not None:
            further += 1
        videos.close()
        if further > 1:
            raise UserError(f"{video} has over one frame more than the {rows} rows of {table}; {BY_TIME}")
        if further and not is_dropped:
            text = f"{video} has one frame more than {table} has rows; last frames without an action are not imported"
            self.note_once("last frame", text)


def _match_times(steps: Steps, table: Path, paths: list[Path]) -> NDArray[np.int64] | None:
    """Return the number in its video of each row's frame by the column timestamp, int64 [frames]; None without that column."""
    if (stamps := steps.columns.get("timestamp")) is None:
        return None
    by_order = "or rename the column to match frames by order"
    if stamps.ndim > 1:
        raise UserError(f"{table}: timestamp has several numbers in a row; give one, in seconds, {by_order}")
    if len(wrong := np.flatnonzero((np.diff(stamps) < 0) & (steps.step[1:] > 0))):
        where = f"episode {steps.episode[wrong[0]]}, step {steps.step[wrong[0]] + 1}"
        raise UserError(f"{table}: timestamp decreases at {where}; sort the steps by time, {by_order}")
    numbers, rows_of, total, used = np.zeros(len(steps), np.int64), _rows_by_path(paths), 0, 0
    with tqdm(rows_of.items(), desc="check", unit=" videos", mininterval=seconds_between_updates()) as bar:
        for video, rows in bar:
            times = frame_times(video)
            if not len(times):
                raise UserError(f"{video} contains no frames")
            numbers[rows] = found = frames_at(times, stamps[rows])
            if len(missing := np.flatnonzero(found < 0)):
                row = rows[missing[0]]
                raise UserError(
                    f"{table}: timestamp {stamps[row]:.9g} of episode {steps.episode[row]}, step {steps.step[row]} is outside {video}, "
                    f"whose frames are at {times[0]:g} to {times[-1]:g} s; give seconds in the video, {by_order}"
                )
            total, used = total + len(times), used + len(np.unique(found))
    if not len(steps) == total == used:
        note(f"the {len(steps)} rows of {table} show {used} of the {total} frames of its videos, by timestamp")
    return numbers


def _rows_by_path(paths: list[Path]) -> dict[Path, NDArray[np.int64]]:
    rows: dict[Path, list[int]] = {}
    for row, path in enumerate(paths):
        rows.setdefault(path, []).append(row)
    return {path: np.array(found) for path, found in rows.items()}


def _all_frames(folder: Path) -> StepTable:
    """List the frames of all videos under a folder, an episode each, or else of all folders of images, in the order of numbers in names."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; pass one of images or videos")
    with reading(folder, f"{folder} cannot be listed", "pass a folder of images or videos"):
        found = sorted((file for file in folder.rglob("*") if not file.is_dir()), key=_by_numbers)
    found = [file for file in found if file.suffix.lower() in (*VIDEOS, *IMAGES)]
    files = [file for file in found if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    if len(files) < len(found):
        hidden = next(file for file in found if file not in files)
        note(f"ignored {len(found) - len(files)} hidden files of {folder}, such as {hidden}")
    videos = [file for file in files if file.suffix.lower() in VIDEOS]
    images = [file for file in files if file.suffix.lower() in IMAGES]
    if bool(videos) == bool(images):
        either = "both images and videos" if videos else "neither images nor videos"
        raise UserError(
            f"{folder} contains {either}; pass a folder of either, or name its files in a table with --actions"
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
    return folders, path.parent, name, path


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
