"""Images as cameras and tools write them: more bits, transparency, EXIF orientation, other shapes."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from wmcache.common.errors import UserError
from wmcache.pipeline.frames import FrameDataset
from wmcache.pipeline.importers import write_dataset
from wmcache.pipeline.importers.frames import FramesImporter

from .conftest import Import

SIDE = 16


def import_images(folder: Path, **options: Any) -> FrameDataset:
    """Import a folder of images into a folder beside it."""
    out = folder.with_name(f"{folder.name}-{len(list(folder.parent.iterdir()))}")
    write_dataset(FramesImporter(str(folder), **options).open(), out, frames_per_shard=8)
    return FrameDataset.open(out)


def write_16_bit_png(path: Path, pixels: np.ndarray) -> None:
    """Write uint16 [H, W, C]: Pillow writes grey alone."""
    path.parent.mkdir(exist_ok=True)
    height, width, depth = pixels.shape
    words = ("-f", "rawvideo", "-pix_fmt", {2: "ya16be", 3: "rgb48be", 4: "rgba64be"}[depth], "-s", f"{width}x{height}")
    program = imageio_ffmpeg.get_ffmpeg_exe()
    encode = [program, "-v", "error", *words, "-i", "-", "-frames:v", "1", "-update", "1", str(path)]
    subprocess.run(encode, input=pixels.astype(">u2").tobytes(), check=True)


@pytest.mark.parametrize("white", [65535, 4095])
def test_16_bits_are_scaled_and_noted_once(tmp_path: Path, white: int, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 65536, (3, SIDE, SIDE, 3)).astype(np.uint16)
    pixels[:, 0] = np.arange(SIDE)[:, None] * 273  # also inside the lower level
    write_16_bit_png(tmp_path / "deep/0.png", pixels[0])
    write_16_bit_png(tmp_path / "deep/1.png", np.dstack([pixels[1], np.full((SIDE, SIDE), 65535)]))
    pixels[2] = pixels[2, :, :, :1]
    Image.fromarray(pixels[2, :, :, 0]).save(tmp_path / "deep/2.png")
    found = import_images(tmp_path / "deep", white_level=white)
    expected = np.round(np.clip(pixels, 0, white) * (255 / white)).astype(np.uint8)
    np.testing.assert_array_equal(found.read_frames(range(3)), expected)
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert f"{tmp_path / 'deep/0.png'}" in notes[0]
    assert "--white-level" in notes[0]
    assert (f"{white} is white" in found.card.env) == (white != 65535)


def test_folders_whose_names_differ_in_zeros_alone_are_episodes(tmp_path: Path) -> None:
    for value, (name, step) in enumerate(itertools.product(("ep1", "ep01", "ep2"), range(3))):
        (tmp_path / "eps" / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (SIDE, SIDE), (value,) * 3).save(tmp_path / "eps" / name / f"{step}.png")
    found = import_images(tmp_path / "eps")
    assert found.steps.episode.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert found.read_frames(range(9))[:, 0, 0, 0].tolist() == [3, 4, 5, 0, 1, 2, 6, 7, 8]


def transparent(kind: str, path: Path) -> np.ndarray:
    """Write an image whose transparency grows to the right; returns RGB and alpha in [0, 1], [H, W, 4]."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (SIDE, SIDE, 4)).astype(np.uint8)
    values[..., 3] = np.linspace(255, 0, SIDE).astype(np.uint8)
    if kind in ("LA", "LA16"):
        values[..., :3] = values[..., :1]
    if kind == "P":
        values[..., :3], values[..., 3] = 50, 255
        values[:, : SIDE // 2] = (200, 100, 0, 0)
        image = Image.fromarray(values[..., :3]).convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
        image.save(path, transparency=image.getpixel((0, 0)))
    elif kind == "RGB":
        values[..., 3] = 255
        values[3, 5, 3] = 0
        Image.fromarray(values[..., :3]).save(path, transparency=tuple(values[3, 5, :3].tolist()))
    elif kind.endswith("16"):
        write_16_bit_png(path, (values if kind == "RGBA16" else values[..., 2:]).astype(np.uint16) * 257)
    else:
        Image.fromarray(values if kind == "RGBA" else values[..., 2:]).save(path)
    return values / 255


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "RGB", "RGBA16", "LA16"])
def test_transparent_images_need_a_background(tmp_path: Path, kind: str) -> None:
    (tmp_path / "glass").mkdir()
    values = transparent(kind, tmp_path / "glass/0.png")
    with pytest.raises(UserError, match=r"glass/0\.png .*--background"):
        import_images(tmp_path / "glass")
    found = import_images(tmp_path / "glass", background="#1040f0", white_level=65535)
    color, alpha = values[..., :3], values[..., 3:]
    expected = 255 * (color * alpha + np.array([0x10, 0x40, 0xF0]) / 255 * (1 - alpha))
    assert np.abs(found.read_frames([0])[0] - expected).max() <= 1
    assert "#1040f0" in found.card.env


UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda image: image,
    2: np.fliplr,
    3: lambda image: np.rot90(image, 2),
    4: np.flipud,
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: np.rot90(image, 2).swapaxes(0, 1),
    8: np.rot90,
}
"""EXIF orientation -> what shows the stored image upright."""


def test_exif_orientations_are_applied(tmp_path: Path) -> None:
    (tmp_path / "camera").mkdir()
    stored = np.zeros((32, 32, 3), np.uint8)
    stored[:16, :16], stored[:16, 16:] = (250, 30, 30), (30, 250, 30)  # blocks, which JPEG keeps
    stored[16:, :16] = (30, 30, 250)
    for orientation in UPRIGHT:
        exif = Image.Exif()
        exif[0x112] = orientation
        Image.fromarray(stored).save(tmp_path / f"camera/{orientation}.jpg", exif=exif, quality=100, subsampling=0)
    exif[0x112] = 6
    Image.fromarray(stored[..., 0].astype(np.uint16) * 257).save(tmp_path / "camera/9.png", exif=exif)
    found = import_images(tmp_path / "camera").read_frames(range(9)).astype(int)
    for frame, change in zip(found, UPRIGHT.values(), strict=False):
        assert np.abs(frame - change(stored)).max() < 6
    np.testing.assert_array_equal(found[8], np.rot90(stored[..., :1].repeat(3, 2), -1))


@pytest.mark.parametrize("size", [(20, 12), (13, 20)])
def test_images_that_are_not_square_are_cropped_or_padded_on_request(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "wide").mkdir()
    image = np.random.default_rng(0).integers(1, 256, (*size, 3)).astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "wide/0.png")
    with pytest.raises(UserError, match=rf"0\.png is {size[1]} x {size[0]} .*--crop center .*--pad"):
        import_images(tmp_path / "wide")
    high, wide = size
    short, left, top = min(size), (wide - min(size)) // 2, (high - min(size)) // 2
    cropped = import_images(tmp_path / "wide", crop="center").read_frames([0])[0]
    np.testing.assert_array_equal(cropped, image[top : top + short, left : left + short])
    above, before = (20 - high) // 2, (20 - wide) // 2
    for background, colour in ((None, 0), ("white", 255)):
        padded = import_images(tmp_path / "wide", pad=True, background=background)
        spaces = ((above, 20 - high - above), (before, 20 - wide - before), (0, 0))
        np.testing.assert_array_equal(padded.read_frames([0])[0], np.pad(image, spaces, constant_values=colour))
        assert "padded to a square" in padded.card.env
    Image.new("RGB", (30, 40)).save(tmp_path / "wide/1.png")
    with pytest.raises(UserError, match=r"1\.png .*40 .*--image-size"):
        import_images(tmp_path / "wide", pad=True)
    assert import_images(tmp_path / "wide", pad=True, image_size=8).read_frames([0, 1]).shape == (2, 8, 8, 3)


@pytest.mark.parametrize(
    "words", [("--pad", "--crop", "center"), ("--background", "whiteish"), ("--background", "#ffffff80")]
)
def test_options_that_do_not_fit_are_refused(tmp_path: Path, run_import: Import, words: tuple[str, ...]) -> None:
    result = run_import("frames", tmp_path, *words, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert words[0] in result.stderr


def test_the_command_pads(tmp_path: Path, run_import: Import) -> None:
    (tmp_path / "wide").mkdir()
    Image.new("RGB", (12, 8), "red").save(tmp_path / "wide/0.png")
    result = run_import("frames", tmp_path / "wide", "--pad", "--background", "lime", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    frame = FrameDataset.open(tmp_path / "out").read_frames([0])[0]
    assert frame[[0, 5, 11], 0].tolist() == [[0, 255, 0], [255, 0, 0], [0, 255, 0]]
