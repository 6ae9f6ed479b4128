"""Records of the shards that are done survive any kill, are folded into blocks, and count only if they are sound."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from upath import UPath

from wmcache.cache import StoreWriter, TokenStore
from wmcache.cache.catalogue import summarise
from wmcache.cache.records import Record, Records, block_file, commits, record_file
from wmcache.cache.verify import verify
from wmcache.cache.writer import channel_sums
from wmcache.common.errors import UserError
from wmcache.common.paths import AnyPath, names_in

from ..conftest import CARD, IDENTITY, TOKENS, contents, flip, make_writer, write

SHARDS = 25
BLOCKED = [
    "block-000000.safetensors",
    "block-000001.safetensors",
    *(f"{shard:06d}.json" for shard in range(20, SHARDS)),
]
numbers = st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=4, max_size=4)


@given(total=numbers, squares=numbers, scale=st.none() | numbers, size=st.integers(1, 2**40 - 1))
def test_a_record_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    total: list[float],
    squares: list[float],
    scale: list[float] | None,
    size: int,
) -> None:
    path = tmp_path_factory.mktemp("record")
    record = Record((48, 50), size, "ab" * 32, IDENTITY.digest(), total, squares, scale, scale)
    Records(path, CARD, IDENTITY).write(3, record)
    assert Records(path, CARD, IDENTITY).read(3) == record
    assert [file.name for file in record_file(path, 3).parent.iterdir()] == ["000003.json"]


# Blocks, of ten shards here.


@pytest.fixture
def tens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wmcache.cache.records.IN_A_BLOCK", 10)
    monkeypatch.setattr("wmcache.cache.verify.IN_A_BLOCK", 10)


def make_folding(path: AnyPath, dtype: str = "float16") -> StoreWriter:
    """Start a store of 25 shards."""
    return make_writer(path, frames_per_shard=2, dtype=dtype)


@pytest.fixture
def folded(tmp_path: Path, tens: None) -> StoreWriter:
    """A complete store: two blocks, and five records."""
    writer = make_folding(tmp_path / "folded.zarr")
    write(writer)
    return writer


def records_of(writer: StoreWriter) -> Records:
    return Records(writer.path, writer.card, writer.identity)


def names(writer: StoreWriter) -> list[str]:
    return names_in(commits(writer.path))


@pytest.mark.usefixtures("tens")
class TestFolding:
    @pytest.mark.parametrize("remote", [False, True])
    def test_the_last_record_of_ten_folds_them(self, tmp_path: Path, bucket: UPath, remote: bool) -> None:
        writer = make_folding(bucket / "some.zarr" if remote else tmp_path / "some.zarr")
        write(writer, [3, 0, 1, 2, 4, 9, 8, 7, 12, 6])
        assert names(writer) == [f"{shard:06d}.json" for shard in (0, 1, 2, 3, 4, 6, 7, 8, 9, 12)]
        write(writer, [5])
        assert names(writer) == ["000012.json", "block-000000.safetensors"]
        # The last shards are fewer than a block, so their records stay.
        write(writer, range(20, SHARDS))
        assert names(writer) == ["000012.json", *BLOCKED[2:], BLOCKED[0]]

    @pytest.mark.parametrize("dtype", ["float16", "int8"])
    def test_a_folded_record_reads_as_it_was_written(self, tmp_path: Path, dtype: str) -> None:
        writer = make_folding(tmp_path / "some.zarr", dtype)
        write(writer, range(9))
        records = records_of(writer)
        before = [records.read(shard) for shard in range(9)]
        write(writer, [9])
        assert names(writer) == BLOCKED[:1]
        assert [records_of(writer).read(shard) for shard in range(9)] == before
        assert [records.read(shard) for shard in range(9)] == before
        assert before[3].sum == channel_sums(TOKENS[6:8])[0].tolist()
        assert (before[3].scale is None) == (dtype == "float16")

    def test_records_and_blocks_are_counted_together(self, tmp_path: Path) -> None:
        writer = make_folding(tmp_path / "some.zarr")
        done = {*range(10), 12, 13, 24}
        write(writer, done)
        records = records_of(writer)
        assert set(np.flatnonzero(records.recorded() >= 0).tolist()) == done
        assert all(records.recorded()[shard] == writer.card.shard_bytes(shard) for shard in done)
        assert writer.pending() == sorted(set(range(SHARDS)) - done)
        assert all(writer.is_done(shard) == (shard in done) for shard in range(SHARDS))
        assert records.count() == summarise(writer.path).shards_done == len(done)
        for read in (lambda: records.read(11), lambda: list(records.thousands())):
            with pytest.raises(UserError, match=r"0000\d\d\.json"):
                read()
        write(writer, writer.pending())
        expected = [[*range(10)], [*range(10, 20)], [*range(20, SHARDS)]]
        assert [block.shard.tolist() for block in records.thousands()] == expected

    def test_blocks_change_no_statistics(
        self, tmp_path: Path, folded: StoreWriter, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("wmcache.cache.records.IN_A_BLOCK", 1000)
            plain = make_folding(tmp_path / "plain.zarr")
            write(plain)
        assert len(names(plain)) == SHARDS
        wide = TOKENS.astype(np.float64)
        for path in (folded.path, plain.path):
            store = TokenStore.open(path)
            np.testing.assert_allclose(store.mean, wide.mean((0, 1)), rtol=1e-6)
            np.testing.assert_allclose(store.std, wide.std((0, 1)), rtol=1e-6)
            np.testing.assert_array_equal(store.gather(np.arange(50)), TOKENS)
        hashes = {name: data for name, data in contents(plain.path).items() if name.startswith("sha256")}
        assert hashes.items() <= contents(folded.path).items()

    @pytest.mark.parametrize("dropped", [[3, 15, 22], [*range(10)]], ids=["some", "a block"])
    def test_shards_that_are_reopened_leave_their_block_until_they_are_done_again(
        self, folded: StoreWriter, dropped: list[int]
    ) -> None:
        before, records = contents(folded.path), records_of(folded)
        folded.reopen(dropped)
        assert folded.pending() == dropped
        assert ("block-000000.safetensors" in names(folded)) == (len(dropped) < 10)
        for shard in dropped:
            with pytest.raises(UserError, match=rf"{shard:06d}\.json"):
                records.read(shard)
        assert records.read(14).frames == (28, 30)
        write(folded)
        assert contents(folded.path) == before

    def test_a_shard_written_again_replaces_its_record_in_the_block(self, folded: StoreWriter) -> None:
        folded.write_shard(4, TOKENS[:2])
        assert records_of(folded).read(4).sum == channel_sums(TOKENS[:2])[0].tolist()
        assert records_of(folded).count() == SHARDS
        assert names(folded) == sorted(BLOCKED)

    def test_a_damaged_record_postpones_the_block(self, tmp_path: Path) -> None:
        writer = make_folding(tmp_path / "some.zarr")
        write(writer, range(9))
        record_file(writer.path, 3).write_text("{")
        write(writer, [9])
        assert len(names(writer)) == 10
        assert writer.pending()[0] == 3
        write(writer, [3])
        assert names(writer) == BLOCKED[:1]


def _add_to_sums(file: Path) -> None:
    tensors = load_file(file)
    save_file({**tensors, "sum": tensors["sum"] + 1}, file)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-5]),
    "a flipped bit": lambda file: flip(file, -3),
    "without its checksum": lambda file: save_file({k: v for k, v in load_file(file).items() if k != "checksum"}, file),
    "another tensor": lambda file: save_file({**load_file(file), "more": np.zeros(1)}, file),
    "other sums": _add_to_sums,
    "the block of other shards": lambda file: file.write_bytes(file.with_name("block-000000.safetensors").read_bytes()),
    "lost": lambda file: file.unlink(),
}


@pytest.mark.usefixtures("tens")
class TestDamage:
    @pytest.mark.parametrize("damage", DAMAGE)
    def test_a_damaged_block_is_ten_lost_records(self, folded: StoreWriter, damage: str) -> None:
        before, file = contents(folded.path), block_file(folded.path, 10)
        DAMAGE[damage](file)
        records = records_of(folded)
        with pytest.raises(UserError, match=r"(block-000001\.safetensors|000013\.json).* wmcache repair") as caught:
            records.read(13)
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError):
            list(records.thousands())
        found = verify(folded.path)
        expected = [(shard, str(record_file(folded.path, shard))) for shard in range(10, 20)]
        assert [(fault.shard, fault.file) for fault in found.faults] == expected
        assert (found.shards_done, found.leftovers) == (15, [])
        assert folded.pending() == [*range(10, 20)]
        write(folded, folded.pending())
        assert verify(folded.path).sound
        assert contents(folded.path) == before

    def test_the_block_of_another_store_is_refused(self, folded: StoreWriter) -> None:
        records = Records(folded.path, folded.card, dataclasses.replace(IDENTITY, image_size=96))
        with pytest.raises(UserError, match=r"block-000000\.safetensors"):
            records.read(3)
        assert (records.recorded() < 0).all()

    def test_a_block_that_is_replaced_is_read_again(self, folded: StoreWriter) -> None:
        records, other = records_of(folded), records_of(folded)
        before = records.read(3)
        (block, *_) = other.thousands()
        other.write_block(dataclasses.replace(block, bytes=block.bytes + 1))
        assert records.read(3).bytes == before.bytes + 1


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from wmcache.cache import StoreWriter, Identity, records
from wmcache.cache.layout import read_attributes

def die_after(calls, owner, name, counts):
    real, left = getattr(owner, name), calls

    def call(*arguments, **options):
        nonlocal left
        left -= counts(arguments[0])
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)

    setattr(owner, name, call)

records.IN_A_BLOCK = 10
path, calls = Path(sys.argv[1]), int(sys.argv[4])
writer = StoreWriter.resume(path, Identity.from_json(read_attributes(path)["identity"], "here"))
if sys.argv[3] == "block":
    die_after(calls, records, "save_tensors", lambda _: True)
else:  # locks and temporary files are deleted too
    die_after(calls, Path, "unlink", lambda path: path.suffix == ".json" and path.stem != "000009")
writer.write_shard(9, np.load(sys.argv[2]))
"""


@pytest.mark.usefixtures("tens")
@pytest.mark.parametrize(
    ("moment", "calls", "expected"),
    [("block", 0, (0, 10)), ("deletion", 0, (1, 10)), ("deletion", 1, (1, 9)), ("deletion", 6, (1, 4))],
    ids=["before the block", "before the first deletion", "after the first", "in the middle"],
)
def test_a_kill_while_folding_loses_nothing(
    tmp_path: Path, folded: StoreWriter, moment: str, calls: int, expected: tuple[int, int]
) -> None:
    writer = make_folding(tmp_path / "killed.zarr")
    write(writer, range(9))
    np.save(tmp_path / "tokens.npy", TOKENS[18:20])
    words = [sys.executable, "-c", KILLED, writer.path, tmp_path / "tokens.npy", moment, str(calls)]
    assert subprocess.run(words, check=False, timeout=60).returncode == -signal.SIGKILL
    left = [name for name in names(writer) if not name.endswith((".tmp", ".lock"))]
    assert (sum(name.startswith("block") for name in left), sum(name.endswith(".json") for name in left)) == expected
    assert writer.pending() == [*range(10, SHARDS)]
    assert records_of(writer).count() == 10
    write(writer)
    (commits(writer.path) / "block-000000.lock").unlink(missing_ok=True)
    found = {name: data for name, data in contents(writer.path).items() if not name.endswith(".tmp")}
    assert found == contents(folded.path)
    assert verify(writer.path).sound


@pytest.mark.usefixtures("tens")
def test_writers_that_finish_a_block_at_once_write_one(tmp_path: Path) -> None:
    for number in range(8):
        writer, together = make_folding(tmp_path / f"{number}.zarr"), threading.Barrier(2)
        write(writer, range(8))

        def finish(shard: int, path: Path = writer.path, together: threading.Barrier = together) -> None:
            resumed = StoreWriter.resume(path, IDENTITY)
            together.wait(10)
            write(resumed, [shard])

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(finish, (8, 9), timeout=60))
        assert names(writer) == BLOCKED[:1]
        assert writer.pending() == [*range(10, SHARDS)]
        found = [records_of(writer).read(shard).sum for shard in (0, 8, 9)]
        assert found == [channel_sums(TOKENS[2 * shard : 2 * shard + 2])[0].tolist() for shard in (0, 8, 9)]


def test_records_that_are_folded_while_they_are_listed_are_found(
    tens: None, folded: StoreWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A listing from before the fold.
    listed = [*names(folded), "000003.json", "000004.json"]
    monkeypatch.setattr(
        "wmcache.cache.records.names_in", lambda _, prefix="": [n for n in listed if n.startswith(prefix)]
    )
    assert (records_of(folded).recorded() >= 0).all()
