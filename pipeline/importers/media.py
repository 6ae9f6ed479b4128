"""Images and videos from outside, decoded frame by frame."""

from __future__ import annotations

import functools
import io
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from wmcache.common.errors import UserError
from wmcache.common.reading import reading
from wmcache.common.video import ffmpeg

IMAGES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}
"""Suffix -> Pillow's name of the format."""
VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov")
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"
"""FFmpeg's names of these videos: playlists, which lead to other files, are not opened whatever their suffix."""
MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA"})
MOST_PIXELS = 8192 * 8192
"""Of an image before it is cropped and resized; a larger one is refused as a decompression bomb."""
MOST_BYTES = 4 * MOST_PIXELS


def open_image(path: Path) -> Image.Image:
    """Open an image file as RGB, rotated as its EXIF orientation requires; size and kind are checked before it is decoded."""
    with reading(path, f"{path} is no readable image", "replace the file"):
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path} is larger than any image of {MOST_PIXELS} pixels")
        return decode_image(path.read_bytes(), [IMAGES[path.suffix.lower()]], path)


def decode_image(data: bytes, kinds: list[str], where: Path | str) -> Image.Image:
    """Decode the bytes of an image file of one of these kinds (Pillow's names) as `open_image` does; `where` is for errors."""
    image = Image.open(io.BytesIO(data), formats=kinds)
    if image.width * image.height > MOST_PIXELS:
        raise UserError(f"{where} has {image.width} x {image.height} pixels, too many for a frame")
    if image.mode not in MODES or (image.format == "PNG" and data[24] > 8):
        raise UserError(f"{where} is {image.mode} of more than 8 bits or of other colours; save it as 8-bit RGB")
    # An MPO file of a phone or a 3D camera is a JPEG followed by other views; Pillow opens the first one.
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        raise UserError(f"{where} contains several images; save a single one")
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "RGB" and "transparency" not in upright.info:
        return upright
    coloured = upright.convert("RGBA")
    if coloured.getchannel("A").getextrema() != (255, 255):
        raise UserError(f"{where} is transparent; save it as RGB")
    return coloured.convert("RGB")


class VideoReader:
    """Reads one video at a time: reading on costs one frame, going back starts the video again."""

    def __init__(self) -> None:
        """Open nothing yet."""
        self._path, self._next = Path(), 0
        self._stream: Iterator[Image.Image] = iter(())

    def frames(self, path: Path, start: int) -> Iterator[Image.Image]:
        """Yield the video's frames from number `start` on."""
        if path != self._path or start < self._next:
            self._path, self._next, self._stream = path, 0, decode_video(path)
        for image in self._stream:
            self._next += 1
            if self._next > start:
                yield image


def decode_video(path: Path) -> Iterator[Image.Image]:
    """Yield all stored frames of a video, without dropping or repeating any for its frame rate."""
    words = [
        # Time stamps by frame number, far apart: rounded, a video's own may coincide, and a frame would be lost.
        *("-vf", "setpts=1000*N/TB", "-fps_mode", "passthrough"),
        # The same bytes on every processor.
        *("-sws_flags", "bicubic+accurate_rnd+full_chroma_int+bitexact", "-pix_fmt", "rgb24"),
        *("-c:v", "ppm", "-f", "image2pipe", "-"),
    ]
    with _run_ffmpeg(path, words) as output:
        while output.readline():  # P6
            width, height = map(int, output.readline().split())
            output.readline()  # 255
            pixels = output.read(width * height * 3)
            if len(pixels) < width * height * 3:
                break
            yield Image.frombytes("RGB", (width, height), pixels)


@functools.lru_cache(maxsize=2)
def video_times(path: Path) -> NDArray[np.float64]:
    """Return the time stamp of each frame of a video in seconds, [frames], ascending; decodes nothing."""
    unit, stamps = 0.0, []
    with _run_ffmpeg(path, ["-c", "copy", "-f", "framecrc", "-"], before=["-copyts"]) as output:
        for line in output:
            if line.startswith(b"#tb 0: "):  # the unit of the third number of each other line: 1/15360
                numerator, denominator = map(int, line.split()[2].split(b"/"))
                unit = numerator / denominator
            elif not line.startswith(b"#"):
                stamps.append(int(line.split(b",")[2]))
    return np.sort(np.asarray(stamps, np.float64)) * unit


@contextmanager
def _run_ffmpeg(path: Path, words: list[str], before: list[str] | None = None) -> Iterator[IO[bytes]]:
    """Yield the output of FFmpeg on the first video of a file; raise UserError for what FFmpeg has reported at the end."""
    words = [
        *(ffmpeg(), "-v", "error", "-xerror", "-nostdin", *(before or ())),
        *("-protocol_whitelist", "file,pipe", "-format_whitelist", CONTAINERS, "-max_pixels", str(MOST_PIXELS)),
        *("-i", f"file:{path.absolute()}", "-map", "0:v:0", *words),
    ]
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log) as process,
    ):
        assert process.stdout is not None
        try:
            yield process.stdout
            process.wait()
        finally:
            process.kill()
        log.seek(0)
        errors = " ".join(log.read(2000).decode(errors="replace").split())
        if process.returncode or errors:
            raise UserError(f"{path} is no readable video ({errors[-200:]}); replace the file")
