"""A store of many shards without data, made by the real writer."""

from __future__ import annotations

from pathlib import Path

import pytest

from wmcache.bench.plan_job import measure_scale
from wmcache.cache import TokenStore
from wmcache.cache.records import IN_A_BLOCK, commits
from wmcache.common.errors import UserError

SHARDS = 2 * IN_A_BLOCK + 3


def test_a_complete_store_in_blocks_and_single_records_is_measured_and_kept(tmp_path: Path) -> None:
    sizes = {"frames_per_shard": 4, "tokens": 4, "token_dim": 8}
    figures, path = measure_scale(SHARDS, **sizes, keep=tmp_path), tmp_path / f"{SHARDS}.zarr"
    store = TokenStore.open(path)
    assert store.complete
    assert (store.card.num_shards, len(store)) == (figures["shards"], figures["frames"]) == (SHARDS, 4 * SHARDS)
    assert sorted(file.name for file in commits(path).iterdir()) == [
        *(f"{2 * IN_A_BLOCK + i:06d}.json" for i in range(3)),
        *("block-000000.safetensors", "block-000001.safetensors"),
    ]
    assert all(value > 0 for value in figures.values())
    assert 2**20 < figures["peak_memory"] < 2**30
    with pytest.raises(UserError, match=rf"{SHARDS}\.zarr"):
        measure_scale(SHARDS, **sizes, keep=tmp_path)
