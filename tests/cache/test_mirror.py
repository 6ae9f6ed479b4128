"""A store far away: each shard comes once, is never believed unseen, and no more room is taken than was given."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from upath import UPath

from wmcache.cache import Identity, StoreWriter, TokenStore
from wmcache.cache.layout import shard_file
from wmcache.cache.mirror import MirroredReader, most_bytes
from wmcache.cache.reader import MappedReader, ZarrReader
from wmcache.common.errors import UserError
from wmcache.common.paths import AnyPath, put, read_bytes, remove, upload

Tokens = NDArray[np.float16]
EVERY = np.arange(50)
SHARD_BYTES = 16 * (6 * 4 * 2 + 4) + 16 * 16 + 4


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the local copies go."""
    monkeypatch.setenv("WMCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("WMCACHE_MIRROR_BYTES", raising=False)
    return tmp_path / "home" / "mirror"


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each shard has come."""
    counts: Counter[str] = Counter()

    def note(at: AnyPath) -> bytes:
        counts[at.name] += 1
        return read_bytes(at)

    monkeypatch.setattr("wmcache.cache.mirror.read_bytes", note)
    return counts


def copies(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.shard"))


def damage(at: UPath, place: int = 60) -> None:
    data = bytearray(read_bytes(at))
    data[place] ^= 1
    put(at, bytes(data))


def test_each_shard_is_fetched_once_and_mapped(far: UPath, folder: Path, fetched: Counter[str], tokens: Tokens) -> None:
    store = TokenStore.open(str(far), mirrored=True)
    assert isinstance(store._reader, MirroredReader)
    assert isinstance(store._reader, MappedReader)
    assert copies(folder) == []
    np.testing.assert_array_equal(store.gather(np.array([17, 3])), tokens[[17, 3]])
    assert fetched == {"c.0.0.0": 1, "c.1.0.0": 1}
    for _ in range(3):
        np.testing.assert_array_equal(store.gather(EVERY[::-1]), tokens[::-1])
    np.testing.assert_array_equal(TokenStore.open(far, mirrored=True).gather(EVERY), tokens)
    assert fetched == {f"c.{shard}.0.0": 1 for shard in range(4)}
    assert len(copies(folder)) == 4
    assert [file.suffix for file in folder.iterdir()] == [".shard"] * 4


def test_who_reads_a_little_keeps_no_copies(far: UPath, folder: Path, fetched: Counter[str], tokens: Tokens) -> None:
    store = TokenStore.open(far)
    assert isinstance(store._reader, ZarrReader)
    np.testing.assert_array_equal(store.gather(EVERY), tokens)
    assert not folder.exists()
    assert not fetched


def test_a_store_that_is_here_needs_no_copies(finished: Path, folder: Path) -> None:
    store = TokenStore.open(finished, mirrored=True)
    assert type(store._reader) is MappedReader
    store.gather(EVERY)
    assert not folder.exists()


def test_a_store_that_is_not_complete_is_not_copied(
    bucket: UPath, make_writer: Callable[..., StoreWriter], tokens: Tokens
) -> None:
    writer = make_writer(bucket / "some.zarr")
    writer.write_shard(0, tokens[:16])
    store = TokenStore.open(writer.path, allow_incomplete=True, mirrored=True)
    assert isinstance(store._reader, ZarrReader)
    np.testing.assert_array_equal(store.gather(EVERY[:16]), tokens[:16])


def test_windows_are_those_of_the_store_that_is_here(far: UPath, finished: Path) -> None:
    ours, theirs = TokenStore.open(far, mirrored=True).windows(), TokenStore.open(finished).windows()
    assert len(ours) == len(theirs) > 0
    there = theirs.batch(np.arange(len(theirs)))
    for name, value in ours.batch(np.arange(len(ours))).items():
        np.testing.assert_array_equal(value, there[name])
    np.testing.assert_array_equal(TokenStore.open(far, mirrored=True).load(), TokenStore.open(finished).load())


def test_a_hint_fetches(far: UPath, folder: Path, fetched: Counter[str]) -> None:
    store = TokenStore.open(far, mirrored=True)
    store.prefetch(np.array([0, 20, 49]))
    assert len(copies(folder)) == 3
    assert fetched == {"c.0.0.0": 1, "c.1.0.0": 1, "c.3.0.0": 1}


def test_a_hint_of_what_cannot_be_had_is_no_error(far: UPath, tokens: Tokens) -> None:
    store = TokenStore.open(far, mirrored=True)
    remove(shard_file(far, 1))
    store.prefetch(EVERY)
    np.testing.assert_array_equal(store.gather(EVERY[:16]), tokens[:16])
    with pytest.raises(UserError, match=r"c\.1\.0\.0 cannot be read"):
        store.gather(EVERY)


@pytest.mark.parametrize("how", ["flipped", "cut", "emptied"])
def test_a_copy_that_is_not_what_came_is_fetched_again(
    far: UPath, folder: Path, fetched: Counter[str], tokens: Tokens, how: str
) -> None:
    TokenStore.open(far, mirrored=True).gather(EVERY)
    for file in copies(folder):
        data = bytearray(file.read_bytes())
        data[70] ^= 1
        file.write_bytes({"flipped": bytes(data), "cut": bytes(data[:-9]), "emptied": b""}[how])
    np.testing.assert_array_equal(TokenStore.open(far, mirrored=True).gather(EVERY), tokens)
    assert set(fetched.values()) == {2}
    np.testing.assert_array_equal(TokenStore.open(far, mirrored=True).gather(EVERY), tokens)
    assert set(fetched.values()) == {2}


def test_a_copy_that_somebody_deletes_is_fetched_again(
    far: UPath, folder: Path, fetched: Counter[str], tokens: Tokens
) -> None:
    store = TokenStore.open(far, mirrored=True)
    store.prefetch(EVERY)
    for file in copies(folder):
        file.unlink()
    np.testing.assert_array_equal(store.gather(EVERY), tokens)  # mapped before they went
    np.testing.assert_array_equal(TokenStore.open(far, mirrored=True).gather(EVERY), tokens)
    assert set(fetched.values()) == {2}


def test_a_damaged_object_is_refused_in_one_line_and_not_kept(far: UPath, folder: Path, tokens: Tokens) -> None:
    store = TokenStore.open(far, mirrored=True)
    good = read_bytes(shard_file(far, 2))
    damage(shard_file(far, 2))
    with pytest.raises(
        UserError,
        match=r"^memory://bucket/made-up\.zarr/tokens/c\.2\.0\.0 differs from its checksum; hint it with: wmcache repair",
    ) as caught:
        store.gather(EVERY)
    assert "\n" not in str(caught.value)
    assert len(copies(folder)) <= 3
    put(far / "tokens" / "c.2.0.0", good)
    np.testing.assert_array_equal(store.gather(EVERY), tokens)


def test_a_server_that_fails_is_one_line_and_reading_goes_on_after_it(
    far: UPath, monkeypatch: pytest.MonkeyPatch, tokens: Tokens
) -> None:
    store = TokenStore.open(far, mirrored=True)

    def fail(at: AnyPath) -> bytes:
        raise OSError("Could not connect to the endpoint")

    with monkeypatch.context() as patch:
        patch.setattr("wmcache.cache.mirror.read_bytes", fail)
        with pytest.raises(
            UserError,
            match=r"c\.0\.0\.0 cannot be read \(Could not connect.*\); check address, credentials and network",
        ):
            store.gather(EVERY)
    np.testing.assert_array_equal(store.gather(EVERY), tokens)


def test_copies_are_shared_by_what_they_hold(
    far: UPath, bucket: UPath, finished: Path, folder: Path, fetched: Counter[str], tokens: Tokens
) -> None:
    upload(finished, bucket / "twin.zarr", last="zarr.json")
    for path in (far, bucket / "twin.zarr"):
        np.testing.assert_array_equal(TokenStore.open(path, mirrored=True).gather(EVERY), tokens)
    assert fetched == {f"c.{shard}.0.0": 1 for shard in range(4)}
    assert len(copies(folder)) == 4


def test_a_store_made_anew_is_not_read_from_old_copies(
    far: UPath, bucket: UPath, make_writer: Callable[..., StoreWriter], tokens: Tokens, identity: Identity
) -> None:
    TokenStore.open(far, mirrored=True).gather(EVERY)
    remove(far)
    writer = make_writer(far)
    for shard in writer.pending():
        rows = writer.card.shard_frames(shard)
        writer.write_shard(shard, -tokens[rows.start : rows.stop])
    writer.finish()
    np.testing.assert_array_equal(TokenStore.open(far, mirrored=True).gather(EVERY), -tokens)


class TestRoom:
    def test_the_bound_is_kept_and_what_was_used_last_stays(
        self,
        far: UPath,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        tokens: Tokens,
    ) -> None:
        monkeypatch.setenv("WMCACHE_MIRROR_BYTES", str(2 * SHARD_BYTES + 100))
        store = TokenStore.open(far, mirrored=True)
        assert f"{folder} may hold 2.3 kB of the" in "".join(capsys.readouterr())
        names = [bytes(store._reader._sha256[shard]).hex() for shard in range(4)]  # type: ignore[attr-defined]

        def kept() -> set[int]:
            return {names.index(file.stem) for file in copies(folder)}

        for shard, expected in ((0, {0}), (1, {0, 1}), (0, {0, 1}), (3, {0, 3}), (2, {3, 2})):
            time.sleep(0.01)  # the clock of some file systems is coarse
            rows = EVERY[shard * 16 : shard * 16 + 3]
            # Each in a process of its own, as it were: the first use in a process is what counts.
            np.testing.assert_array_equal(TokenStore.open(far, mirrored=True).gather(rows), tokens[rows])
            assert kept() == expected
            assert sum(file.stat().st_size for file in folder.iterdir()) <= 2 * SHARD_BYTES + 100

    def test_all_of_a_store_is_read_through_a_small_room(
        self, far: UPath, folder: Path, monkeypatch: pytest.MonkeyPatch, tokens: Tokens
    ) -> None:
        monkeypatch.setenv("WMCACHE_MIRROR_BYTES", str(SHARD_BYTES))
        store = TokenStore.open(far, mirrored=True)
        for seed in range(3):
            frames = np.random.default_rng(seed).permutation(50)
            np.testing.assert_array_equal(store.gather(frames), tokens[frames])
        assert len(copies(folder)) == 1
        assert len(store._reader._maps) <= 1  # type: ignore[attr-defined]

    def test_a_room_for_less_than_a_shard_is_refused(
        self, far: UPath, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WMCACHE_MIRROR_BYTES", str(SHARD_BYTES - 1))
        with pytest.raises(
            UserError, match=r"mirror may hold 1\.1 kB, and a shard of .* has 1\.1 kB; .*WMCACHE_MIRROR"
        ):
            TokenStore.open(far, mirrored=True)

    @pytest.mark.parametrize("text", ["lots", "10 apples", "GB GB", "-", "1e"])
    def test_a_bound_that_is_no_number_is_one_line(
        self, far: UPath, monkeypatch: pytest.MonkeyPatch, text: str
    ) -> None:
        monkeypatch.setenv("WMCACHE_MIRROR_BYTES", text)
        with pytest.raises(UserError, match=r"^WMCACHE_MIRROR_BYTES is '.*'; write a number of bytes, as in 200GB$"):
            TokenStore.open(far, mirrored=True)

    @pytest.mark.parametrize(("text", "count"), [("1000", 1000), ("200GB", 200 * 10**9), ("1.5 MiB", 1572864)])
    def test_a_bound_is_written_as_people_do(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, text: str, count: int
    ) -> None:
        monkeypatch.setenv("WMCACHE_MIRROR_BYTES", text)
        assert most_bytes(folder) == count

    def test_by_default_most_of_what_is_free_and_what_it_has_may_be_used(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("wmcache.cache.mirror.free_space", lambda path: 1000)
        assert most_bytes(folder) == 800
        folder.mkdir(parents=True)
        (folder / "a.shard").write_bytes(b"x" * 500)
        (folder / "not ours").write_bytes(b"x" * 500)
        assert most_bytes(folder) == 1200

    def test_what_the_dead_left_half_written_is_swept(self, far: UPath, folder: Path, tokens: Tokens) -> None:
        import platform

        folder.mkdir(parents=True)
        torn = folder / f".x.shard.{platform.node()}.{2**22 + 5}.tmp"
        torn.write_bytes(b"half")
        TokenStore.open(far, mirrored=True).gather(EVERY)
        assert not torn.exists()


def test_many_who_want_the_same_shards_fetch_them_once(
    far: UPath, folder: Path, fetched: Counter[str], tokens: Tokens
) -> None:
    stores = [TokenStore.open(far, mirrored=True) for _ in range(6)]
    together = threading.Barrier(6)

    def read(store: TokenStore) -> Tokens:
        together.wait(10)
        return store.gather(EVERY)

    with ThreadPoolExecutor(6) as pool:
        for found in pool.map(read, stores, timeout=60):
            np.testing.assert_array_equal(found, tokens)
    assert fetched == {f"c.{shard}.0.0": 1 for shard in range(4)}


def test_many_who_push_each_other_out_read_the_right_tokens(
    far: UPath, folder: Path, monkeypatch: pytest.MonkeyPatch, tokens: Tokens
) -> None:
    monkeypatch.setenv("WMCACHE_MIRROR_BYTES", str(2 * SHARD_BYTES))
    stores = [TokenStore.open(far, mirrored=True) for _ in range(4)]

    def read(seed: int) -> bool:
        rng = np.random.default_rng(seed)
        for _ in range(10):
            frames = rng.integers(0, 50, 12)
            np.testing.assert_array_equal(stores[seed].gather(frames), tokens[frames])
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(4), timeout=100))
    assert sum(file.stat().st_size for file in copies(folder)) <= 2 * SHARD_BYTES


def test_a_copy_that_cannot_be_kept_is_one_line(far: UPath, folder: Path) -> None:
    folder.parent.mkdir(parents=True)
    folder.write_text("in the way")
    with pytest.raises(UserError, match=r"mirror") as caught:
        TokenStore.open(far, mirrored=True).gather(EVERY)
    assert "\n" not in str(caught.value)
    assert os.environ["WMCACHE_HOME"] in str(caught.value)
