"""Stores opened by xarray, and stores made before dimensions had names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr

from wmcache.cache import StoreWriter, TokenStore
from wmcache.cache.layout import DamagedError, read_attributes
from wmcache.cache.verify import verify
from wmcache.common.files import sha256_of
from wmcache.common.jsonfiles import read_json, seal, write_json

from ..conftest import IDENTITY, TOKENS, make_writer, write

EVERY = np.arange(50)


def age(path: Path) -> None:
    """Turn a store into one from before dimensions had names: without names, array attributes and consolidated metadata."""
    group = read_json(path / "zarr.json", "")
    for file in path.glob("*/zarr.json"):
        values = {name: value for name, value in read_json(file, "").items() if name != "dimension_names"}
        write_json(file, {**values, "attributes": {}})
    attributes = {
        name: value for name, value in group["attributes"].items() if name not in ("consolidated", "checksum")
    }
    attributes["layout"] = sha256_of(path / "tokens" / "zarr.json")
    del group["consolidated_metadata"]
    write_json(path / "zarr.json", {**group, "attributes": seal(attributes)})


@pytest.mark.parametrize("open_", [xr.open_zarr, lambda path: xr.open_dataset(path, engine="zarr")])
def test_xarray_opens_a_store(finished: Path, open_: Callable[[Path], xr.Dataset]) -> None:
    store, found = TokenStore.open(finished), open_(finished)  # any warning fails a test
    assert found.tokens.dims == ("frame", "token", "channel")
    assert set(found.coords) == {"episode", "step"}
    assert found.tokens.dtype == np.float16
    for frame in (0, 7, 31, 49):
        np.testing.assert_array_equal(found.tokens[frame].values, store.gather(np.array([frame]))[0])
    np.testing.assert_array_equal(found.action.values, store.action)
    np.testing.assert_array_equal(found.state.values, store.state)
    np.testing.assert_array_equal(found.step.values, store.step)
    assert found.tokens.isel(frame=found.episode.values == 1).shape == (30, 6, 4)


def test_xarray_opens_an_incomplete_store(tmp_path: Path) -> None:
    write(make_writer(tmp_path / "part.zarr"), [0])
    found = xr.open_zarr(tmp_path / "part.zarr")
    np.testing.assert_array_equal(found.tokens[:16].values, TOKENS[:16])
    assert np.isnan(found.tokens[16:].values).all()


def test_xarray_opens_an_int8_store(tmp_path: Path) -> None:
    path = tmp_path / "int8.zarr"
    write(make_writer(path, dtype="int8"))
    found = xr.open_zarr(path)
    assert found.tokens.dtype == np.int8
    np.testing.assert_array_equal(found.tokens.values, TokenStore.open(path).gather_stored(EVERY))
    assert found.scale.dims == ("shard", "scale_and_middle", "channel")


def test_changed_consolidated_metadata_is_detected(finished: Path) -> None:
    group = read_json(finished / "zarr.json", "")
    group["consolidated_metadata"]["metadata"]["tokens"]["fill_value"] = 0.0
    write_json(finished / "zarr.json", group)
    with pytest.raises(DamagedError, match=r"made-up\.zarr/zarr\.json"):
        TokenStore.open(finished)


def test_consolidating_again_with_zarr_is_not_damage(finished: Path) -> None:
    # Zarr lists the folder, and warns of files that it does not know.
    with pytest.warns(UserWarning, match="[Cc]onsolidated"), pytest.warns(UserWarning, match="README.md is not"):
        zarr.consolidate_metadata(finished)
    assert verify(finished).sound


def test_a_store_without_names_is_resumed_and_finished(finished: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.zarr"
    write(make_writer(half), [0])
    age(half)
    write(StoreWriter.resume(half, IDENTITY), [2])
    write(make_writer(half))
    assert verify(half).sound
    np.testing.assert_array_equal(TokenStore.open(half).gather(EVERY), TOKENS)
    # The names of dimensions do not change the shards.
    assert sha256_of(half / "tokens" / "c.1.0.0") == sha256_of(finished / "tokens" / "c.1.0.0")


def test_a_store_without_names_is_read_and_gets_them_when_its_metadata_is_written_again(finished: Path) -> None:
    age(finished)
    assert verify(finished).sound
    np.testing.assert_array_equal(TokenStore.open(finished).gather(EVERY), TOKENS)
    layout = read_attributes(finished)["layout"]
    (finished / "zarr.json").write_text("{")
    writer = make_writer(finished)
    assert writer.pending() == []
    writer.finish()
    assert read_attributes(finished)["layout"] != layout
    assert xr.open_zarr(finished).tokens.dims == ("frame", "token", "channel")
