"""Finding FFmpeg, and writing videos with it."""

from __future__ import annotations

import functools
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray

from wmcache.common.errors import UserError, reason
from wmcache.common.files import not_written

OLDEST = (5, 1)
"""The first FFmpeg with `-fps_mode`."""
HINT = "pip install --upgrade imageio-ffmpeg, or correct IMAGEIO_FFMPEG_EXE"


def ffmpeg() -> str:
    """Return the FFmpeg of IMAGEIO_FFMPEG_EXE, of imageio-ffmpeg, or of the system; raise UserError where there is none."""
    program = "ffmpeg"
    try:
        program = str(imageio_ffmpeg.get_ffmpeg_exe())
        _version(program)
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        raise UserError(f"ffmpeg cannot be started ({reason(error)}): {program}; {HINT}") from error
    return program


def require_ffmpeg() -> None:
    """Raise UserError unless FFmpeg can read videos frame by frame: version 5.1."""
    program = ffmpeg()
    found = re.match(r"n?(\d+)\.(\d+)", version := _version(program))
    if found and (int(found[1]), int(found[2])) < OLDEST:  # builds of a commit have no version number
        raise UserError(f"ffmpeg {version} is too old to read videos, 5.1 or later is needed: {program}; {HINT}")


@functools.cache
def _version(program: str) -> str:  # noqa: ARG001 (the key of the cache)
    return str(imageio_ffmpeg.get_ffmpeg_version())


def write_mp4(path: Path, frames: Iterable[NDArray[np.uint8]], fps: float, **settings: Any) -> None:
    """Write frames, uint8 [H, W, 3] with even sides, as H.264; the file is complete or absent. `settings` are those of imageio's FFMPEG."""
    program, temporary = ffmpeg(), path.with_name(f".{path.name}")
    # By default imageio stretches frames to multiples of 16.
    settings = settings or {"codec": "libx264", "quality": 8, "macro_block_size": 2}
    try:
        writer: Any
        with imageio.get_writer(temporary, format="FFMPEG", mode="I", fps=fps, **settings) as writer:
            for frame in frames:
                writer.append_data(frame)
        temporary.replace(path)
    except OSError as error:
        if error.errno is not None:
            raise not_written(path, error) from error
        # imageio-ffmpeg puts the output of FFmpeg into an OSError without a number.
        last = str(error).strip().rpartition("\n")[2][:160]
        raise UserError(f"{path} cannot be written ({last}): {program}; {HINT}") from error
    finally:
        temporary.unlink(missing_ok=True)
