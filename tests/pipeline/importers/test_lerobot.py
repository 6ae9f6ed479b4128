"""`tests/data/lerobot-0.4.4.tar.xz` was written by lerobot itself, by `tests/data/make_lerobot.py`."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from wmcache.common.columns import Column
from wmcache.common.errors import UserError
from wmcache.pipeline.frames import FrameDataset
from wmcache.pipeline.importers import write_dataset
from wmcache.pipeline.importers.lerobot import LeRobotImporter

KEPT = Path(__file__).parents[2] / "data" / "lerobot-0.4.4.tar.xz"
LENGTHS = [5, 9, 6]
TOP, WRIST = "observation.images.top", "observation.images.wrist"


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """The folders `video`, with two cameras, and `image`, with one whose images are in the table."""
    with tarfile.open(KEPT) as archive:
        archive.extractall(tmp_path / "lerobot", filter="data")
    return tmp_path / "lerobot"


def import_lerobot(folder: Path, out: Path, **options: Any) -> FrameDataset:
    write_dataset(LeRobotImporter(str(folder), **options).open(), out, frames_per_shard=8)
    return FrameDataset.open(out)


def expected_columns() -> dict[str, np.ndarray]:
    rng, rows = np.random.default_rng(0), []
    for number in range(20):
        action, state = rng.uniform(-1, 1, 2).astype(np.float32), rng.normal(size=3).astype(np.float32)
        rows.append((action, state, rng.normal(size=(2, 2)), number / 4))
    columns = dict(zip(("action", "state", "force", "reward"), map(np.stack, zip(*rows, strict=True)), strict=True))
    ends = np.isin(np.arange(20), np.cumsum(LENGTHS) - 1)
    return {**columns, "terminated": ends, "task_index": np.repeat([0, 1, 0], LENGTHS)}


def expected_frames(camera: int) -> np.ndarray:
    frames = np.broadcast_to((40 + 8 * np.arange(20, dtype=np.uint8))[:, None, None, None], (20, 32, 32, 3)).copy()
    corner = slice(0, 8) if camera == 0 else slice(-8, None)
    frames[:, corner, corner] = 255
    return frames


def test_episodes_inside_one_video_are_cut_at_their_time_stamps(kept: Path, tmp_path: Path) -> None:
    for camera, name in enumerate((TOP, WRIST)):
        out = tmp_path / name
        found = import_lerobot(kept / "video", out, camera=name)
        # The codec is lossy.
        assert np.abs(found.read_frames(range(20)).astype(int) - expected_frames(camera)).mean((1, 2, 3)).max() < 3
        (out / "frames-000001.tar").unlink()  # frames 8 to 15: inside episode 1, and 2 frames of the next
        assert import_lerobot(kept / "video", out, camera=name).card == found.card
    assert (found.card.env, found.card.fps, found.card.image_size) == ("lerobot video", 10, 32)
    assert np.bincount(found.steps.episode).tolist() == LENGTHS


@pytest.mark.parametrize("kind", ["video", "image"])
def test_all_columns_are_kept_with_their_roles(
    kept: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = import_lerobot(kept / kind, tmp_path / "out", **({"camera": TOP} if kind == "video" else {}))
    if kind == "image":
        np.testing.assert_array_equal(found.read_frames(range(20)), expected_frames(0))
    for name, values in expected_columns().items():
        np.testing.assert_array_equal(found.steps.columns[name], values)
    assert found.card.columns == {
        "action": Column(("action",), "float32", (2,), (-1.0, -1.0), (1.0, 1.0)),
        "state": Column(("state", "proprio"), "float64", (3,)),
        "force": Column(("extra",), "float64", (2, 2)),
        "reward": Column(("reward",), "float32"),
        "terminated": Column(("terminated",), "bool"),
        "task_index": Column(("extra",), "int64"),
    }
    assert "tasks.parquet" in (noted := capsys.readouterr().err)
    assert (WRIST in noted) == (kind == "video")
    dropped = import_lerobot(kept / "image", tmp_path / "less", drop="observation.force,task_index")
    assert dropped.card.columns.keys() == {"action", "state", "reward", "terminated"}


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(path)), path)


def replace(name: str, change: Callable[[np.ndarray], Any]) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.column_names.index(name), name, [change(table[name].to_numpy())])


def edit_info(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "meta" / "info.json"
    change(info := json.loads(path.read_text()))
    path.write_text(json.dumps(info))


def test_rows_in_several_files_and_any_order_give_the_same_dataset(kept: Path, tmp_path: Path) -> None:
    whole = import_lerobot(kept / "image", tmp_path / "whole")
    data = kept / "image" / "data" / "chunk-000" / "file-000.parquet"
    table = pq.read_table(data)
    pq.write_table(table.slice(0, 7), data)
    pq.write_table(table.slice(7).take(np.arange(12, -1, -1)), data.with_name("file-001.parquet"))
    assert import_lerobot(kept / "image", tmp_path / "split").card.fingerprint == whole.card.fingerprint


def test_what_does_not_fit_is_refused_by_name(kept: Path, tmp_path: Path) -> None:
    video, image = kept / "video", kept / "image"
    episodes = Path("meta/episodes/chunk-000/file-000.parquet")
    data = Path("data/chunk-000/file-000.parquet")

    def refused(folder: Path, match: str, **options: Any) -> None:
        with pytest.raises(UserError, match=match):
            import_lerobot(folder, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    refused(video, f"--camera, one of {TOP}, {WRIST}")
    refused(video, "action.*--camera", camera="action")
    refused(image, r"--drop force.*observation\.force", drop="force")
    refused(tmp_path, "info.json")
    name = f"videos/{TOP}/from_timestamp"
    rewrite(video / episodes, replace(name, lambda times: times + 0.04 * (times > 1)))
    whole = LeRobotImporter(str(video), camera=TOP).open()
    with pytest.raises(UserError, match=r"file-000\.mp4 .*1\.44"):
        list(whole.read(2, range(6)))
    (video / "videos" / TOP / "chunk-000" / "file-000.mp4").unlink()
    refused(video, r"file-000\.mp4 does not exist", camera=TOP)
    text = pa.array(["go"] * 20)
    rewrite(image / data, lambda table: table.append_column("order", text))
    edit_info(image, lambda info: info["features"].update(order={"dtype": "string", "shape": [1], "names": None}))
    refused(image, "order.*string.*--drop")
    import_lerobot(image, tmp_path / "dropped", drop="order")
    rewrite(image / data, lambda table: table.slice(0, 19))
    refused(image, "data .*meta/episodes")
    edit_info(image, lambda info: info.update(codebase_version="v2.1"))
    refused(image, "v2.1.*convert_dataset_v21_to_v30")


def test_the_state_of_the_environment_is_not_proprio(kept: Path, tmp_path: Path) -> None:
    folder = kept / "image"
    data = folder / "data" / "chunk-000" / "file-000.parquet"
    rewrite(data, lambda table: table.append_column("observation.environment_state", table["action"]))
    feature = {"dtype": "float32", "shape": [2], "names": None}
    edit_info(folder, lambda info: info["features"].update({"observation.environment_state": feature}))
    steps = import_lerobot(folder, tmp_path / "out").steps
    np.testing.assert_array_equal(steps.state, expected_columns()["action"])
    np.testing.assert_array_equal(steps.proprio, expected_columns()["state"])


def test_the_command_imports(kept: Path, tmp_path: Path, run_import: Callable[..., Any]) -> None:
    words = ("lerobot", kept / "video", "--camera", WRIST, "--image-size", 16, "--out", tmp_path / "out")
    result = run_import(*words)
    assert result.exit_code == 0, result.output
    assert "3 episodes, 20 frames" in result.stdout
    assert FrameDataset.open(tmp_path / "out").card.image_size == 16
    assert "--camera" in run_import(*words[:2], "--out", tmp_path / "other").stderr
