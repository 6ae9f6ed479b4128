"""Whatever is not as it was written is found, named and laid to the shard that has to be done again; looking changes nothing."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec

from wmcache.cache import Identity, StoreCard, StoreWriter, TokenStore
from wmcache.cache.layout import (
    FILL,
    adopt_layout,
    read_attributes,
    shard_file,
    write_attributes,
)
from wmcache.cache.records import Records, record_file
from wmcache.cache.verify import check_shard, leftovers, verify, whole_tokens
from wmcache.common.errors import UserError
from wmcache.common.files import read_json, seal, write_json

Tokens = NDArray[np.float16]
MakeWriter = Callable[..., StoreWriter]
STRIDE = 6 * 4 * 2 + 4


def everything(path: Path) -> dict[Path, tuple[int, bytes]]:
    return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in path.rglob("*") if file.is_file()}


def flip(file: Path, *places: int) -> None:
    data = bytearray(file.read_bytes())
    for place in places:
        data[place] ^= 1
    file.write_bytes(data)


@pytest.fixture
def card(finished: Path) -> StoreCard:
    return TokenStore.open(finished).card


@pytest.fixture
def int8_path(tmp_path: Path, finished: Path, identity: Identity, tokens: Tokens) -> Path:
    like = TokenStore.open(finished)
    card = dataclasses.replace(like.card, dtype="int8")
    steps = {name: getattr(like, name) for name in ("action", "state", "episode", "step")}
    writer = StoreWriter.create(tmp_path / "int8.zarr", card, dataclasses.replace(identity, store_dtype="int8"), steps)
    for shard in writer.pending():
        rows = card.shard_frames(shard)
        writer.write_shard(shard, tokens[rows.start : rows.stop])
    writer.finish()
    return writer.path


def test_a_sound_store(finished: Path, int8_path: Path) -> None:
    for path in (finished, int8_path):
        before = everything(path)
        found = verify(path)
        assert found.sound
        assert (found.path, found.complete, found.shards, found.shards_done, found.frames) == (
            str(path),
            True,
            4,
            4,
            50,
        )
        assert (found.faults, found.leftovers, found.drift) == ([], [], None)
        assert everything(path) == before


def _no_record(path: Path) -> None:
    record_file(path, 1).unlink()


def _garbled_record(path: Path) -> None:
    record_file(path, 1).write_text("{")


def _changed_record(path: Path) -> None:
    values = read_json(record_file(path, 1), "")
    write_json(record_file(path, 1), {**values, "sum": [0.0] * 4})


def _another_shards_record(path: Path) -> None:
    shutil.copy(record_file(path, 2), record_file(path, 1))


def _another_stores_record(path: Path) -> None:
    values = read_json(record_file(path, 1), "")
    del values["checksum"]
    write_json(record_file(path, 1), seal({**values, "identity": "00" * 32}))


def _no_shard(path: Path) -> None:
    shard_file(path, 1).unlink()


def _a_folder_in_its_place(path: Path) -> None:
    shard_file(path, 1).unlink()
    shard_file(path, 1).mkdir()


def _cut(path: Path) -> None:
    file = shard_file(path, 1)
    file.write_bytes(file.read_bytes()[:-7])


def _longer(path: Path) -> None:
    file = shard_file(path, 1)
    file.write_bytes(file.read_bytes() + b"\0")


def _flipped(path: Path) -> None:
    flip(shard_file(path, 1), STRIDE + 3, 4 * STRIDE, 16 * STRIDE - 1)


def _flipped_in_the_index(path: Path) -> None:
    flip(shard_file(path, 1), -9)


def _frames_exchanged(path: Path) -> None:
    file = shard_file(path, 1)
    data = file.read_bytes()
    file.write_bytes(data[STRIDE : 2 * STRIDE] + data[:STRIDE] + data[2 * STRIDE :])


def _another_shards_tokens(path: Path) -> None:
    shutil.copy(shard_file(path, 0), shard_file(path, 1))


RECORDS = {
    _no_record: r"does not exist; hint it with: wmcache repair",
    _garbled_record: r"cannot be read",
    _changed_record: r"differs from its own checksum",
    _another_shards_record: r"is the record of another shard or store",
    _another_stores_record: r"is the record of another shard or store",
}
SHARDS = {
    _no_shard: r"^it does not exist$",
    _a_folder_in_its_place: r"^it ",
    _cut: r"^it has 1085 bytes instead of 1092$",
    _longer: r"^it has 1093 bytes instead of 1092$",
    _flipped: r"^it differs from its checksum, in frames 17, 20, 31$",
    _flipped_in_the_index: r"^the index of shard .*tokens/c.1.0.0 is damaged",
    _frames_exchanged: r"^it differs from its checksum, though every frame is whole$",
    _another_shards_tokens: r"^it differs from its checksum, though every frame is whole$",
}


@pytest.mark.parametrize("damage", [*RECORDS, *SHARDS])
def test_a_damaged_shard_is_one_fault(finished: Path, damage: Callable[[Path], None]) -> None:
    damage(finished)
    before = everything(finished)
    found = verify(finished)
    assert everything(finished) == before
    assert not found.sound
    assert (found.complete, found.shards, found.shards_done) == (True, 4, 3)
    (fault,) = found.faults
    assert fault.shard == 1
    assert fault.file == str((record_file if damage in RECORDS else shard_file)(finished, 1))
    assert "\n" not in fault.reason
    assert re.search({**RECORDS, **SHARDS}[damage], fault.reason), fault.reason


def test_frames_of_bytes_are_named_too(int8_path: Path) -> None:
    flip(shard_file(int8_path, 3), 5, 28 + 5)
    (fault,) = verify(int8_path).faults
    assert (fault.shard, fault.reason) == (3, "it differs from its checksum, in frames 48, 49")


def test_every_fault_is_found_and_not_the_first_alone(finished: Path) -> None:
    _no_record(finished)
    flip(shard_file(finished, 0), 0)
    shard_file(finished, 3).unlink()
    (finished / "step" / "zarr.json").unlink()
    found = verify(finished)
    assert [fault.shard for fault in found.faults] == [None, 0, 1, 3]
    assert found.shards_done == 1


def test_a_store_that_has_lost_its_records_has_a_fault_in_every_shard(finished: Path) -> None:
    shutil.rmtree(finished / "tokens" / "commits")
    found = verify(finished)
    assert [fault.shard for fault in found.faults] == [0, 1, 2, 3]
    assert not found.sound


def test_a_store_that_has_lost_its_tokens_is_damaged(finished: Path) -> None:
    shutil.rmtree(finished / "tokens")
    found = verify(finished)
    assert {None, 0, 1, 2, 3} == {fault.shard for fault in found.faults}
    assert not found.sound


def _garbled_attributes(path: Path) -> None:
    (path / "zarr.json").write_text("{")


def _changed_attributes(path: Path) -> None:
    values = read_json(path / "zarr.json", "")
    values["attributes"]["mean"][0] += 1
    write_json(path / "zarr.json", values)


def _no_attributes(path: Path) -> None:
    (path / "zarr.json").unlink()


def _changed_column(path: Path) -> None:
    zarr.open_group(path, mode="r+")["action"][7, 0] = 0.5  # type: ignore[index]


def _no_column(path: Path) -> None:
    shutil.rmtree(path / "episode")


def _other_array(path: Path) -> None:
    values = read_json(path / "tokens" / "zarr.json", "")
    write_json(path / "tokens" / "zarr.json", {**values, "fill_value": 0.0})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_garbled_attributes, "zarr.json cannot be read"),
        (_changed_attributes, "zarr.json differs from its own checksum"),
        (_no_attributes, "zarr.json does not exist"),
        (_changed_column, "made-up.zarr/action cannot be relied on"),
        (_no_column, "made-up.zarr/episode cannot be relied on"),
        (_other_array, "tokens/zarr.json does not fit the store"),
    ],
)
def test_a_damaged_description_is_a_fault_of_no_shard(
    finished: Path, damage: Callable[[Path], None], said: str
) -> None:
    damage(finished)
    before = everything(finished)
    found = verify(finished)
    assert everything(finished) == before
    assert not found.sound
    (fault,) = found.faults
    assert fault.shard is None
    assert said in fault.reason
    assert "\n" not in fault.reason


def test_a_damaged_scale_is_a_fault_of_no_shard(int8_path: Path) -> None:
    (file,) = (file for file in (int8_path / "scale" / "c").rglob("*") if file.is_file())
    file.unlink()
    found = verify(int8_path)
    assert [(fault.shard, found.shards_done) for fault in found.faults] == [(None, 4)]
    assert "int8.zarr/scale cannot be relied on" in found.faults[0].reason


def test_what_has_not_been_done_yet_is_no_fault(tmp_path: Path, make_writer: MakeWriter, tokens: Tokens) -> None:
    writer = make_writer(tmp_path / "some.zarr")
    found = verify(writer.path)
    assert (found.complete, found.sound, found.shards, found.shards_done, found.faults) == (False, False, 4, 0, [])
    writer.write_shard(2, tokens[32:48])
    found = verify(writer.path)
    assert (found.complete, found.sound, found.shards_done, found.faults) == (False, False, 1, [])
    # Done, and gone bad since: that is one.
    flip(shard_file(writer.path, 2), 3)
    assert [fault.shard for fault in verify(writer.path).faults] == [2]


def test_a_store_that_lacks_only_the_last_word_is_not_sound(finished: Path) -> None:
    write_attributes(finished, {**read_attributes(finished), "complete": False})
    found = verify(finished)
    assert (found.shards_done, found.faults, found.complete, found.sound) == (4, [], False, False)


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.zarr does not exist"):
        verify(tmp_path / "none.zarr")
    zarr.create_group(tmp_path / "other.zarr")
    with pytest.raises(UserError, match=r"other\.zarr is not a token store"):
        verify(tmp_path / "other.zarr")


LEFTOVERS = [
    "tokens/commits/000001.lock",
    "tokens/commits/.000001.json.elsewhere.123.tmp",
    "tokens/commits/000004.json",
    "tokens/commits/block-000000.safetensors",
    "tokens/commits/block-000000.lock",
    "tokens/commits/notes.txt",
    "tokens/c.1.0.0.partial",
    "tokens/c.1.0.1",
    "tokens/c.4.0.0",
    "tokens/c.01.0.0",
    "tokens/c.old.0.0",
]


@pytest.mark.parametrize("name", LEFTOVERS)
def test_what_belongs_to_nobody_is_named_and_does_no_harm(finished: Path, card: StoreCard, name: str) -> None:
    file = finished / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"left over")
    found = verify(finished)
    assert found.sound
    assert found.leftovers == [str(file)]
    assert list(leftovers(finished, card)) == [file]
    assert TokenStore.open(finished).gather(np.arange(50)).shape == (50, 6, 4)


def test_a_shard_is_checked_alone(finished: Path, card: StoreCard, identity: Identity) -> None:
    flip(shard_file(finished, 2), 3)
    records = Records(finished, card, identity)
    for shard in (0, 1, 3):
        assert check_shard(records, shard, card, mappable=True) == []
    (fault,) = check_shard(records, 2, card, mappable=True)
    assert (fault.shard, fault.reason) == (2, "it differs from its checksum, in frames 32")
    (fault,) = check_shard(records, 2, card, mappable=False)
    assert (fault.shard, fault.reason) == (2, "it differs from its checksum")


def test_a_store_compressed_by_others_reads_well_but_is_not_what_was_written(finished: Path, tokens: Tokens) -> None:
    # Its records are of the files that were; the reader still finds every token.
    shutil.move(finished / "tokens" / "commits", finished / "commits")
    array = zarr.open_group(finished, mode="r+").create_array(
        "tokens",
        shape=tokens.shape,
        chunks=(1, 6, 4),
        shards=(16, 6, 4),
        dtype="float16",
        fill_value=FILL["float16"],
        compressors=ZstdCodec(),
        chunk_key_encoding={"name": "default", "separator": "."},
        overwrite=True,
    )
    array[:] = tokens
    shutil.move(finished / "commits", finished / "tokens" / "commits")
    found = verify(finished)
    assert [fault.shard for fault in found.faults] == [None, 0, 1, 2, 3]
    assert "tokens/zarr.json" in found.faults[0].reason
    assert all(re.match("it (has|differs)", fault.reason) for fault in found.faults[1:])
    adopt_layout(finished)
    np.testing.assert_array_equal(TokenStore.open(finished).gather(np.arange(50)), tokens)


@pytest.mark.parametrize("damage", [None, *RECORDS])
def test_a_shard_is_whole_whatever_became_of_its_record(
    finished: Path, card: StoreCard, tokens: Tokens, damage: Callable[[Path], None] | None
) -> None:
    if damage:
        damage(finished)
    found = whole_tokens(finished, 1, card)
    assert found is not None
    np.testing.assert_array_equal(found, tokens[16:32])


@pytest.mark.parametrize("damage", [_no_shard, _cut, _longer, _flipped, _flipped_in_the_index])
def test_a_shard_that_is_not_whole_has_no_tokens(
    finished: Path, card: StoreCard, damage: Callable[[Path], None]
) -> None:
    damage(finished)
    assert whole_tokens(finished, 1, card) is None


def test_tokens_that_are_no_numbers_are_not_whole(finished: Path, card: StoreCard) -> None:
    # Anybody's zarr writes them with sound checksums; ours never does.
    zarr.open_group(finished, mode="r+")["tokens"][20, 0, 0] = np.nan  # type: ignore[index]
    assert whole_tokens(finished, 1, card) is None
    assert whole_tokens(finished, 0, card) is not None


def test_a_shard_of_bytes_is_nothing_without_its_record(int8_path: Path) -> None:
    store = TokenStore.open(int8_path)
    assert Records(int8_path, store.card, store.identity).read(1).scale is not None
    assert whole_tokens(int8_path, 1, store.card) is None
