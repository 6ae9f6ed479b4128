"""FFmpeg is found, checked and named. Videos are read in tests/pipeline/importers and written in tests/planner."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from wmcache.common.errors import UserError
from wmcache.common.video import require_ffmpeg

Fake = Callable[[str], Path]


@pytest.fixture
def fake_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """(version) -> a program that reports this version of FFmpeg, in use."""

    def make(version: str) -> Path:
        path = tmp_path / f"ffmpeg {version}"
        path.write_text(f"#!/bin/sh\necho 'ffmpeg version {version} Copyright (c)'\n")
        path.chmod(0o755)
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(path))
        return path

    return make


@pytest.mark.parametrize("version", ["4.4.2-0ubuntu0.22.04.1", "n5.0"])
def test_an_old_ffmpeg_is_named(fake_ffmpeg: Fake, version: str) -> None:
    program = fake_ffmpeg(version)
    with pytest.raises(UserError, match=r"5\.1") as refused:
        require_ffmpeg()
    assert all(word in str(refused.value) for word in (version, str(program), "IMAGEIO_FFMPEG_EXE"))


@pytest.mark.parametrize("version", ["5.1", "n9.0.2-17-g2a571b6068", "N-110000-g1234567"])
def test_a_newer_ffmpeg_is_used(fake_ffmpeg: Fake, version: str) -> None:
    fake_ffmpeg(version)
    require_ffmpeg()
