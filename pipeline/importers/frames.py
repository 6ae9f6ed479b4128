"""Images or videos, beside a table of actions and other columns or alone -> frame dataset; docs/import.md describes the table's columns."""

from __future__ import annotations

import io
import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from wmcache.common.errors import UserError, reason
from wmcache.common.options import option
from wmcache.common.reading import reading
from wmcache.common.video import ffmpeg, require_ffmpeg
from wmcache.pipeline.frames import Frames
from wmcache.pipeline.importers.base import IMPORTERS, Read, Source
from wmcache.pipeline.importers.conversions import ImageImporter, note, number_steps
from wmcache.pipeline.importers.table import StepTable, read_table
from wmcache.pipeline.steps import Steps

IMAGES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}
"""Suffix -> Pillow's name of the format."""
VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov")
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"
"""FFmpeg's names of these videos: playlists, which lead to other files, are not opened whatever their suffix."""
MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA"})
MOST_PIXELS = 8192 * 8192
"""Of an image before it is cropped and resized; a larger one is refused as a decompression bomb."""
MOST_BYTES = 4 * MOST_PIXELS


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
        size = self.side(*_open_image(paths[0]).size, paths[0])

        def read(episode: int, wanted: range) -> Iterator[Frames]:
            start = starts[episode]
            for path in paths[start + wanted.start : start + wanted.stop]:
                yield self.frame(_open_image(path), size, path)

        return size, read

    def _videos(self, table: StepTable, path: Path, paths: list[Path]) -> tuple[int, Read]:
        """Return the size of frames, and what reads them from one video an episode."""
        require_ffmpeg()
        starts = np.flatnonzero(table.steps.step == 0)
        lengths = np.diff(starts, append=len(table.steps))
        for episode, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            if len(set(table.names[start : start + length])) > 1:
                raise UserError(f"{path} names several videos for episode {episode}; an episode is one video")
        videos, noted = _VideoReader(), False
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
        lengths = [sum(1 for _ in _decode_video(video)) for video in videos]
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


def _open_image(path: Path) -> Image.Image:
    """Open an image file as RGB, rotated as its EXIF orientation requires; size and kind are checked before it is decoded."""
    with reading(path, f"{path} is no readable image", "replace the file"):
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path} is larger than any image of {MOST_PIXELS} pixels")
        data = path.read_bytes()
        image = Image.open(io.BytesIO(data), formats=[IMAGES[path.suffix.lower()]])
        if image.width * image.height > MOST_PIXELS:
            raise UserError(f"{path} has {image.width} x {image.height} pixels, too many for a frame")
        if image.mode not in MODES or (image.format == "PNG" and data[24] > 8):
            raise UserError(f"{path} is {image.mode} of more than 8 bits or of other colours; save it as 8-bit RGB")
        # An MPO file of a phone or a 3D camera is a JPEG followed by other views; Pillow opens the first one.
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
            raise UserError(f"{path} contains several images; save a single one")
        upright = ImageOps.exif_transpose(image)
        if upright.mode == "RGB" and "transparency" not in upright.info:
            return upright
        coloured = upright.convert("RGBA")
        if coloured.getchannel("A").getextrema() != (255, 255):
            raise UserError(f"{path} is transparent; save it as RGB")
        return coloured.convert("RGB")


class _VideoReader:
    """Reads one video at a time: reading on costs one frame, going back starts the video again."""

    def __init__(self) -> None:
        self._path, self._next = Path(), 0
        self._stream: Iterator[Image.Image] = iter(())

    def frames(self, path: Path, start: int) -> Iterator[Image.Image]:
        """Yield the video's frames from number `start` on."""
        if path != self._path or start < self._next:
            self._path, self._next, self._stream = path, 0, _decode_video(path)
        for image in self._stream:
            self._next += 1
            if self._next > start:
                yield image


def _decode_video(path: Path) -> Iterator[Image.Image]:
    """Yield all stored frames of a video, without dropping or repeating any for its frame rate."""
    words = [
        *(ffmpeg(), "-v", "error", "-xerror", "-nostdin"),
        *("-protocol_whitelist", "file,pipe", "-format_whitelist", CONTAINERS, "-max_pixels", str(MOST_PIXELS)),
        *("-i", f"file:{path.absolute()}", "-map", "0:v:0"),
        # Time stamps by frame number, far apart: rounded, a video's own may coincide, and a frame would be lost.
        *("-vf", "setpts=1000*N/TB", "-fps_mode", "passthrough"),
        # The same bytes on every processor.
        *("-sws_flags", "bicubic+accurate_rnd+full_chroma_int+bitexact", "-pix_fmt", "rgb24"),
        *("-c:v", "ppm", "-f", "image2pipe", "-"),
    ]
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log) as process,
    ):
        assert process.stdout is not None
        try:
            while process.stdout.readline():  # P6
                width, height = map(int, process.stdout.readline().split())
                process.stdout.readline()  # 255
                pixels = process.stdout.read(width * height * 3)
                if len(pixels) < width * height * 3:
                    break
                yield Image.frombytes("RGB", (width, height), pixels)
            process.wait()
        finally:
            process.kill()
        log.seek(0)
        errors = " ".join(log.read(2000).decode(errors="replace").split())
        if process.returncode or errors:
            raise UserError(f"{path} is no readable video ({errors[-200:]}); replace the file")
