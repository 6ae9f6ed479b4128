from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from wmcache.cache import TokenStore
from wmcache.common.errors import UserError
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.encoders.tcn import TcnOptions
from wmcache.pipeline.extract import extract
from wmcache.pipeline.fit import fit

from .conftest import LENGTHS, ROWS, Given


def test_values_are_kept_exactly_in_any_table_and_any_order_of_rows(given: Given, tmp_path: Path) -> None:
    found = given.import_to(tmp_path / "csv")
    np.testing.assert_array_equal(found.read_frames(range(ROWS)), given.frames)
    np.testing.assert_array_equal(found.steps.action, given.action)
    np.testing.assert_array_equal(found.steps.state, given.state)
    assert np.bincount(found.steps.episode).tolist() == LENGTHS
    card = found.card
    assert (card.env, card.maze, card.fps, card.policy) == ("frames of images", [], 20, "imported from frames")
    given.rows.reverse()
    shuffled = given.import_to(tmp_path / "parquet", "parquet")
    for row in given.rows:
        row["action"] = [row.pop(f"action_{i}") for i in range(3)]
        row["state"] = [row.pop(f"state_{i}") for i in range(2)]
    lists = given.import_to(tmp_path / "lists", "parquet")
    assert card.fingerprint == shuffled.card.fingerprint == lists.card.fingerprint


def test_frames_of_videos_are_kept_exactly_and_read_from_the_middle_too(given: Given, tmp_path: Path) -> None:
    given.as_videos()
    whole = given.import_to(tmp_path / "out")
    np.testing.assert_array_equal(whole.read_frames(range(ROWS)), given.frames)
    for lost in (0, 1):
        (tmp_path / "out" / f"frames-{lost:06d}.tar").unlink()
        again = given.import_to(tmp_path / "out", "parquet")
        assert again.card == whole.card
        np.testing.assert_array_equal(again.read_frames(range(ROWS)), given.frames)


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".avi", ".mov"])
def test_every_kind_of_video_gives_each_frame_once_in_order(given: Given, tmp_path: Path, suffix: str) -> None:
    # Grey steps that survive a lossy codec.
    levels = np.arange(40, 40 + 10 * ROWS, 10, dtype=np.uint8)
    given.frames = np.broadcast_to(levels[:, None, None, None], (ROWS, 32, 32, 3)).copy()
    given.as_videos(suffix, codec={".webm": "libvpx", ".avi": "mpeg4"}.get(suffix, "libx264"))
    found = given.import_to(tmp_path / "out").read_frames(range(ROWS))
    assert np.abs(found.mean((1, 2, 3)) - levels).max() < 5


def test_a_video_of_changing_frame_rate_loses_no_frame(given: Given, tmp_path: Path) -> None:
    given.as_videos()
    for episode in range(len(LENGTHS)):
        video = given.folder / f"{episode}.mkv"
        uneven = given.folder / f"{episode}.nut.mkv"
        # Every third frame comes half a second late.
        ffmpeg("-i", video, "-vf", "setpts=PTS+floor(N/3)*0.5/TB", "-fps_mode", "passthrough", "-c:v", "ffv1", uneven)
        uneven.replace(video)
    np.testing.assert_array_equal(given.import_to(tmp_path / "out").read_frames(range(ROWS)), given.frames)


def ffmpeg(*words: object) -> None:
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *map(str, words)], check=True)


def test_images_of_other_kinds_are_read(given: Given, tmp_path: Path) -> None:
    changes: list[tuple[str, Callable[[Image.Image], Image.Image], dict[str, Any]]] = [
        (".webp", lambda image: image, {"lossless": True}),
        (".bmp", lambda image: image, {}),
        (".png", lambda image: image.convert("RGBA"), {}),
        (".png", lambda image: image.convert("P", palette=Image.Palette.ADAPTIVE, colors=256), {}),
    ]
    for row, (suffix, change, settings) in zip(given.rows, changes, strict=False):
        path = given.folder / row["file"]
        image = change(Image.open(path))
        row["file"] = row["file"].replace(".png", suffix)
        image.save(given.folder / row["file"], **settings)
    # Of an MPO photo the first picture is read.
    second = [Image.fromarray(255 - given.frames[5])]
    for row, kind, settings in ((4, "JPEG", {}), (5, "MPO", {"save_all": True, "append_images": second})):
        given.rows[row]["file"] = given.rows[row]["file"].replace(".png", ".JPG")
        Image.fromarray(given.frames[row]).save(given.folder / given.rows[row]["file"], kind, quality=95, **settings)
    found = given.import_to(tmp_path / "out").read_frames(range(6))
    np.testing.assert_array_equal(found[:3], given.frames[:3])
    assert (np.abs(found[3:].astype(int) - given.frames[3:6]).mean((1, 2, 3)) < 5).all()


def test_crop_and_size_are_applied_and_recorded(given: Given, tmp_path: Path) -> None:
    for row, frame in zip(given.rows, given.frames, strict=True):
        wide = np.pad(frame, ((0, 0), (4, 4), (0, 0)))
        Image.fromarray(wide).save(given.folder / row["file"])
    with pytest.raises(UserError, match=r"0\.png is 40 x 32 .*--crop"):
        given.import_to(tmp_path / "refused")
    cropped = given.import_to(tmp_path / "cropped", crop="center")
    np.testing.assert_array_equal(cropped.read_frames(range(ROWS)), given.frames)
    small = given.import_to(tmp_path / "small", crop="center", image_size=16)
    assert small.read_frames([0]).shape == (1, 16, 16, 3)
    assert small.card.env == "frames of images, cropped to the central square, resized to 16 px (bicubic)"
    with pytest.raises(UserError, match="cropped"):
        given.import_to(tmp_path / "cropped", crop="center", image_size=32)
    Image.new("RGB", (40, 40)).save(given.folder / given.rows[1]["file"])
    with pytest.raises(UserError, match=r"1\.png .*40 .*32.*--image-size"):
        given.import_to(tmp_path / "others", crop="center")


def test_a_dataset_without_a_maze_is_fitted_and_extracted(given: Given, encoder: Encoder, tmp_path: Path) -> None:
    frames = given.import_to(tmp_path / "out")
    fitted = fit(frames, "tcn", tmp_path / "tcn.safetensors", TcnOptions(steps=1, batch=2), max_frames=50, device="cpu")
    assert fitted.landscape is None
    extract(frames, encoder, tmp_path / "store.zarr")
    store = TokenStore.open(tmp_path / "store.zarr")
    assert store.card.dataset["maze"] == []
    np.testing.assert_array_equal(store.action, given.action)
    np.testing.assert_array_equal(store.state, given.state)


def test_a_stopped_import_continues_after_the_file_is_repaired(given: Given, tmp_path: Path) -> None:
    path = given.folder / given.rows[10]["file"]
    whole = path.read_bytes()
    path.write_bytes(whole[:200])
    with pytest.raises(UserError, match=r"run 1/5\.png"):
        given.import_to(tmp_path / "out")
    assert sorted(tar.name for tar in (tmp_path / "out").glob("*.tar")) == ["frames-000000.tar", "frames-000002.tar"]
    path.write_bytes(whole)
    np.testing.assert_array_equal(given.import_to(tmp_path / "out").read_frames(range(ROWS)), given.frames)


@pytest.mark.parametrize(("length", "numbers"), [(8, "8 .* 9 rows"), (11, "9 rows")])
def test_a_video_of_another_length_than_its_rows_is_refused(
    given: Given, tmp_path: Path, length: int, numbers: str
) -> None:
    given.as_videos()
    frames = np.resize(given.frames, (length, 32, 32, 3))
    iio.imwrite(given.folder / "1.mkv", frames, plugin="FFMPEG", fps=7, codec="ffv1", pixelformat="bgr0")
    with pytest.raises(UserError, match=rf"1\.mkv.*{numbers}"):
        given.import_to(tmp_path / "out")


def test_a_playlist_with_the_suffix_of_a_video_is_not_followed(given: Given, tmp_path: Path) -> None:
    given.as_videos()
    secret = tmp_path / "secret.mkv"
    (given.folder / "0.mkv").rename(secret)
    for text in (f"#EXTM3U\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n", f"ffconcat version 1.0\nfile '{secret}'\n"):
        (given.folder / "0.mkv").write_text(text)
        with pytest.raises(UserError, match=r"0\.mkv"):
            given.import_to(tmp_path / "out")


def bad_rows(**change: Any) -> Callable[[Given], None]:
    return lambda given: given.rows[7].update(change)


def bad_image(image: Image.Image, **settings: Any) -> Callable[[Given], None]:
    return lambda given: image.save(given.folder / given.rows[0]["file"], "PNG", **settings)


def without(column: str) -> Callable[[Given], None]:
    def change(given: Given) -> None:
        for row in given.rows:
            del row[column]

    return change


def with_column(column: str, value: Any) -> Callable[[Given], None]:
    def change(given: Given) -> None:
        for row in given.rows:
            row[column] = value

    return change


def link_outside(given: Given) -> None:
    path, outside = given.folder / given.rows[4]["file"], given.folder.parent / "elsewhere.png"
    path.rename(outside)
    path.symlink_to(outside)


def lonely_frame(given: Given) -> None:
    given.rows = given.rows[:15]
    given.rows[14].update(action_0="", action_1="", action_2="")


BROKEN: dict[str, tuple[Callable[[Given], object], tuple[str, ...]]] = {
    "outside": (bad_rows(file="../steps.csv.png"), ("steps.csv", "../steps.csv.png")),
    "absolute": (bad_rows(file="/etc/passwd.png"), ("steps.csv", "/etc/passwd.png")),
    "a link outside": (link_outside, ("run 0/4.png",)),
    "no image": (bad_rows(file="run 0/0.txt"), ("run 0/0.txt", ".png")),
    "gone": (bad_rows(file="run 0/77.png"), ("steps.csv", "run 0/77.png")),
    "a gap in steps": (bad_rows(step=20), ("line 10", "episode 1, step 3")),
    "a gap in episodes": (lambda given: given.rows.__delitem__(slice(5, 14)), ("line 7", "episode 2, step 0")),
    "a row twice": (lambda given: given.rows.append(given.rows[-1]), ("line 22", "episode 2, step 5")),
    "half a step": (bad_rows(step=2.5), ("steps.csv", "step")),
    "no step": (without("step"), ("steps.csv", "step")),
    "no file": (without("file"), ("steps.csv", "file", "video")),
    "file and video": (with_column("video", "a.mp4"), ("steps.csv", "file", "video")),
    "a gap in actions": (without("action_1"), ("action_0, action_2",)),
    "both kinds of actions": (with_column("action", 1.0), ("action_0",)),
    "a column of text": (with_column("weather", "fine"), ("steps.csv", "weather", "string")),
    "an end of 2": (with_column("terminated", 2), ("steps.csv", "terminated")),
    "a name that a store has": (with_column("tokens", 1.0), ("steps.csv", "tokens")),
    "a name that is a path": (with_column("a/b", 1.0), ("steps.csv", "a/b")),
    "an empty reward": (with_column("reward", ""), ("steps.csv", "reward")),
    "words": (bad_rows(action_2="left"), ("action", "string")),
    "too large": (bad_rows(action_0=1e40), ("action_0", "1e+40", "line 9")),
    "transparent": (bad_image(Image.new("RGBA", (32, 32))), ("0.png", "--background")),
    "animated": (
        bad_image(Image.new("RGB", (32, 32)), save_all=True, append_images=[Image.new("RGB", (32, 32), "red")]),
        ("0.png",),
    ),
    "a bomb": (bad_image(Image.new("1", (20000, 9000))), ("0.png",)),
    "another kind": (
        lambda given: Image.new("RGB", (32, 32)).save(given.folder / given.rows[0]["file"], "GIF"), ("0.png",)
    ),
    "a lonely frame": (lonely_frame, ("episode 2", "line 16")),
    "no rows": (lambda given: given.rows.clear(), ("steps.csv",)),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_bad_data_is_refused_before_anything_is_written(given: Given, tmp_path: Path, name: str) -> None:
    change, named = BROKEN[name]
    change(given)
    with pytest.raises(UserError) as refused:
        given.import_to(tmp_path / "out")
    assert all(part in str(refused.value) for part in named), refused.value
    assert not (tmp_path / "out").exists()


def test_the_command_imports_and_fails_in_one_line(
    given: Given, tmp_path: Path, run_import: Callable[..., Any]
) -> None:
    out, table = tmp_path / "out", given.table()
    words = ("frames", given.folder, "--actions", table, "--out", out, "--frames-per-shard", 8, "--image-size", 16)
    result = run_import(*words)
    assert result.exit_code == 0, result.output
    assert f"{out}: 3 episodes, 20 frames, 3 shards" in result.stdout
    assert json.loads((out / "dataset.json").read_text())["image_size"] == 16
    for wrong in ("steps.txt", "nothing.csv", "nothing.parquet"):
        (tmp_path / "steps.txt").write_text("episode")
        result = run_import("frames", given.folder, "--actions", tmp_path / wrong, "--out", tmp_path / "other")
        assert result.exit_code == 1
        assert str(tmp_path / wrong) in result.stderr
