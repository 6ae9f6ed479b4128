"""Windows as a torch dataset: the same batches with and without workers, forked and spawned."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from wmcache.cache import TokenStore
from wmcache.cache.joined import open_stores
from wmcache.cache.windows import Goals
from wmcache.common.errors import UserError
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.extract import extract
from wmcache.pipeline.frames import FrameDataset

from ..conftest import IDENTITY, make_writer, write

Batches = list[dict[str, torch.Tensor]]


def batches(data: Any, **settings: Any) -> Batches:
    return list(DataLoader(data, batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(0), **settings))


def assert_equal(some: Batches, others: Batches) -> None:
    assert len(some) == len(others) > 1
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_items_are_the_windows(store: TokenStore) -> None:
    data, windows = store.torch_dataset(history=2, frameskip=3, split="train"), store.windows(2, 1, 3, "train")
    batch = windows.batch(np.arange(len(windows)))
    assert len(data) == len(windows)
    for chosen in ([0, 5, 5, len(data) - 1], [-1, 2]):
        for number, item in zip(chosen, data.__getitems__(chosen), strict=True):
            assert item.keys() == batch.keys() == {"tokens", "proprio", "action"}
            for name, values in item.items():
                np.testing.assert_array_equal(values.numpy(), batch[name][number])
    assert data[3]["tokens"].dtype == torch.float16
    assert sum(1 for _ in data) == len(data)  # which ends by an IndexError


@pytest.fixture(scope="module")
def narrow(dataset: FrameDataset, encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("narrow") / "tcn-64-int8.zarr"
    extract(dataset, encoder, path, dtype="int8")
    return path


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_give_the_same_batches(method: str, narrow: Path) -> None:
    data = TokenStore.open(narrow).torch_dataset(frameskip=2, whole=True)
    alone = batches(data)
    assert "weight" in alone[0]
    assert_equal(batches(data, num_workers=2, multiprocessing_context=method), alone)


def test_several_stores_and_tokens_in_memory_cross_a_fork(finished: Path, planted_path: Path, tmp_path: Path) -> None:
    write(make_writer(tmp_path / "more.zarr", replace(IDENTITY, dataset_fingerprint="ef" * 32)))
    loaded = TokenStore.open(copytree(planted_path, tmp_path / "loaded.zarr"))
    loaded.load()
    rmtree(tmp_path / "loaded.zarr/tokens")
    for source in (open_stores([finished, tmp_path / "more.zarr"]), loaded):
        data = source.torch_dataset(history=1)
        assert_equal(batches(data, num_workers=2, multiprocessing_context="fork"), batches(data))


def test_a_pickled_store_is_opened_again_and_another_one_is_refused(finished: Path, planted_path: Path) -> None:
    store = TokenStore.open(finished)
    pickled = pickle.dumps(store)
    assert len(pickled) < 2000
    np.testing.assert_array_equal(pickle.loads(pickled).gather(np.arange(50)), store.gather(np.arange(50)))
    rmtree(finished)
    copytree(planted_path, finished)
    with pytest.raises(UserError, match=finished.name):
        pickle.loads(pickled)


def test_goals_and_episodes_that_are_too_short_are_refused(store: TokenStore) -> None:
    from wmcache.cache.torch_dataset import WindowDataset

    with pytest.raises(ValueError, match="goals"):
        WindowDataset(store.windows(goals=Goals()))
    with pytest.raises(UserError, match="history"):
        store.torch_dataset(history=1000)
    with pytest.raises(IndexError):
        store.torch_dataset()[10**6]
