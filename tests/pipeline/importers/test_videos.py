"""Videos as phones, screen recorders and editors write them: rotated, cut by an edit list, of variable rate, transparent, of 16 bits."""

from __future__ import annotations

import csv
import subprocess
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wmcache.common.errors import UserError
from wmcache.pipeline.frames import FrameDataset
from wmcache.pipeline.importers import write_dataset
from wmcache.pipeline.importers.frames import FramesImporter
from wmcache.pipeline.importers.videos import frames_at

SIDE = 32
FRAMES = 12
LOSSLESS = ("-c:v", "libx264rgb", "-qp", "0")


def ffmpeg(*words: object, data: bytes | None = None) -> None:
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, words)], check=True, input=data)


@pytest.fixture
def frames() -> np.ndarray:
    """Random blocks, uint8 [FRAMES, SIDE, SIDE, 3]."""
    blocks = np.random.default_rng(0).integers(0, 256, (FRAMES, 4, 4, 3)).astype(np.uint8)
    return blocks.repeat(SIDE // 4, 1).repeat(SIDE // 4, 2)


@pytest.fixture
def video(tmp_path: Path, frames: np.ndarray) -> Path:
    """A lossless MP4 of the frames, 10 a second."""
    path = tmp_path / "videos" / "0.mp4"
    path.parent.mkdir()
    raw = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{SIDE}x{SIDE}", "-r", 10)
    ffmpeg(*raw, "-i", "-", *LOSSLESS, path, data=frames.tobytes())
    return path


def change(video: Path, *words: object, before: tuple[object, ...] = ()) -> None:
    """Write the video again with other options of FFmpeg."""
    video.rename(other := video.with_name(f"other{video.suffix}"))
    ffmpeg(*before, "-i", other, *words, video)
    other.unlink()


def import_folder(folder: Path, table: Path | None = None, **options: Any) -> FrameDataset:
    out = folder.with_name(f"out-{len(list(folder.parent.iterdir()))}")
    importer = FramesImporter(str(folder), actions=str(table) if table else None, **options)
    write_dataset(importer.open(), out, frames_per_shard=5)
    return FrameDataset.open(out)


def write_table(video: Path, times: list[float], episodes: list[int] | None = None) -> Path:
    """Write a table of rows at these times, in reverse order."""
    numbers = episodes or [0] * len(times)
    rows = [
        (episode, numbers[:row].count(episode), time)
        for row, (episode, time) in enumerate(zip(numbers, times, strict=True))
    ]
    path = video.parent.with_name("steps.csv")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["episode", "step", "video", "timestamp", "action_0"])
        writer.writerows((*numbers, video.name, time, 0.5) for *numbers, time in reversed(rows))
    return path


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_rotation_metadata_is_applied(video: Path, frames: np.ndarray, turns: int) -> None:
    change(video, "-c", "copy", before=("-display_rotation", 90 * turns))
    expected = np.rot90(frames, turns, (1, 2))
    np.testing.assert_array_equal(import_folder(video.parent).read_frames(range(FRAMES)), expected)


def test_frames_before_an_edit_list_are_not_shown(video: Path, frames: np.ndarray) -> None:
    change(video, "-c", "copy", before=("-ss", 0.5))
    assert b"elst" in video.read_bytes()
    np.testing.assert_array_equal(import_folder(video.parent).read_frames(range(FRAMES - 5)), frames[5:])
    by_time = import_folder(video.parent, write_table(video, [0.0, 0.2, 0.6]))
    np.testing.assert_array_equal(by_time.read_frames(range(3)), frames[[5, 7, 11]])


def test_rows_are_matched_by_timestamp(video: Path, frames: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    # 0, 0.1, 0.2, and a pause of a second after every third frame.
    change(video, "-vf", "setpts=PTS+floor(N/3)*1/TB", "-fps_mode", "passthrough", *LOSSLESS)
    times = [0.0, 0.099, 0.16, 0.21, 0.9, 1.24, 1.24, 1.29, 1.31, 3.6]
    episodes = [0] * 7 + [1] * 3
    found = import_folder(video.parent, write_table(video, times, episodes))
    expected = [0, 1, 2, 2, 2, 2, 2, 3, 3, 8]
    np.testing.assert_array_equal(found.read_frames(range(10)), frames[expected])
    np.testing.assert_array_equal(found.steps.columns["timestamp"], times)
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert "10 rows" in notes[0]
    assert "5 of the 12 frames" in notes[0]


def test_each_frame_once_needs_no_note(video: Path, frames: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    video.rename(video := video.with_suffix(".mkv"))  # FFmpeg reads the content, not the name
    change(video, "-c", "copy")
    table = write_table(video, [round(number / 10, 2) for number in range(FRAMES)])
    np.testing.assert_array_equal(import_folder(video.parent, table).read_frames(range(FRAMES)), frames)
    assert "note: " not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("times", "named"),
    [
        ([1.7e9, 1.7e9 + 1], ("1.7e+09", "episode 0, step 0", "0 to 1.1 s")),
        ([0.0, 1.3], ("1.3", "episode 0, step 1")),
        ([-0.2, 0.0], ("-0.2", "episode 0, step 0")),
        ([0.2, 0.1], ("decreases", "episode 0, step 1")),
    ],
)
def test_timestamps_outside_the_video_are_refused(video: Path, times: list[float], named: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as refused:
        import_folder(video.parent, write_table(video, times))
    assert all(part in str(refused.value) for part in ("steps.csv", *named)), refused.value


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.floats(0.5, 200), st.floats(-3, 3), st.data())
def test_at_a_constant_rate_the_nearest_frame_is_matched(
    count: int, fps: float, start: float, data: st.DataObject
) -> None:
    times = start + np.arange(count) / fps
    jitter = data.draw(st.lists(st.floats(-0.49, 0.49), min_size=count, max_size=count))
    wanted = times + np.array(jitter) / fps if count > 1 else times
    assert frames_at(times, wanted).tolist() == list(range(count))


def test_transparent_and_16_bit_videos_follow_the_rules_of_images(tmp_path: Path, frames: np.ndarray) -> None:
    glass, deep = tmp_path / "glass", tmp_path / "deep"
    glass.mkdir()
    deep.mkdir()
    raw = ("-f", "rawvideo", "-s", f"{SIDE}x{SIDE}", "-r", 10)
    alpha = np.concatenate([frames, np.zeros_like(frames[..., :1])], 3)
    ffmpeg(
        *raw, "-pix_fmt", "rgba", "-i", "-", "-c:v", "ffv1", "-pix_fmt", "bgra", glass / "0.mkv", data=alpha.tobytes()
    )
    with pytest.raises(UserError, match=r"0\.mkv, frame 0, .*--background"):
        import_folder(glass)
    assert (import_folder(glass, background="white").read_frames(range(FRAMES)) == 255).all()
    depth = np.arange(FRAMES * SIDE * SIDE, dtype="<u2").reshape(FRAMES, SIDE, SIDE) // 3
    ffmpeg(*raw, "-pix_fmt", "gray16le", "-i", "-", "-c:v", "ffv1", deep / "0.mkv", data=depth.tobytes())
    found = import_folder(deep, white_level=4095).read_frames(range(FRAMES))
    np.testing.assert_array_equal(found[..., 0], np.round(np.minimum(depth, 4095) / 4095 * 255))
