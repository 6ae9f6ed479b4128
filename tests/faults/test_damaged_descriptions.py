"""Damaged records and descriptions of a store: refused by file, and written again without encoding."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from damage_tools import EVERY, FRAMES, SHARDS, Copy, edit_json, flip, forge_record, is_refusal, replace

from wmcache.cache import TokenStore
from wmcache.cache.layout import STEP_COLUMNS, DamagedError, read_attributes, write_attributes
from wmcache.cache.verify import verify
from wmcache.common.errors import UserError

Damage = Callable[[Path], object]

BOTH = pytest.mark.parametrize("dtype", ["float16", "int8"])

RECORDS: dict[str, Damage] = {
    "missing": lambda file: file.unlink(),
    "empty": lambda file: replace(file, b""),
    "another object": lambda file: replace(file, b"{}"),
    "a digit of a sum changed": lambda file: edit_json(file, lambda it: it["sum"].__setitem__(3, it["sum"][3] + 1e-9)),
    "of another shard": lambda file: shutil.copy(file.with_name("000001.json"), file),
    "of another store": lambda file: forge_record(file, lambda it: it.update(identity="0" * 64)),
    "without its sums": lambda file: forge_record(file, lambda it: it.pop("sum")),
}


@BOTH
@pytest.mark.parametrize("damage", RECORDS)
def test_a_lost_record_is_written_again(copy: Copy, orphan: Copy, damage: str, dtype: str) -> None:
    # From the tokens alone in float16; in int8 the shard is made again.
    lost = orphan if dtype == "float16" else copy
    RECORDS[damage](lost.record(2))
    np.testing.assert_array_equal(TokenStore.open(lost.path).gather(EVERY), lost.tokens)
    [fault] = verify(lost.path).faults
    assert (fault.shard, fault.file) == (2, str(lost.record(2)))
    assert is_refusal(fault.reason, lost.record(2), f"wmcache repair {lost.path}")
    others, shards = lost.stamps(without=2), lost.stamps(records=False)
    lost.repair()
    assert lost.stamps(without=2) == others
    assert dtype == "int8" or lost.stamps(records=False) == shards
    assert lost.restored


@pytest.mark.parametrize("folder_too", [False, True], ids=["files", "folder"])
def test_all_lost_records_are_written_again_without_encoding(orphan: Copy, folder_too: bool) -> None:
    for shard in range(SHARDS):
        orphan.record(shard).unlink()
    if folder_too:  # tools that copy files by name make no empty folders
        (orphan.path / "tokens" / "commits").rmdir()
    shards = orphan.stamps(records=False)
    assert [fault.shard for fault in verify(orphan.path).faults] == [*range(SHARDS)]
    orphan.repair()
    assert orphan.stamps(records=False) == shards
    assert orphan.restored


# The description of a store.


def change_digit(file: Path, key: str) -> None:
    text = file.read_text()
    start = text.index(f'"{key}"')
    at = next(i for i in range(start + len(key) + 2, len(text)) if text[i].isdigit())
    replace(file, f"{text[:at]}{9 - int(text[at])}{text[at + 1 :]}".encode())


DESCRIPTIONS: dict[str, Damage] = {
    "missing": lambda file: file.unlink(),
    "cut": lambda file: replace(file, file.read_bytes()[:1000]),
    "a digit of a mean changed": lambda file: change_digit(file, "mean"),
    "a digit of the format changed": lambda file: change_digit(file, "format_version"),
    "attributes lost": lambda file: edit_json(file, lambda it: it.pop("attributes")),
    "of another format": lambda file: edit_json(file, lambda it: it["attributes"].update(format="other")),
    "an array": lambda file: edit_json(file, lambda it: it.update(node_type="array")),
}


def check_description(copy: Copy, named: Path) -> None:
    """A damaged description is refused with the command that fixes it, and that command encodes nothing."""
    with pytest.raises(DamagedError) as refusal:
        TokenStore.open(copy.path)
    assert is_refusal(refusal.value, named, "wmcache extract")
    found, before = verify(copy.path), copy.stamps()
    assert [fault.shard for fault in found.faults] == [None]
    assert is_refusal(found.faults[0].reason, named)
    assert not found.sound
    copy.extract()
    assert copy.stamps() == before
    assert copy.restored


@BOTH
@pytest.mark.parametrize("damage", DESCRIPTIONS)
def test_a_damaged_zarr_json_is_refused_and_written_again_by_the_same_extraction(copy: Copy, damage: str) -> None:
    DESCRIPTIONS[damage](copy.path / "zarr.json")
    with pytest.raises(UserError, match="wmcache extract"):
        copy.repair()
    check_description(copy, copy.path / "zarr.json")


def make_incomplete(copy: Copy, lost: int) -> None:
    attributes = read_attributes(copy.path)
    kept = {name: value for name, value in attributes.items() if name not in ("mean", "std")}
    columns = {name: kept["columns"][name] for name in STEP_COLUMNS}
    write_attributes(copy.path, {**kept, "columns": columns, "complete": False})
    copy.record(lost).unlink()
    copy.shard(lost).unlink()


def test_a_store_that_was_declared_complete_by_hand_is_refused_and_finished(copy: Copy) -> None:
    make_incomplete(copy, 3)
    file = copy.path / "zarr.json"
    replace(file, file.read_bytes().replace(b'"complete": false', b'"complete": true'))
    with pytest.raises(UserError) as refusal:
        TokenStore.open(copy.path)
    assert is_refusal(refusal.value, file, "wmcache extract")
    others = copy.stamps(without=3)
    copy.extract()
    assert copy.stamps(without=3) == others
    assert copy.restored


# The descriptions of the arrays.


ARRAYS: dict[str, Damage] = {
    "missing": DESCRIPTIONS["missing"],
    "cut": DESCRIPTIONS["cut"],
    "fewer frames": lambda file: edit_json(file, lambda it: it["shape"].__setitem__(0, FRAMES - 1)),
    "another fill value": lambda file: edit_json(file, lambda it: it.update(fill_value=0.0)),
    "an unknown codec": lambda file: edit_json(file, lambda it: it["codecs"].append({"name": "rot13"})),
    "a group": lambda file: replace(file, b'{"zarr_format": 3, "node_type": "group"}'),
}


@pytest.mark.parametrize("damage", ARRAYS)
def test_a_damaged_description_of_the_tokens_is_refused_and_written_again(copy: Copy, damage: str) -> None:
    ARRAYS[damage](copy.path / "tokens" / "zarr.json")
    check_description(copy, copy.path / "tokens" / "zarr.json")


def chunk_of(column: Path) -> Path:
    [file] = [part for part in (column / "c").rglob("*") if part.is_file()]
    return file


def replace_by_another(column: Path) -> None:
    shutil.rmtree(column)
    shutil.copytree(column.with_name("step" if column.name == "episode" else "episode"), column)


COLUMNS: dict[str, Damage] = {
    "missing": lambda column: shutil.rmtree(column),
    "chunk missing": lambda column: chunk_of(column).unlink(),
    "chunk cut": lambda column: replace(chunk_of(column), chunk_of(column).read_bytes()[:-5]),
    "byte flipped": lambda column: flip(chunk_of(column), chunk_of(column).stat().st_size // 2),
    "zarr.json garbled": lambda column: replace(column / "zarr.json", b"{"),
    "type edited": lambda column: edit_json(column / "zarr.json", lambda it: it.update(data_type="int16")),
    "another column": replace_by_another,
    "a group": lambda column: replace(column / "zarr.json", b'{"zarr_format": 3, "node_type": "group"}'),
}


@pytest.mark.parametrize("damage", COLUMNS)
@pytest.mark.parametrize(("column", "dtype"), [*((column, "float16") for column in STEP_COLUMNS), ("scale", "int8")])
def test_a_damaged_column_is_refused_and_written_again_by_the_same_extraction(
    copy: Copy, column: str, damage: str
) -> None:
    COLUMNS[damage](copy.path / column)
    check_description(copy, copy.path / column)


FILES = [
    "zarr.json",
    "tokens/zarr.json",
    "tokens/commits/000002.json",
    *(f"{column}/zarr.json" for column in STEP_COLUMNS),
]


@pytest.mark.parametrize("seed", range(30))
def test_a_flipped_bit_anywhere_in_the_descriptions_gives_the_right_numbers_or_one_line(copy: Copy, seed: int) -> None:
    rng, file = np.random.default_rng(seed), copy.path / FILES[seed % len(FILES)]
    # The seal of the group's zarr.json covers all but its last 100 bytes, so half of the flips are there.
    size = file.stat().st_size
    first = size - 100 if seed % 2 and file.parent == copy.path else 0
    flip(file, int(rng.integers(first, size)), 1 << int(rng.integers(8)))
    found, refusal = verify(copy.path), None
    try:
        store = TokenStore.open(copy.path)
        np.testing.assert_array_equal(store.gather(EVERY), copy.tokens)
        np.testing.assert_array_equal(store.state, TokenStore.open(copy.whole).state)
    except UserError as error:
        refusal = error
    if refusal:
        assert is_refusal(refusal, "wmcache extract")
        assert not found.sound
        copy.extract()
    elif not found.sound:
        assert [fault.shard for fault in found.faults] == [2]
        copy.repair()
    else:
        return
    assert copy.restored
