"""A store of many shards without data, made by the real writer."""

from __future__ import annotations

from pathlib import Path

import pytest

from wmcache.bench.plan_job import measure_scale
from wmcache.cache import TokenStore
from wmcache.cache.records import IN_A_BLOCK, commits
from wmcache.common.errors import UserError

SHARDS = 2 * IN_A_BLOCK + 3


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("scale")
    return folder / f"{SHARDS}.zarr", measure_scale(SHARDS, frames_per_shard=4, tokens=4, token_dim=8, keep=folder)


def test_the_measured_store_is_complete_in_blocks_and_single_records(measured: tuple[Path, dict[str, float]]) -> None:
    store = TokenStore.open(measured[0])
    assert store.complete
    assert (store.card.num_shards, len(store)) == (SHARDS, 4 * SHARDS)
    assert sorted(file.name for file in commits(measured[0]).iterdir()) == [
        *(f"{2 * IN_A_BLOCK + i:06d}.json" for i in range(3)),
        *("block-000000.safetensors", "block-000001.safetensors"),
    ]


def test_every_figure_is_measured(measured: tuple[Path, dict[str, float]]) -> None:
    figures = measured[1]
    assert (figures["shards"], figures["frames"]) == (SHARDS, 4 * SHARDS)
    assert all(value > 0 for value in figures.values())
    assert 2**20 < figures["peak_memory"] < 2**30


def test_a_folder_with_such_a_store_is_refused(measured: tuple[Path, dict[str, float]]) -> None:
    with pytest.raises(UserError, match=rf"{SHARDS}\.zarr"):
        measure_scale(SHARDS, frames_per_shard=4, tokens=4, token_dim=8, keep=measured[0].parent)
