"""Frames that are read back. Damaged and hostile datasets are tested in tests/faults."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset

from wmcache.pipeline.frames import FrameDataset


def test_frames_are_read_in_any_order(dataset: FrameDataset) -> None:
    everything = np.concatenate([dataset.read_shard(shard) for shard in range(dataset.num_shards)])
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
