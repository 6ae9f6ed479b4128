from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from wmcache.cli import main
from wmcache.common.columns import Column
from wmcache.common.errors import UserError
from wmcache.pipeline import export_lerobot as module
from wmcache.pipeline.export_lerobot import export_lerobot, feature_names, image_stats
from wmcache.pipeline.frames import FrameDataset
from wmcache.pipeline.importers import Source, write_dataset
from wmcache.pipeline.importers.lerobot import LeRobotImporter
from wmcache.pipeline.steps import Steps

from ..conftest import contents

LENGTHS = [7, 12, 5]
DESCRIBED = {
    "action": Column(("action",), "float32", (2,), (-2.0, 0.0), (2.0, 1.0)),
    "state": Column(("state",), "float64", (3,)),
    "speed": Column(("proprio",), "float64", (1,)),
    "reward": Column(("reward",), "float64"),
    "terminated": Column(("terminated",), "bool"),
    "truncated": Column(("truncated",), "bool"),
    "force": Column(("extra",), "float32", (2, 2)),
    "task_index": Column(("extra",), "int64"),
    "light": Column(("extra",), "uint8", (3,)),
}


@pytest.fixture
def rich(dataset: FrameDataset, tmp_path: Path) -> FrameDataset:
    """A dataset of every kind of column, with frames of the shared dataset."""
    rng, count = np.random.default_rng(0), sum(LENGTHS)
    episode = np.repeat(np.arange(3, dtype=np.int32), LENGTHS)
    step = np.concatenate([np.arange(length, dtype=np.int32) for length in LENGTHS])
    columns = {
        name: (rng.normal(size=(count, *column.shape)) * 10 + 50).astype(column.dtype)
        for name, column in DESCRIBED.items()
    }
    columns["terminated"] = step == 4
    frames = dataset.read_frames(range(count))
    starts = np.flatnonzero(step == 0)

    def read(episode: int, wanted: range) -> Any:
        return iter(frames[starts[episode] + wanted.start : starts[episode] + wanted.stop])

    steps = Steps(episode, step, columns, DESCRIBED)
    source = Source("test", steps, frames.shape[1], read, "ball", (), "random", 7)
    write_dataset(source, tmp_path / "rich", frames_per_shard=10)
    return FrameDataset.open(tmp_path / "rich")


def imported(folder: Path, out: Path) -> FrameDataset:
    write_dataset(LeRobotImporter(str(folder)).open(), out, frames_per_shard=10)
    return FrameDataset.open(out)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several files: the first two episodes together."""
    monkeypatch.setattr(module, "FRAMES_PER_FILE", 10)


@pytest.mark.usefixtures("small")
def test_an_import_of_the_export_has_the_same_columns_and_close_frames(rich: FrameDataset, tmp_path: Path) -> None:
    assert export_lerobot(rich, tmp_path / "lerobot") == 2
    found = imported(tmp_path / "lerobot", tmp_path / "again")
    assert found.steps.described == rich.steps.described
    assert found.steps.sha256() == rich.steps.sha256()
    assert found.card.fps == 7
    frames = range(len(rich.steps))
    # Half the colours of 32 px with sharp edges, and a lossy codec: 3.5 of 255.
    assert np.abs(found.read_frames(frames).astype(int) - rich.read_frames(frames)).mean((1, 2, 3)).max() < 5


def test_a_feature_that_was_changed_after_the_export_is_refused(rich: FrameDataset, tmp_path: Path) -> None:
    export_lerobot(rich, tmp_path / "lerobot")
    data = tmp_path / "lerobot" / "data" / "chunk-000" / "file-000.parquet"
    table = pq.read_table(data)
    at, reward = table.column_names.index("next.reward"), table["next.reward"].cast(pa.float32(), safe=False)
    pq.write_table(table.set_column(at, "next.reward", reward), data)
    with pytest.raises(UserError, match=r"next\.reward is float32"):
        imported(tmp_path / "lerobot", tmp_path / "again")


@pytest.mark.usefixtures("small")
def test_a_repeated_export_writes_what_is_missing_with_the_same_bytes(rich: FrameDataset, tmp_path: Path) -> None:
    out = tmp_path / "lerobot"
    export_lerobot(rich, out)
    before = contents(out)
    for lost in (
        "videos/observation.image/chunk-000/file-001.mp4",
        "meta/episodes/chunk-000/file-001.parquet",
        "meta/info.json",
    ):
        (out / lost).unlink()
    export_lerobot(rich, out)
    assert contents(out) == before


@pytest.mark.usefixtures("small")
def test_tables_are_as_lerobot_writes_them(rich: FrameDataset, tmp_path: Path) -> None:
    out = tmp_path / "lerobot"
    export_lerobot(rich, out)
    info = json.loads((out / "meta" / "info.json").read_text())
    assert (info["codebase_version"], info["total_frames"], info["splits"]) == ("v3.0", 24, {"train": "0:3"})
    data = pq.read_table(out / "data" / "chunk-000" / "file-001.parquet")
    assert data.column_names == [name for name in info["features"] if name != "observation.image"]
    assert data["index"].to_pylist() == list(range(19, 24))
    assert data["timestamp"].type == pa.float32()
    assert data["action"].type == pa.list_(pa.float32(), 2)
    assert data["next.done"].type == pa.bool_()
    episodes = pq.read_table(out / "meta" / "episodes" / "chunk-000" / "file-000.parquet").to_pylist()
    assert episodes[1]["videos/observation.image/from_timestamp"] == 1.0
    assert (episodes[1]["dataset_from_index"], episodes[1]["dataset_to_index"], episodes[1]["tasks"]) == (
        7,
        19,
        ["ball"],
    )
    stats = json.loads((out / "meta" / "stats.json").read_text())
    values, pixels = rich.steps.columns["state"], rich.read_frames(range(24)) / 255
    for name, slow in (("mean", np.mean), ("std", np.std), ("min", np.min), ("max", np.max)):
        np.testing.assert_allclose(stats["observation.environment_state"][name], slow(values, axis=0))
        np.testing.assert_allclose(np.ravel(stats["observation.image"][name]), slow(pixels, axis=(0, 1, 2)))
    assert stats["action"]["count"] == [24]


def test_quantiles_of_pixels_are_those_of_numpy() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)) // 3
    counts = np.stack([np.bincount(pixels[..., channel].ravel(), minlength=256) for channel in range(3)])
    found = image_stats(counts, 4, 8)
    for name, share in module.QUANTILES.items():
        slow = np.quantile(pixels.reshape(-1, 3), share, axis=0, method="inverted_cdf") / 255
        np.testing.assert_allclose(found[name][:, 0, 0], slow)


def test_proprio_is_the_state_of_lerobot() -> None:
    assert feature_names(DESCRIBED)["speed"] == "observation.state"
    plain = {"action": DESCRIBED["action"], "state": Column(("state", "proprio"), "float64", (4,))}
    assert feature_names(plain) == {"action": "action", "state": "observation.state"}
    with pytest.raises(UserError, match="image"):
        feature_names({"image": DESCRIBED["light"]})


def test_the_command_exports_and_refuses_another_dataset(
    rich: FrameDataset, dataset_path: Path, tmp_path: Path
) -> None:
    words = ["export", "lerobot", "--out", str(tmp_path / "lerobot"), "--dataset"]
    result = CliRunner().invoke(main, [*words, str(rich.path)])
    assert result.exit_code == 0, result.output
    assert "3 episodes, 24 frames, 1 videos" in result.stdout
    assert "another dataset" in CliRunner().invoke(main, [*words, str(dataset_path)]).stderr
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    words[3] = str(tmp_path / "full")
    assert "--out" in CliRunner().invoke(main, [*words, str(rich.path)]).stderr
