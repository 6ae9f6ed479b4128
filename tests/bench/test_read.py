"""The figures of reading, whatever the machine's speed."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest

from wmcache.bench import read as bench
from wmcache.bench.read import bench_codecs, bench_read
from wmcache.cache import TokenStore
from wmcache.cache.verify import verify
from wmcache.common.errors import UserError

from ..conftest import make_writer

RATIOS = ("ratio_to_memmap_take", "ratio_to_memmap_take_clip", "ratio_to_zarr")


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary folders."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.usefixtures("ticking")
def test_rates_and_ratios_count_the_windows_of_each_contender(scratch: Path) -> None:
    found = bench_read(200, tokens=2, dim=3, batch=5)
    rates = {name: value for name, value in found.items() if name.endswith("_windows_per_second")}
    assert rates == {name: 5 * (1 if name.startswith("zarr") else bench.BATCHES) for name in rates}
    assert len(rates) == 6
    assert list(scratch.iterdir()) == []
    assert [found[name] for name in RATIOS] == [1, 1, bench.BATCHES]


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_sound_store_and_a_plain_file_of_the_same_bytes_are_kept(tmp_path: Path, dtype: str) -> None:
    keep = tmp_path / "not there yet" / "kept"
    bench_read(600, tokens=2, dim=3, batch=4, dtype=dtype, keep=keep)
    assert sorted(path.name for path in keep.iterdir()) == ["bench.npy", "bench.zarr"]
    assert verify(keep / "bench.zarr").sound
    store = TokenStore.open(keep / "bench.zarr")
    plain = np.load(keep / "bench.npy")
    assert (plain.dtype, plain.shape) == (dtype, (600, 2, 3))
    assert (store.card.num_shards, store.card.frame_shape) == (2, (2, 3))
    assert plain.tobytes() == store.gather_stored(np.arange(600)).tobytes()
    # Values that no file system can compress away.
    assert len(np.unique(plain)) > 100


def test_a_kept_store_is_used_again_for_the_same_size_and_dtype_alone(tmp_path: Path) -> None:
    bench_read(100, tokens=2, dim=3, batch=2, keep=tmp_path)
    store = tmp_path / "bench.zarr"
    before = {file: file.stat().st_mtime_ns for file in store.rglob("*")}
    bench_read(100, tokens=2, dim=3, batch=3, keep=tmp_path)
    assert {file: file.stat().st_mtime_ns for file in store.rglob("*")} == before
    with pytest.raises(UserError, match="bench"):
        bench_read(100, tokens=2, dim=3, dtype="int8", batch=2, keep=tmp_path)


@pytest.fixture(scope="module")
def smooth_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens that can be compressed: a walk of few different values."""
    walk = np.random.default_rng(0).integers(-1, 2, (50, 6, 64)).cumsum(0).astype(np.float16)
    writer = make_writer(tmp_path_factory.mktemp("smooth") / "smooth.zarr", token_dim=64, frames_per_shard=50)
    writer.write_shard(0, walk)
    writer.finish()
    return writer.path


@pytest.mark.parametrize("frames", [24, 10_000])
def test_figures_of_smaller_formats(scratch: Path, smooth_path: Path, frames: int) -> None:
    rows = {row["form"]: row for row in bench_codecs(smooth_path, frames=frames, batch=3)}
    assert list(rows) == ["float16", "int8", "zstd", "blosc lz4 shuffled"]
    for row in rows.values():
        assert row.keys() == {"form", "size", "speed", "relative_error"}
        assert 0 < row["speed"] < np.inf
    assert (rows["float16"]["size"], rows["float16"]["speed"], rows["float16"]["relative_error"]) == (1, 1, 0)
    assert rows["int8"]["size"] == 0.5
    assert 0 < rows["int8"]["relative_error"] < 0.01
    for name in ("zstd", "blosc lz4 shuffled"):
        assert rows[name]["relative_error"] == 0
        assert 0 < rows[name]["size"] < 1
    assert list(scratch.iterdir()) == []
