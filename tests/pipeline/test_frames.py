"""Frames that are read back. Damaged and hostile datasets are tested in tests/faults."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from wmcache.common.errors import UserError
from wmcache.pipeline.frames import FrameDataset


def test_frames_are_read_in_any_order(dataset: FrameDataset) -> None:
    everything = np.concatenate([dataset.read_shard(shard) for shard in range(dataset.card.num_shards)])
    wanted = [359, 0, 64, 63, 0]
    np.testing.assert_array_equal(dataset.read_frames(wanted), everything[wanted])
    assert everything.shape == (360, 32, 32, 3)
    assert [record["frames"] for record in dataset.card.shards] == [64] * 5 + [40]


# webdataset leaves open tars to the garbage collector.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_shards(dataset_path: Path, dataset: FrameDataset) -> None:
    tars = [str(tar) for tar in sorted(dataset_path.glob("*.tar"))]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8"))
    keys = [f"{episode:06d}-{step:05d}" for episode in range(6) for step in range(60)]
    assert [sample["__key__"] for sample in samples] == keys
    np.testing.assert_array_equal([sample["png"] for sample in samples], dataset.read_frames(range(360)))


def test_pyarrow_reads_the_steps(dataset_path: Path, dataset: FrameDataset) -> None:
    table = pq.read_table(dataset_path / "steps.parquet")
    assert table.schema.names == ["episode", "step", "action", "state"]
    assert table["episode"].to_pylist() == np.repeat(np.arange(6), 60).tolist()
    assert table["step"].to_pylist() == [*range(60)] * 6
    np.testing.assert_array_equal(table["action"].to_pylist(), dataset.steps.action)
    np.testing.assert_array_equal(table["state"].to_pylist(), dataset.steps.state)


def test_a_missing_dataset_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere/dataset\.json .*wmcache collect"):
        FrameDataset.open(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "{", "[]", '"frames"', "{}", '{"colour": "blue"}'])
def test_a_garbled_card_and_another_format_are_refused(copied: Path, text: str) -> None:
    card = json.loads((copied / "dataset.json").read_bytes())
    (copied / "dataset.json").write_text(text)
    with pytest.raises(UserError, match=r"dataset\.json"):
        FrameDataset.open(copied)
    (copied / "dataset.json").write_text(json.dumps(card | {"format_version": 99}))
    with pytest.raises(UserError, match=r"99.* 1;"):
        FrameDataset.open(copied)


def _edit_table(edit: Callable[[pa.Table], pa.Table]) -> Callable[[Path], object]:
    return lambda file: pq.write_table(edit(pq.read_table(file)), file)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(_edit_table(lambda table: table.take(list(range(len(table)))[::-1])), id="reversed"),
        pytest.param(_edit_table(lambda table: table.drop_columns(["state"])), id="column lost"),
        pytest.param(lambda file: file.write_bytes(b""), id="empty"),
        pytest.param(lambda file: file.write_bytes(file.read_bytes()[:-1]), id="last byte lost"),
        pytest.param(lambda file: file.unlink(), id="missing"),
    ],
)
def test_damaged_steps_are_named(copied: Path, damage: Callable[[Path], object]) -> None:
    damage(copied / "steps.parquet")
    with pytest.raises(UserError, match=r"steps\.parquet"):
        FrameDataset.open(copied)
