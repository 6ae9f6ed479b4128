"""Frames of videos, and of images that Pillow does not read, by FFmpeg."""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from wmcache.common.errors import UserError
from wmcache.common.reading import reading
from wmcache.common.video import ffmpeg
from wmcache.pipeline.importers.conversions import Pixels

VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov")
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"
"""FFmpeg's names of these videos: playlists, which lead to other files, are not opened whatever their suffix."""
MOST_PIXELS = 8192 * 8192
"""Of an image before it is cropped and resized; a larger one is refused as a decompression bomb."""
FORMATS = "rgb24|rgba|rgb48be|rgba64be|gray16be"
"""FFmpeg chooses the smallest of these that loses nothing: alpha and 16 bits are kept where a video has them."""


class VideoReader:
    """Reads one video at a time: reading on costs one frame, going back starts the video again."""

    def __init__(self) -> None:
        """Open nothing yet."""
        self._path, self._number = Path(), -1
        self._pixels: Pixels | None = None
        self._stream: Generator[Pixels, None, None] | None = None

    def close(self) -> None:
        """Stop FFmpeg; the next frame starts it again."""
        if self._stream is not None:
            self._stream.close()
        self._path, self._stream = Path(), None

    def frame(self, path: Path, number: int) -> Pixels | None:
        """Return a frame of a video by its number, or None beyond the last one."""
        if self._stream is None or path != self._path or number < self._number:
            self.close()
            self._path, self._number, self._stream = path, -1, decode_video(path)
        while self._number < number:
            if (pixels := next(self._stream, None)) is None:
                return None
            self._number, self._pixels = self._number + 1, pixels
        return self._pixels


def decode_video(path: Path) -> Generator[Pixels, None, None]:
    """Yield the frames that a video shows, without dropping or repeating any for its frame rate, rotated as it requires.

    Raises UserError for a file that is no readable video.
    """
    # Time stamps by frame number, far apart: rounded, a video's own may coincide, and a frame would be lost.
    with _run(path, ("-format_whitelist", CONTAINERS), (*_pictures("setpts=1000*N/TB,"),)) as stream:
        yield from _read_pictures(stream)


def decode_png(path: Path) -> Pixels:
    """Return the pixels of a PNG file, of 16 bits where it has them; raises UserError for a damaged one."""
    with _run(
        path, ("-err_detect", "crccheck+explode", "-noautorotate", "-f", "png_pipe"), (*_pictures(""),)
    ) as stream:
        found = [*_read_pictures(stream)]
    if len(found) != 1:
        raise UserError(f"{path} is no readable image ({len(found)} pictures); replace the file")
    return found[0]


def frame_times(path: Path) -> NDArray[np.float64]:
    """Return the presentation time of each frame of `decode_video`, in seconds from the container's time 0, float64 [frames].

    Raises UserError for a file that is no readable video, or whose times do not increase.
    """
    words = ("-fps_mode", "passthrough", "-enc_time_base", "1:1000000", "-c:v", "rawvideo", "-f", "framecrc", "-")
    with _run(path, ("-copyts", "-format_whitelist", CONTAINERS), words) as stream:
        rows = [line.split(b",") for line in stream if not line.startswith(b"#")]
    again = "rename the column timestamp to match frames by order"
    with reading(path, f"{path} has frames without a time", again):
        times = np.array([int(row[2]) for row in rows], np.float64) / 1e6
    if len(wrong := np.flatnonzero(np.diff(times) <= 0)):
        frame = wrong[0] + 1
        raise UserError(f"{path}: frame {frame} has the time {times[frame]:g} s after {times[frame - 1]:g} s; {again}")
    return times


def frames_at(times: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the frame that a video shows at each wanted time, int64 [wanted]; -1 before its first frame and after its last.

    Tables and containers round times. So a time counts for the following frame where that is less than half an interval ahead: the interval
    to the frame before it, or the video's median interval if that is shorter. With a constant rate this is the nearest frame.
    """
    usual = float(np.median(np.diff(times))) if len(times) > 1 else 0.001
    shown = np.searchsorted(times, wanted, side="right") - 1
    following = np.minimum(shown + 1, len(times) - 1)
    interval = np.where(shown < 0, usual, times[following] - times[shown])
    frames = np.where(times[following] - wanted < np.minimum(interval, usual) / 2, following, shown)
    return np.where(wanted > times[-1] + usual, -1, frames).astype(np.int64)


def _pictures(filters: str) -> Iterator[str]:
    """Yield the options that write frames as PAM images, after filters."""
    yield from ("-vf", f"{filters}format=pix_fmts={FORMATS}", "-fps_mode", "passthrough")
    # The same bytes on every processor.
    yield from ("-sws_flags", "bicubic+accurate_rnd+full_chroma_int+bitexact")
    yield from ("-c:v", "pam", "-f", "image2pipe", "-")


def _read_pictures(stream: IO[bytes]) -> Iterator[Pixels]:
    """Yield PAM images up to the end of the stream, or to one that is not whole."""
    while stream.readline():  # P7
        header = dict(line.split() for line in itertools.takewhile(b"ENDHDR\n".__ne__, stream))
        if header.keys() < {b"HEIGHT", b"WIDTH", b"DEPTH", b"MAXVAL"}:
            return
        shape = tuple(int(header[name]) for name in (b"HEIGHT", b"WIDTH", b"DEPTH"))
        dtype = np.dtype("u1" if header[b"MAXVAL"] == b"255" else ">u2")
        data = stream.read(math.prod(shape) * dtype.itemsize)
        if len(data) < math.prod(shape) * dtype.itemsize:
            return
        yield np.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


@contextmanager
def _run(path: Path, source: tuple[str, ...], output: tuple[str, ...]) -> Iterator[IO[bytes]]:
    """Run FFmpeg on a file with options of its source and output; yields its stdout, and raises UserError for any error it reports."""
    words = [
        *(ffmpeg(), "-v", "error", "-xerror", "-nostdin", "-protocol_whitelist", "file,pipe"),
        *("-max_pixels", str(MOST_PIXELS), *source, "-i", f"file:{path.absolute()}", "-map", "0:v:0", *output),
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
        errors = log.read(2000).decode(errors="replace").strip()
        if process.returncode or errors:
            kind = "image" if "png_pipe" in source else "video"
            cause = re.sub(r"^(\[[^]]* @ 0x[0-9a-f]+\] )+", "", errors.partition("\n")[0])[:200]
            raise UserError(
                f"{path} is no readable {kind} ({cause or f'FFmpeg exited with {process.returncode}'}); replace the file"
            )
