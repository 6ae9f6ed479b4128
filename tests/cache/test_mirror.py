"""Mirrored stores: each shard is fetched once and compared with its checksum, and the bound of the mirror is kept."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from upath import UPath

from wmcache.cache import TokenStore
from wmcache.cache.layout import shard_file
from wmcache.cache.mirror import most_bytes
from wmcache.common.errors import UnreadableError, UserError
from wmcache.common.paths import AnyPath, put, read_bytes, remove

from ..conftest import TOKENS, make_writer, write

Tokens = NDArray[np.float16]
EVERY = np.arange(50)
SHARD_BYTES = 16 * (6 * 4 * 2 + 4) + 16 * 16 + 4


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the local copies."""
    monkeypatch.setenv("WMCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("WMCACHE_MIRROR_BYTES", raising=False)
    return tmp_path / "home" / "mirror"


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each shard was fetched."""
    counts: Counter[str] = Counter()

    def note(at: AnyPath) -> bytes:
        counts[at.name] += 1
        return read_bytes(at)

    monkeypatch.setattr("wmcache.cache.mirror.read_bytes", note)
    return counts


def copies(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.shard"))


def test_each_shard_is_fetched_once_and_mapped(far: UPath, folder: Path, fetched: Counter[str]) -> None:
    store = TokenStore.open(str(far), mirrored=True)
    assert copies(folder) == []
    np.testing.assert_array_equal(store.gather(np.array([17, 3])), TOKENS[[17, 3]])
    assert fetched == {"c.0.0.0": 1, "c.1.0.0": 1}
    store.prefetch(np.array([0, 49]))
    assert fetched == {"c.0.0.0": 1, "c.1.0.0": 1, "c.3.0.0": 1}
    for _ in range(3):
        np.testing.assert_array_equal(store.gather(EVERY[::-1]), TOKENS[::-1])
    np.testing.assert_array_equal(TokenStore.open(far, mirrored=True).load(), TOKENS)
    assert fetched == {f"c.{shard}.0.0": 1 for shard in range(4)}
    assert len(copies(folder)) == 4
    assert [file.suffix for file in folder.iterdir()] == [".shard"] * 4


def test_a_store_is_mirrored_only_on_request_and_if_it_is_remote_and_complete(
    far: UPath, bucket: UPath, finished: Path, folder: Path, fetched: Counter[str]
) -> None:
    np.testing.assert_array_equal(TokenStore.open(far).gather(EVERY), TOKENS)
    np.testing.assert_array_equal(TokenStore.open(finished, mirrored=True).gather(EVERY), TOKENS)
    write(make_writer(bucket / "some.zarr"), [0])
    partial = TokenStore.open(bucket / "some.zarr", allow_incomplete=True, mirrored=True)
    np.testing.assert_array_equal(partial.gather(EVERY[:16]), TOKENS[:16])
    assert not folder.exists()
    assert not fetched


def test_prefetching_a_missing_shard_is_not_an_error(far: UPath) -> None:
    store = TokenStore.open(far, mirrored=True)
    remove(shard_file(far, 1))
    store.prefetch(EVERY)
    np.testing.assert_array_equal(store.gather(EVERY[:16]), TOKENS[:16])
    with pytest.raises(UserError, match=r"c\.1\.0\.0"):
        store.gather(EVERY)


@pytest.mark.parametrize("how", ["flipped", "cut", "emptied", "deleted"])
def test_a_damaged_copy_is_fetched_again(far: UPath, folder: Path, fetched: Counter[str], how: str) -> None:
    mapped = TokenStore.open(far, mirrored=True)
    mapped.gather(EVERY)
    for file in copies(folder):
        data = bytearray(file.read_bytes())
        data[70] ^= 1
        file.unlink()
        if how != "deleted":
            file.write_bytes({"flipped": bytes(data), "cut": bytes(data[:-9]), "emptied": b""}[how])
    np.testing.assert_array_equal(mapped.gather(EVERY), TOKENS)
    np.testing.assert_array_equal(TokenStore.open(far, mirrored=True).gather(EVERY), TOKENS)
    assert set(fetched.values()) == {2}
    np.testing.assert_array_equal(TokenStore.open(far, mirrored=True).gather(EVERY), TOKENS)
    assert set(fetched.values()) == {2}


def test_a_damaged_object_is_refused_and_not_kept(far: UPath, folder: Path) -> None:
    store = TokenStore.open(far, mirrored=True)
    good = read_bytes(shard_file(far, 2))
    put(far / "tokens" / "c.2.0.0", good[:60] + bytes([good[60] ^ 1]) + good[61:])
    with pytest.raises(UserError, match=r"memory://bucket/made-up\.zarr/tokens/c\.2\.0\.0 .*wmcache repair") as caught:
        store.gather(EVERY)
    assert "\n" not in str(caught.value)
    assert len(copies(folder)) <= 3
    put(far / "tokens" / "c.2.0.0", good)
    np.testing.assert_array_equal(store.gather(EVERY), TOKENS)


def test_reading_continues_after_a_failure_of_the_server(far: UPath, monkeypatch: pytest.MonkeyPatch) -> None:
    store = TokenStore.open(far, mirrored=True)

    def fail(at: AnyPath) -> bytes:
        raise OSError("Could not connect to the endpoint")

    with monkeypatch.context() as patch:
        patch.setattr("wmcache.cache.mirror.read_bytes", fail)
        with pytest.raises(UnreadableError, match=r"c\.0\.0\.0"):
            store.gather(EVERY)
    np.testing.assert_array_equal(store.gather(EVERY), TOKENS)


def test_a_store_that_is_written_again_is_not_read_from_old_copies(far: UPath) -> None:
    TokenStore.open(far, mirrored=True).gather(EVERY)
    remove(far)
    writer = make_writer(far)
    for shard in writer.pending():
        rows = writer.card.shard_frames(shard)
        writer.write_shard(shard, -TOKENS[rows.start : rows.stop])
    writer.finish()
    np.testing.assert_array_equal(TokenStore.open(far, mirrored=True).gather(EVERY), -TOKENS)


class TestBound:
    def test_the_least_recently_used_copies_are_deleted(
        self, far: UPath, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("WMCACHE_MIRROR_BYTES", str(2 * SHARD_BYTES + 100))
        TokenStore.open(far, mirrored=True)
        assert f"{folder} has room for 2.3 kB" in "".join(capsys.readouterr())
        names = [hashlib.sha256(read_bytes(shard_file(far, shard))).hexdigest() for shard in range(4)]

        def kept() -> set[int]:
            return {names.index(file.stem) for file in copies(folder)}

        for shard, expected in ((0, {0}), (1, {0, 1}), (0, {0, 1}), (3, {0, 3}), (2, {3, 2})):
            time.sleep(0.01)  # the clock of some file systems is coarse
            rows = EVERY[shard * 16 : shard * 16 + 3]
            # Another store each time, as the first use by a reader counts.
            np.testing.assert_array_equal(TokenStore.open(far, mirrored=True).gather(rows), TOKENS[rows])
            assert kept() == expected
            assert sum(file.stat().st_size for file in folder.iterdir()) <= 2 * SHARD_BYTES + 100

    @pytest.mark.parametrize("text", [str(SHARD_BYTES - 1), "lots", "10 apples", "GB GB", "-", "1e"])
    def test_a_bound_below_one_shard_and_other_text_are_refused(
        self, far: UPath, monkeypatch: pytest.MonkeyPatch, text: str
    ) -> None:
        monkeypatch.setenv("WMCACHE_MIRROR_BYTES", text)
        with pytest.raises(UserError, match="WMCACHE_MIRROR_BYTES"):
            TokenStore.open(far, mirrored=True)

    @pytest.mark.parametrize(("text", "count"), [("1000", 1000), ("200GB", 200 * 10**9), ("1.5 MiB", 1572864)])
    def test_a_bound_may_have_a_unit(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, text: str, count: int
    ) -> None:
        monkeypatch.setenv("WMCACHE_MIRROR_BYTES", text)
        assert most_bytes(folder) == count

    def test_the_default_is_a_share_of_the_free_space_and_the_copies(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("wmcache.cache.mirror.free_space", lambda path: 1000)
        assert most_bytes(folder) == 800
        folder.mkdir(parents=True)
        (folder / "a.shard").write_bytes(b"x" * 500)
        (folder / "other").write_bytes(b"x" * 500)
        assert most_bytes(folder) == 1200


def test_readers_of_the_same_shards_fetch_them_once(far: UPath, folder: Path, fetched: Counter[str]) -> None:
    stores = [TokenStore.open(far, mirrored=True) for _ in range(6)]
    together = threading.Barrier(6)

    def read(store: TokenStore) -> Tokens:
        together.wait(10)
        return store.gather(EVERY)

    with ThreadPoolExecutor(6) as pool:
        for found in pool.map(read, stores, timeout=60):
            np.testing.assert_array_equal(found, TOKENS)
    assert fetched == {f"c.{shard}.0.0": 1 for shard in range(4)}


def test_readers_that_delete_each_others_copies_read_the_right_tokens(
    far: UPath, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WMCACHE_MIRROR_BYTES", str(2 * SHARD_BYTES))
    stores = [TokenStore.open(far, mirrored=True) for _ in range(4)]

    def read(seed: int) -> bool:
        rng = np.random.default_rng(seed)
        for _ in range(10):
            frames = rng.integers(0, 50, 12)
            np.testing.assert_array_equal(stores[seed].gather(frames), TOKENS[frames])
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(4), timeout=100))
    assert sum(file.stat().st_size for file in copies(folder)) <= 2 * SHARD_BYTES


def test_a_mirror_that_cannot_be_written_is_named(far: UPath, folder: Path) -> None:
    folder.parent.mkdir(parents=True)
    folder.write_text("in the way")
    with pytest.raises(UserError, match=r"mirror") as caught:
        TokenStore.open(far, mirrored=True).gather(EVERY)
    assert "\n" not in str(caught.value)
    assert os.environ["WMCACHE_HOME"] in str(caught.value)
