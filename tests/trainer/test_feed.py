"""The next batch: the one that the order says, whoever reads it and wherever it starts."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
from wmcache.cache import TokenStore, UserError
from wmcache.cache.layout import shard_file
from wmcache.cache.windows import batch_windows
from wmcache.trainer.feed import Feed

CPU = torch.device("cpu")


@pytest.mark.parametrize("first", [0, 7])
def test_it_gives_the_batches_of_the_order(store: TokenStore, first: int) -> None:
    windows = store.windows(3, 1, 5, "train")
    # More steps than an epoch has, so that the next epoch's order is met as well.
    steps = 2 * len(windows) // 50
    with Feed(store, windows, batch=50, seed=3, device=CPU, first=first) as feed:
        for step in range(first, first + steps):
            expected = windows.batch(batch_windows(len(windows), 3, step, 50))
            batch = feed.next()
            assert batch.keys() == expected.keys()
            for name, value in expected.items():
                np.testing.assert_array_equal(batch[name].numpy(), value)


@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_batch_stays_as_it_is_while_the_next_one_is_read(store: TokenStore, first: int) -> None:
    windows = store.windows(3, 1, 5, "train")
    with Feed(store, windows, batch=8, seed=0, device=CPU, first=first) as feed:
        feed.next()
        batch = feed.next()
        before = batch["tokens"].clone()
    # Leaving waits for the read that ran beside the use of this batch.
    assert torch.equal(batch["tokens"], before)


def test_a_damaged_store_stops_the_training_and_not_only_the_reader(store_path: Path, tmp_path: Path) -> None:
    copy = copytree(store_path, tmp_path / "store.zarr")
    store = TokenStore.open(copy)
    for shard in range(6):
        shard_file(copy, shard).write_bytes(b"not a shard")
    windows = store.windows(3, 1, 5, "train")
    with Feed(store, windows, batch=8, seed=0, device=CPU) as feed, pytest.raises(UserError, match="wmcache repair"):
        feed.next()
