"""Finding FFmpeg, and writing videos with it."""

from __future__ import annotations

import functools
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray

from wmcache.common.errors import UserError, reason
from wmcache.common.files import cannot_write

OLDEST = (5, 1)
"""The first FFmpeg with `-fps_mode`."""


def ffmpeg() -> str:
    """Return the FFmpeg of IMAGEIO_FFMPEG_EXE, of imageio-ffmpeg, or of the system; raise UserError where there is none."""
    try:
        program: str = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise UserError(f"ffmpeg is not installed; pip install --upgrade imageio-ffmpeg ({reason(error)})") from error
    _version(program)
    return program


def require_ffmpeg() -> None:
    """Raise UserError unless FFmpeg can read videos frame by frame: version 5.1."""
    program = ffmpeg()
    found = re.match(r"n?(\d+)\.(\d+)", version := _version(program))
    if found and (int(found[1]), int(found[2])) < OLDEST:  # builds of a commit have no version number
        hint = _remedy("pip install --upgrade imageio-ffmpeg")
        raise UserError(f"ffmpeg {version} is too old to read videos, 5.1 or later is needed: {program}; {hint}")


@functools.lru_cache
def _version(program: str) -> str:
    try:
        answer = subprocess.run([program, "-version"], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    except OSError as error:
        hint = _remedy("pip install --force-reinstall imageio-ffmpeg")
        raise UserError(f"ffmpeg cannot be started ({reason(error)}): {program}; {hint}") from error
    words = answer.stdout.decode(errors="replace").split(maxsplit=3)
    return words[2] if words[:2] == ["ffmpeg", "version"] and len(words) > 2 else "of an unknown version"


def _remedy(install: str) -> str:
    return "unset or correct IMAGEIO_FFMPEG_EXE" if os.environ.get("IMAGEIO_FFMPEG_EXE") else install


def write_mp4(path: Path, frames: Sequence[NDArray[np.uint8]], fps: float) -> None:
    """Write frames, uint8 [H, W, 3] with even sides, as H.264; the file is complete or absent.

    Raises:
        UserError: there is no FFmpeg, it has no H.264 encoder, or the file cannot be written.
    """
    program = ffmpeg()
    temporary = path.with_name(f".{path.name}")
    try:
        with cannot_write(path):
            # By default imageio stretches frames to multiples of 16.
            settings: dict[str, Any] = {"codec": "libx264", "quality": 8, "macro_block_size": 2}
            imageio.mimwrite(temporary, [*frames], format="FFMPEG", fps=fps, **settings)
            temporary.replace(path)
    except UserError as error:
        cause = error.__cause__
        if not isinstance(cause, OSError) or cause.errno is not None:
            raise
        # imageio-ffmpeg puts the output of FFmpeg into an OSError without a number.
        lines = [line for line in str(cause).splitlines() if line.strip()]
        raise UserError(
            f"{path} cannot be written ({lines[-1][:160] if lines else 'no reason given'}): {program}"
        ) from cause
    finally:
        temporary.unlink(missing_ok=True)
