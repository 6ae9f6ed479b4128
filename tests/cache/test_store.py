"""A store gives back what was written, to any Zarr reader, and refuses what is not a complete store."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from wmcache.cache import TokenStore
from wmcache.cache.layout import DamagedError, read_attributes, write_attributes
from wmcache.common.errors import UserError

from ..conftest import IDENTITY, STEPS, TOKENS, contents, make_writer, write


def test_a_store_gives_back_what_was_written(finished: Path) -> None:
    store = TokenStore.open(finished)
    assert len(store) == 50
    assert store.episodes == 2
    assert store.identity == IDENTITY
    assert store.complete
    np.testing.assert_array_equal(store.gather(np.arange(50)), TOKENS)
    for name, values in STEPS.items():
        np.testing.assert_array_equal(getattr(store, name), values)
    wide = TOKENS.astype(np.float64)
    np.testing.assert_allclose(store.mean, wide.mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(store.std, wide.std((0, 1)), rtol=1e-5)


def test_plain_zarr_opens_a_store(finished: Path) -> None:
    # In a process that does not import wmcache, with warnings as errors.
    script = (
        "import sys, numpy as np, zarr; group = zarr.open_group(sys.argv[1], mode='r'); "
        "np.save(sys.argv[2], group['tokens'][:]); print(sorted(group.array_keys()))"
    )
    words = [sys.executable, "-W", "error", "-c", script, str(finished), str(finished.parent / "tokens.npy")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['action', 'episode', 'sha256', 'state', 'step', 'tokens']"
    np.testing.assert_array_equal(np.load(finished.parent / "tokens.npy"), TOKENS)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_with_their_frame(tmp_path: Path, dtype: str, value: float) -> None:
    writer = make_writer(tmp_path / "some.zarr", dtype=dtype)
    write(writer)
    before, bad = contents(writer.path), TOKENS[16:32].copy()
    bad[5, 2, 1] = value
    with pytest.raises(UserError, match="frame 21;"):
        writer.write_shard(1, bad)
    assert contents(writer.path) == before


def test_a_shard_of_another_shape_or_dtype_is_refused(tmp_path: Path) -> None:
    writer = make_writer(tmp_path / "some.zarr")
    with pytest.raises(ValueError, match=r"\(16, 6, 4\)"):
        writer.write_shard(0, TOKENS[:15])
    with pytest.raises(ValueError, match="float32"):
        writer.write_shard(0, TOKENS[:16].astype(np.float32))
    assert writer.pending() == [0, 1, 2, 3]


@pytest.mark.parametrize("attributes", [{"format": "another"}, {}])
def test_another_group_is_refused(tmp_path: Path, attributes: dict[str, Any]) -> None:
    zarr.create_group(tmp_path / "other.zarr", attributes=attributes)
    for address in (tmp_path / "other.zarr", (tmp_path / "other.zarr").as_uri()):
        with pytest.raises(UserError, match=r"other\.zarr") as caught:
            TokenStore.open(address)
        assert not isinstance(caught.value, DamagedError)


def test_another_format_version_is_refused(finished: Path) -> None:
    write_attributes(finished, {**read_attributes(finished), "format_version": 99})
    with pytest.raises(UserError, match=r"99.* 2;.*--out"):
        TokenStore.open(finished)
