"""Which shards are done is known after any kill, and by a thousandth of the files; and nothing that is not sound counts."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from upath import UPath

from wmcache.cache import Identity, StoreCard, StoreWriter, TokenStore
from wmcache.cache.catalogue import look_at
from wmcache.cache.records import Record, Records, block_file, commits, record_file
from wmcache.cache.verify import verify
from wmcache.cache.writer import channel_sums
from wmcache.common.errors import UserError
from wmcache.common.files import read_json, seal, write_json
from wmcache.common.paths import AnyPath, names_in

Tokens = NDArray[np.float16]
MakeWriter = Callable[..., StoreWriter]
MakeFolding = Callable[..., StoreWriter]
SHARDS = 25
BLOCKED = [
    "block-000000.safetensors",
    "block-000001.safetensors",
    *(f"{shard:06d}.json" for shard in range(20, SHARDS)),
]


@pytest.fixture(scope="session")
def card(make_writer: MakeWriter, tmp_path_factory: pytest.TempPathFactory) -> StoreCard:
    """50 frames of [6, 4] in shards of 16."""
    return make_writer(tmp_path_factory.mktemp("card") / "some.zarr").card


numbers = st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=4, max_size=4)


@given(total=numbers, squares=numbers, scale=st.none() | numbers, size=st.integers(1, 2**40 - 1))
def test_a_record_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    card: StoreCard,
    identity: Identity,
    total: list[float],
    squares: list[float],
    scale: list[float] | None,
    size: int,
) -> None:
    path = tmp_path_factory.mktemp("record")
    record = Record((48, 50), size, "ab" * 32, identity.digest(), total, squares, scale, scale)
    Records(path, card, identity).write(3, record)
    assert Records(path, card, identity).read(3) == record
    assert [file.name for file in record_file(path, 3).parent.iterdir()] == ["000003.json"]


@pytest.fixture
def recorded(tmp_path: Path, card: StoreCard, identity: Identity) -> Path:
    """A folder with the record of shard 1."""
    record = Record((16, 32), 1000, "ab" * 32, identity.digest(), [1.5] * 4, [2.5] * 4)
    Records(tmp_path, card, identity).write(1, record)
    return tmp_path


def test_a_record_of_another_shard_or_identity_is_refused(recorded: Path, card: StoreCard, identity: Identity) -> None:
    said = r"000001\.json is the record of another shard or store; hint it with: wmcache repair"
    with pytest.raises(UserError, match=said):
        Records(recorded, card, dataclasses.replace(identity, image_size=96)).read(1)
    with pytest.raises(UserError, match=said):
        Records(recorded, dataclasses.replace(card, frames_per_shard=17), identity).read(1)
    record_file(recorded, 1).rename(record_file(recorded, 2))
    with pytest.raises(UserError, match=r"000002\.json is the record of another shard or store"):
        Records(recorded, card, identity).read(2)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"frames": [16, 32]}', "\x00"])
def test_a_garbled_record_is_refused_naming_its_file(
    recorded: Path, card: StoreCard, identity: Identity, text: str
) -> None:
    record_file(recorded, 1).write_text(text)
    with pytest.raises(UserError, match=r"000001\.json .*; hint it with: wmcache repair") as caught:
        Records(recorded, card, identity).read(1)
    assert "\n" not in str(caught.value)


def test_a_record_that_is_not_there_is_refused_naming_its_file(
    recorded: Path, card: StoreCard, identity: Identity
) -> None:
    with pytest.raises(UserError, match=r"000000\.json does not exist; hint it with: wmcache repair"):
        Records(recorded, card, identity).read(0)


@pytest.mark.parametrize("field", ["frames", "bytes", "sha256", "identity", "sum", "sum_of_squares"])
def test_every_number_of_a_record_is_under_its_seal(
    recorded: Path, card: StoreCard, identity: Identity, field: str
) -> None:
    file = record_file(recorded, 1)
    values = read_json(file, "")
    write_json(file, {**values, field: "another"})
    with pytest.raises(UserError, match=r"000001\.json differs from its own checksum"):
        Records(recorded, card, identity).read(1)
    # Even who seals it again cannot leave anything out.
    del values["checksum"], values[field]
    write_json(file, seal(values))
    with pytest.raises(UserError, match=rf"000001\.json is damaged \('{field}': Field required"):
        Records(recorded, card, identity).read(1)


# Blocks, of ten here.


@pytest.fixture
def tens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wmcache.cache.records.IN_A_BLOCK", 10)
    monkeypatch.setattr("wmcache.cache.verify.IN_A_BLOCK", 10)


@pytest.fixture(scope="session")
def make_folding(make_writer: MakeWriter, tmp_path_factory: pytest.TempPathFactory) -> MakeFolding:
    """(path, dtype) -> writer of a store of 50 frames in 25 shards."""
    like = make_writer(tmp_path_factory.mktemp("like") / "some.zarr")
    steps = {name: getattr(TokenStore.open(like.path, allow_incomplete=True), name) for name in ("action", "state")}
    steps |= {name: getattr(TokenStore.open(like.path, allow_incomplete=True), name) for name in ("episode", "step")}

    def make(path: AnyPath, dtype: str = "float16") -> StoreWriter:
        card = dataclasses.replace(like.card, frames_per_shard=2, dtype=dtype)
        return StoreWriter.create(path, card, dataclasses.replace(like.identity, store_dtype=dtype), steps)

    return make


@pytest.fixture
def write(tokens: Tokens) -> Callable[[StoreWriter, Any], None]:
    """(writer, shards): write these."""

    def write(writer: StoreWriter, shards: Any) -> None:
        for shard in shards:
            rows = writer.card.shard_frames(shard)
            with writer.claim(shard) as ours:
                assert ours
                writer.write_shard(shard, tokens[rows.start : rows.stop])

    return write


Write = Callable[[StoreWriter, Any], None]


@pytest.fixture
def folded(tmp_path: Path, tens: None, make_folding: MakeFolding, write: Write) -> StoreWriter:
    """Complete: two blocks, and five records that are none."""
    writer = make_folding(tmp_path / "folded.zarr")
    write(writer, range(SHARDS))
    writer.finish()
    return writer


def records_of(writer: StoreWriter) -> Records:
    return Records(writer.path, writer.card, writer.identity)


def names(writer: StoreWriter) -> list[str]:
    return names_in(commits(writer.path))


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.mark.usefixtures("tens")
class TestFolding:
    @pytest.mark.parametrize("far", [False, True], ids=["here", "far away"])
    def test_records_are_folded_with_the_last_of_them_and_not_before(
        self, tmp_path: Path, bucket: UPath, make_folding: MakeFolding, write: Write, far: bool
    ) -> None:
        writer = make_folding(bucket / "some.zarr" if far else tmp_path / "some.zarr")
        write(writer, [3, 0, 1, 2, 4, 9, 8, 7, 12, 6])
        assert names(writer) == [f"{shard:06d}.json" for shard in (0, 1, 2, 3, 4, 6, 7, 8, 9, 12)]
        write(writer, [5])
        assert names(writer) == ["000012.json", "block-000000.safetensors"]
        # The end is less than a block, so it stays as it is.
        write(writer, [*range(20, SHARDS)])
        assert names(writer) == ["000012.json", *BLOCKED[2:], BLOCKED[0]]

    def test_a_small_store_has_no_blocks(self, finished: Path) -> None:
        assert names_in(commits(finished)) == [f"{shard:06d}.json" for shard in range(4)]

    @pytest.mark.parametrize("dtype", ["float16", "int8"])
    def test_a_folded_record_reads_as_it_was_written(
        self, tmp_path: Path, make_folding: MakeFolding, write: Write, tokens: Tokens, dtype: str
    ) -> None:
        writer = make_folding(tmp_path / "some.zarr", dtype)
        write(writer, range(9))
        records = records_of(writer)
        before = [records.read(shard) for shard in range(9)]
        write(writer, [9])
        assert names(writer) == BLOCKED[:1]
        assert [records_of(writer).read(shard) for shard in range(9)] == before
        assert [records.read(shard) for shard in range(9)] == before
        assert before[3].sum == channel_sums(tokens[6:8])[0].tolist()
        assert (before[3].scale is None) == (dtype == "float16")

    def test_what_is_recorded_is_known_over_any_mixture(
        self, tmp_path: Path, make_folding: MakeFolding, write: Write
    ) -> None:
        writer = make_folding(tmp_path / "some.zarr")
        done = {*range(10), 12, 13, 24}
        write(writer, done)
        records = records_of(writer)
        assert set(np.flatnonzero(records.recorded() >= 0).tolist()) == done
        assert all(records.recorded()[shard] == writer.card.shard_bytes(shard) for shard in done)
        assert writer.pending() == sorted(set(range(SHARDS)) - done)
        assert all(writer.is_done(shard) == (shard in done) for shard in range(SHARDS))
        assert records.count() == look_at(writer.path).shards_done == len(done)
        with pytest.raises(UserError, match=r"000011\.json does not exist; hint it with: wmcache repair"):
            records.read(11)
        with pytest.raises(UserError, match=r"0000\d\d\.json does not exist"):
            list(records.thousands())
        write(writer, writer.pending())
        assert [block.shard.tolist() for block in records.thousands()] == [
            [*range(10)],
            [*range(10, 20)],
            [*range(20, SHARDS)],
        ]

    def test_statistics_are_those_of_a_store_without_blocks(
        self,
        tmp_path: Path,
        make_folding: MakeFolding,
        write: Write,
        tokens: Tokens,
        folded: StoreWriter,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("wmcache.cache.records.IN_A_BLOCK", 1000)
        plain = make_folding(tmp_path / "plain.zarr")
        write(plain, range(SHARDS))
        plain.finish()
        assert len(names(plain)) == SHARDS
        monkeypatch.setattr("wmcache.cache.records.IN_A_BLOCK", 10)
        ours, theirs = TokenStore.open(folded.path), TokenStore.open(plain.path)
        wide = tokens.astype(np.float64)
        for store in (ours, theirs):
            np.testing.assert_allclose(store.mean, wide.mean((0, 1)), rtol=1e-6)
            np.testing.assert_allclose(store.std, wide.std((0, 1)), rtol=1e-6)
        np.testing.assert_array_equal(ours.gather(np.arange(50)), tokens)
        hashes = {name: data for name, data in content(plain.path).items() if name.startswith("sha256")}
        assert hashes.items() <= content(folded.path).items()

    def test_a_dropped_shard_is_done_again_and_its_block_is_whole_again(
        self, folded: StoreWriter, write: Write
    ) -> None:
        before, records = content(folded.path), records_of(folded)
        folded.reopen([3, 15, 22])
        assert names(folded) == [name for name in BLOCKED[2:] if name != "000022.json"] + BLOCKED[:2]
        assert folded.pending() == [3, 15, 22]
        for shard in (3, 15, 22):
            with pytest.raises(UserError, match=f"{shard:06d}.json does not exist"):
                records.read(shard)
        assert records.read(4).frames == (8, 10)
        write(folded, [3, 15, 22])
        folded.finish()
        assert content(folded.path) == before

    def test_dropping_a_whole_block_leaves_no_file_of_it(self, folded: StoreWriter, write: Write) -> None:
        before = content(folded.path)
        folded.reopen([*range(10)])
        assert names(folded) == [*BLOCKED[2:], BLOCKED[1]]
        write(folded, range(10))
        folded.finish()
        assert content(folded.path) == before

    def test_a_shard_written_again_over_its_block_counts_once(self, folded: StoreWriter, tokens: Tokens) -> None:
        folded.write_shard(4, tokens[:2])
        record = records_of(folded).read(4)
        assert record.sum == channel_sums(tokens[:2])[0].tolist()
        assert records_of(folded).count() == SHARDS
        assert names(folded) == sorted(BLOCKED)

    def test_an_unsound_record_stops_no_other_shard(
        self, tmp_path: Path, make_folding: MakeFolding, write: Write
    ) -> None:
        writer = make_folding(tmp_path / "some.zarr")
        write(writer, range(9))
        record_file(writer.path, 3).write_text("{")
        write(writer, [9])
        assert len(names(writer)) == 10
        assert writer.pending()[0] == 3
        write(writer, [3])
        assert names(writer) == BLOCKED[:1]


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def _edit(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def edit(file: Path) -> None:
        tensors = load_file(file)
        tensors[name] = np.ascontiguousarray(change(tensors[name]))
        save_file(tensors, file)

    return edit


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "emptied": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-5]),
    "no tensors at all": lambda file: file.write_text("{}"),
    "a flipped bit": _flip,
    "without its checksum": lambda file: save_file({k: v for k, v in load_file(file).items() if k != "checksum"}, file),
    "with something more": lambda file: save_file({**load_file(file), "more": np.zeros(1)}, file),
    "other sums": _edit("sum", lambda it: it + 1),
    "other sizes": _edit("bytes", lambda it: it + 1),
    "other shards": _edit("shard", lambda it: it + 1),
    "a checksum of text": _edit("checksum", lambda it: it[:0]),
}


@pytest.mark.usefixtures("tens")
class TestDamage:
    @pytest.mark.parametrize("damage", DAMAGE)
    def test_a_damaged_block_is_refused_found_and_mended(
        self, folded: StoreWriter, tmp_path: Path, write: Write, damage: str
    ) -> None:
        before, file = content(folded.path), block_file(folded.path, 10)
        DAMAGE[damage](file)
        records = records_of(folded)
        with pytest.raises(UserError, match=r"block-000001\.safetensors .*; hint it with: wmcache repair") as caught:
            records.read(13)
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError):
            list(records.thousands())
        found = verify(folded.path)
        assert [fault.shard for fault in found.faults] == [*range(10, 20)]
        assert (found.shards_done, found.leftovers) == (15, [])
        assert folded.pending() == [*range(10, 20)]
        write(folded, folded.pending())
        assert verify(folded.path).sound
        assert content(folded.path) == before

    def test_a_lost_block_is_ten_lost_records(self, folded: StoreWriter) -> None:
        block_file(folded.path, 0).unlink()
        found = verify(folded.path)
        assert [(fault.shard, fault.file) for fault in found.faults] == [
            (shard, str(record_file(folded.path, shard))) for shard in range(10)
        ]

    def test_the_block_of_another_store_is_refused(
        self, tmp_path: Path, folded: StoreWriter, identity: Identity
    ) -> None:
        records = Records(folded.path, folded.card, dataclasses.replace(identity, image_size=96))
        with pytest.raises(UserError, match=r"block-000000\.safetensors is damaged \(it is another store's\)"):
            records.read(3)
        assert (records.recorded() < 0).all()

    def test_a_block_in_the_place_of_another_is_refused(self, folded: StoreWriter) -> None:
        block_file(folded.path, 0).write_bytes(block_file(folded.path, 10).read_bytes())
        assert np.flatnonzero(records_of(folded).recorded() < 0).tolist() == [*range(10)]
        assert [fault.shard for fault in verify(folded.path).faults] == [*range(10)]

    @pytest.mark.parametrize("field", ["scale", "middle", "sum", "sha256"])
    def test_a_sealed_block_of_another_shape_is_refused(self, folded: StoreWriter, field: str) -> None:
        records = records_of(folded)
        (block, *_) = records.thousands()
        wide = np.zeros((10, 7), getattr(block, field).dtype)
        records.write_block(dataclasses.replace(block, **{field: wide}))
        with pytest.raises(UserError, match="its shapes are others"):
            records_of(folded).read(0)

    def test_a_block_that_is_replaced_is_read_anew(self, folded: StoreWriter) -> None:
        records, other = records_of(folded), records_of(folded)
        before = records.read(3)
        (block, *_) = other.thousands()
        other.write_block(dataclasses.replace(block, bytes=block.bytes + 1))
        assert records.read(3).bytes == before.bytes + 1

    def test_blocks_that_no_store_of_this_size_has_are_left_over(self, folded: StoreWriter) -> None:
        strays = [commits(folded.path) / name for name in ("block-000002.safetensors", "block-7.safetensors")]
        for stray in strays:
            stray.write_bytes(b"x")
        assert verify(folded.path).leftovers == sorted(map(str, strays))
        assert records_of(folded).count() == SHARDS


SCRIPT = """
import os, signal, sys, time
from pathlib import Path
import numpy as np
from wmcache.cache import StoreWriter, TokenStore, Identity
from wmcache.cache import records
from wmcache.common import paths as places
from wmcache.cache.layout import read_attributes

records.IN_A_BLOCK = 10

def resume(path):
    return StoreWriter.resume(path, Identity.from_json(read_attributes(path)["identity"], "here"))
"""


def run(body: str, *words: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", SCRIPT + body, *map(str, words)])


KILLED = """
left = int(sys.argv[4])

def die(*arguments):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)

module = places if sys.argv[3] == "remove" else records
real = getattr(module, sys.argv[3])
writer = resume(Path(sys.argv[1]))
setattr(module, sys.argv[3], die)
writer.write_shard(9, np.load(sys.argv[2]))
"""


@pytest.mark.usefixtures("tens")
@pytest.mark.parametrize(
    ("function", "calls", "expected"),
    [("save_tensors", 0, (0, 10)), ("remove", 0, (1, 10)), ("remove", 1, (1, 9)), ("remove", 6, (1, 4))],
    ids=["before the block", "before the first deletion", "after the first", "in the middle"],
)
def test_a_kill_while_folding_loses_nothing_and_is_made_up_for(
    tmp_path: Path,
    make_folding: MakeFolding,
    write: Write,
    tokens: Tokens,
    folded: StoreWriter,
    function: str,
    calls: int,
    expected: tuple[int, int],
) -> None:
    writer = make_folding(tmp_path / "killed.zarr")
    write(writer, range(9))
    np.save(tmp_path / "tokens.npy", tokens[18:20])
    assert run(KILLED, writer.path, tmp_path / "tokens.npy", function, calls).wait(60) == -signal.SIGKILL
    left = [name for name in names(writer) if not name.endswith((".tmp", ".lock"))]
    assert (sum(name.startswith("block") for name in left), sum(name.endswith(".json") for name in left)) == expected
    assert writer.pending() == [*range(10, SHARDS)]
    assert records_of(writer).count() == 10
    write(writer, range(10, SHARDS))
    writer.finish()
    (commits(writer.path) / "block-000000.lock").unlink(missing_ok=True)
    assert {name: data for name, data in content(writer.path).items() if not name.endswith(".tmp")} == content(
        folded.path
    )
    assert verify(writer.path).sound


TOGETHER = """
folder, shard, mates = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split(",")
tokens = np.load(folder / "tokens.npy")
for path in sorted(folder.glob("*.zarr")):
    writer = resume(path)
    rows = writer.card.shard_frames(shard)
    (folder / f"{path.name}-{shard}").touch()
    while not all((folder / f"{path.name}-{mate}").exists() for mate in mates):
        pass
    with writer.claim(shard) as ours:
        assert ours
        writer.write_shard(shard, tokens[rows.start : rows.stop])
"""


@pytest.mark.usefixtures("tens")
def test_processes_that_finish_a_block_at_once_make_one(
    tmp_path: Path, make_folding: MakeFolding, write: Write, tokens: Tokens
) -> None:
    writers = [make_folding(tmp_path / f"{number}.zarr") for number in range(8)]
    for writer in writers:
        write(writer, range(8))
    np.save(tmp_path / "tokens.npy", tokens)
    processes = [run(TOGETHER, tmp_path, shard, "8,9") for shard in (8, 9)]
    assert [process.wait(100) for process in processes] == [0, 0]
    for writer in writers:
        assert names(writer) == BLOCKED[:1]
        assert writer.pending() == [*range(10, SHARDS)]
        records = records_of(writer)
        assert [records.read(shard).sum for shard in (0, 8, 9)] == [
            channel_sums(tokens[2 * shard : 2 * shard + 2])[0].tolist() for shard in (0, 8, 9)
        ]


@pytest.mark.usefixtures("tens")
def test_records_that_are_folded_while_somebody_looks_are_seen(
    folded: StoreWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Between the listing and the reading of a record it may move into a block.
    records = records_of(folded)
    real = Records._alone
    monkeypatch.setattr(Records, "_alone", lambda self, first=None: sorted({*real(self, first), 3, 4}))
    assert (records.recorded() >= 0).all()
    monkeypatch.undo()
    assert records.read(3).frames == (6, 8)
