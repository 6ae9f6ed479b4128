from __future__ import annotations

import dataclasses
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from wmcache.cache import TokenStore
from wmcache.common.errors import UserError
from wmcache.pipeline import encoders
from wmcache.pipeline.collect import collect
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.encoders.base import Features
from wmcache.pipeline.encoders.weights import read_metadata
from wmcache.pipeline.extract import encode_frames, extract, extract_together, extraction_task, forecast, slice_of
from wmcache.pipeline.frames import FrameDataset
from wmcache.pipeline.stores import create_store

Snapshot = Callable[[Path], dict[str, bytes]]


def test_the_number_of_processes_and_threads_changes_no_bit(
    dataset: FrameDataset, encoder: Encoder, store_path: Path, tmp_path: Path, contents: Snapshot
) -> None:
    extract(dataset, encoder, tmp_path / "processes.zarr", cluster="local:2")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    extract(dataset, encoder, tmp_path / "threads.zarr")
    torch.set_num_threads(threads)
    every, reference = np.arange(360), TokenStore.open(store_path)
    for name in ("processes.zarr", "threads.zarr"):
        found = TokenStore.open(tmp_path / name).gather(every)
        np.testing.assert_array_equal(found.view(np.uint16), reference.gather(every).view(np.uint16))
        assert contents(tmp_path / name / "tokens") == contents(store_path / "tokens")


def test_the_forecast_counts_missing_shards(dataset: FrameDataset, encoder: Encoder, tmp_path: Path) -> None:
    out, (n, d) = tmp_path / "new.zarr", encoder.frame_shape
    for shards, frames in ((6, 360), (5, 296)):
        plan = forecast(dataset, encoder, out)
        assert (plan.shards, plan.frames, plan.bytes_needed) == (shards, frames, frames * n * d * 2)
        assert plan.seconds > 0
        extract_together(dataset, [(encoder, out)], part=(0, 6))


def test_the_store_of_another_dataset_is_refused(dataset: FrameDataset, encoder: Encoder, store_path: Path) -> None:
    other = FrameDataset(dataset.path, dataclasses.replace(dataset.card, fingerprint="00" * 32), dataset.steps)
    with pytest.raises(UserError, match=f"{store_path} .*dataset_fingerprint: "):
        extract(other, encoder, store_path)


def test_a_dataset_replaced_at_its_path_is_read_again(encoder: Encoder, tmp_path: Path) -> None:
    path = tmp_path / "data"
    for seed in (0, 1):
        fresh = tmp_path / f"seed-{seed}"
        collect("UMaze", fresh, episodes=1, length=4, seed=seed, image_size=32, frames_per_shard=4)
        shutil.rmtree(path, ignore_errors=True)
        fresh.rename(path)
        frames = FrameDataset.open(path)
        extract(frames, encoder, tmp_path / f"{seed}.zarr")
    live = encoder(frames.read_shard(0)).numpy()
    np.testing.assert_allclose(TokenStore.open(tmp_path / "1.zarr").gather(np.arange(4)), live, atol=2e-2, rtol=1e-2)


def test_a_batch_that_does_not_fit_the_device_is_halved(dataset: FrameDataset, encoder: Encoder) -> None:
    class SmallDevice(Encoder):
        """The encoder on a device with memory for 5 frames."""

        def __init__(self) -> None:
            self.__dict__.update(encoder.__dict__)

        def features(self, frames: NDArray[np.uint8] | torch.Tensor, layers: Sequence[str]) -> Features:
            if len(frames) > room:
                raise torch.OutOfMemoryError
            return encoder.features(frames, layers)

    frames, room = dataset.read_shard(0)[:19], 5
    np.testing.assert_allclose(
        encode_frames([SmallDevice()], frames, 16)[0], encode_frames([encoder], frames, 16)[0], atol=2e-2, rtol=1e-2
    )
    room = 0
    with pytest.raises(UserError, match="--device cpu"):
        encode_frames([SmallDevice()], frames, 16)


@pytest.mark.parametrize("count", [1, 2, 4, 6, 9])
def test_slices_are_contiguous_and_together_all_shards(count: int) -> None:
    parts = [slice_of(6, (number, count)) for number in range(count)]
    assert [shard for part in parts for shard in part] == list(range(6))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_worker_with_other_weights_refuses(dataset: FrameDataset, tcn_weights: Path, tmp_path: Path) -> None:
    weights = Path(shutil.copy(tcn_weights, tmp_path / "mine.safetensors"))
    encoder = encoders.create("tcn", weights=weights, device="cpu")
    writer = create_store(dataset, encoder, tmp_path / "x.zarr")
    task = pickle.loads(pickle.dumps(extraction_task(dataset, [(encoder, writer)], device="cpu", batch=8)))
    assert task(3) == 64
    values = {name: value + 0.1 for name, value in load_file(weights).items()}
    save_file(values, weights, read_metadata(weights))
    other = pickle.loads(pickle.dumps(extraction_task(dataset, [(encoder, writer)], device="cpu", batch=8)))
    with pytest.raises(UserError, match=r"tcn .*weights_sha256"):
        other(4)
    assert 4 in writer.pending()
