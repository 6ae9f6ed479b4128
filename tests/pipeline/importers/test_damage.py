"""Damaged and unusual files: each gives one line and status 1, or is read as it should be."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from wmcache.pipeline.frames import FrameDataset

from .conftest import Import

SIDE, FRAMES = 16, 6


def encode(path: Path, *words: str) -> None:
    """Write FRAMES frames of noise by FFmpeg."""
    program = imageio_ffmpeg.get_ffmpeg_exe()
    noise = np.random.default_rng(0).integers(0, 256, (FRAMES, SIDE, SIDE, 3)).astype(np.uint8)
    raw = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{SIDE}x{SIDE}", "-r", "10")
    subprocess.run([program, "-v", "error", *raw, "-i", "-", *words, str(path)], input=noise.tobytes(), check=True)


def write_images(folder: Path, suffix: str, *words: str) -> None:
    for frame in range(FRAMES):
        encode(folder / f"{frame}{suffix}", *words, "-frames:v", "1", "-update", "1")


def table(folder: Path, kind: str, **columns: object) -> Path:
    """Write images and a Parquet table of them, with other columns."""
    write_images(folder, ".png")
    names = [f"{frame}.png" for frame in range(FRAMES)]
    rows = {"episode": [0] * FRAMES, "step": list(range(FRAMES)), kind: names, "action_0": [0.5] * FRAMES}
    pq.write_table(pa.table(rows | columns), path := folder.with_name("steps.parquet"))
    return path


KINDS: dict[str, Callable[[Path], object]] = {
    "0.png": lambda folder: write_images(folder, ".png"),
    "1.png": lambda folder: write_images(folder, ".png", "-pix_fmt", "rgb48be"),
    "2.jpg": lambda folder: write_images(folder, ".jpg"),
    "0.mp4": lambda folder: encode(folder / "0.mp4", "-c:v", "libx264"),
    "0.mkv": lambda folder: encode(folder / "0.mkv", "-c:v", "ffv1"),
    "../steps.parquet": lambda folder: table(folder, "file"),
}
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "cut": lambda data: data[: len(data) // 2],
    "zeros": lambda data: data[: len(data) // 2] + bytes(60) + data[len(data) // 2 + 60 :],
    "noise": lambda data: np.random.default_rng(0).bytes(len(data)),
}


@pytest.mark.parametrize("name", KINDS)
def test_damage_gives_one_line(tmp_path: Path, run_import: Import, name: str) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    KINDS[name](folder)
    path = folder / name
    whole = path.read_bytes()
    words = ("--actions", path) if path.suffix == ".parquet" else ()
    for kind, change in DAMAGE.items():
        if kind == "zeros" and path.suffix in (".jpg", ".mp4"):
            continue  # JPEG and H.264 have no checksums
        path.write_bytes(change(whole))
        result = run_import("frames", folder, *words, "--out", tmp_path / "out")
        assert result.exit_code == 1, kind
        assert path.name in result.stderr, result.stderr
        assert "0x" not in result.stderr
    path.write_bytes(whole)
    assert run_import("frames", folder, *words, "--out", tmp_path / "out").exit_code == 0


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("state", pa.array([[]] * FRAMES, pa.list_(pa.float64()))),
        ("count", pa.array([2**64 - 1] * FRAMES, pa.uint64())),
        ("timestamp", pa.array(range(FRAMES), pa.timestamp("ms"))),
        ("action_0", pa.array([True] * FRAMES)),
        ("action_0", pa.array([float("nan")] * FRAMES)),
        ("episode", pa.array([0.0] * FRAMES)),
    ],
)
def test_columns_of_other_types_are_named(tmp_path: Path, run_import: Import, name: str, values: pa.Array) -> None:
    (tmp_path / "source").mkdir()
    path = table(tmp_path / "source", "file", **{name: values})
    result = run_import("frames", tmp_path / "source", "--actions", path, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert str(path) in result.stderr
    assert name in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_table_without_commas_is_refused(tmp_path: Path, run_import: Import) -> None:
    (tmp_path / "steps.csv").write_text("episode;step;file\n0;0;0.png\n")
    result = run_import("frames", tmp_path, "--actions", tmp_path / "steps.csv", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "';'" in result.stderr


def test_names_in_categories_and_other_scripts_are_read(tmp_path: Path, run_import: Import) -> None:
    names = ["日本.png", "é.png", "a b.png", "😀.png", "q'$x.png", "z.png"]
    (tmp_path / "source").mkdir()
    path = table(tmp_path / "source", "file", file=pa.array(names).dictionary_encode())
    for frame, name in enumerate(names):
        (tmp_path / "source" / f"{frame}.png").rename(tmp_path / "source" / name)
    result = run_import("frames", tmp_path / "source", "--actions", path, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    found = FrameDataset.open(tmp_path / "out").read_frames(range(FRAMES))
    expected = [np.asarray(Image.open(tmp_path / "source" / name)) for name in names]
    np.testing.assert_array_equal(found, expected)


def test_hidden_files_are_left_out_with_a_note(tmp_path: Path, run_import: Import) -> None:
    write_images(tmp_path, ".png")
    (tmp_path / "._0.png").write_bytes(b"\0\5\x16\7")  # macOS writes such files on other disks
    result = run_import("frames", tmp_path, "--out", tmp_path.with_name("out"))
    assert result.exit_code == 0, result.stderr
    assert "1 hidden" in result.stderr
    assert "._0.png" in result.stderr


def test_folders_without_frames_are_refused(tmp_path: Path, run_import: Import) -> None:
    (tmp_path / "empty" / "nested").mkdir(parents=True)
    for folder in ("empty", "absent"):
        result = run_import("frames", tmp_path / folder, "--out", tmp_path / "out")
        assert result.exit_code == 1
        assert str(tmp_path / folder) in result.stderr
