"""Something on the disk is not as it was written: it is noticed, named, and repaired, and whatever is not damaged stays as it is."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace as with_other
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damage_tools import (
    EVERY,
    FRAMES,
    PER_SHARD,
    SHARDS,
    Small,
    agree,
    command,
    edit_json,
    flip,
    forge_record,
    gather_around_a_cut,
    index_bytes,
    is_refusal,
    lose_chunk,
    make_small,
    replace,
    rewrite_index,
    shard_stamps,
    stamps,
    work_stamps,
    zarr_reader,
)
from fault_workers import Child
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from upath import UPath

from wmcache.cache import TokenStore
from wmcache.cache.catalogue import remove
from wmcache.cache.layout import STEP_COLUMNS, read_attributes, shard_file, write_attributes
from wmcache.cache.records import record_file
from wmcache.cache.verify import verify
from wmcache.cache.writer import StoreWriter
from wmcache.common.errors import UserError
from wmcache.common.paths import as_path, upload
from wmcache.common.paths import remove as remove_all
from wmcache.engine.checkpoint import last_checkpoint
from wmcache.pipeline import encoders
from wmcache.pipeline.collect import collect
from wmcache.pipeline.extract import extract
from wmcache.pipeline.frames import FrameDataset, write_shard
from wmcache.pipeline.repair import repair
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.train import train

Content = Callable[[Path], dict[str, bytes]]
Start = Callable[..., Child]
Damage = Callable[[Path], object]
Tokens = NDArray[np.float16]

DTYPES = ("float16", "int8")
AGAIN = "run its wmcache extract again"


@pytest.fixture(scope="module")
def smalls(tcn_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Small]:
    """One for each store dtype; read only."""
    return {dtype: make_small(tmp_path_factory.mktemp(dtype), tcn_weights, dtype) for dtype in DTYPES}


@pytest.fixture
def dtype() -> str:
    """Of the store that is damaged, where a test does not say otherwise."""
    return "float16"


@pytest.fixture
def small(smalls: dict[str, Small], dtype: str) -> Small:
    return smalls[dtype]


@pytest.fixture(scope="module")
def all_tokens(smalls: dict[str, Small]) -> dict[str, Tokens]:
    return {dtype: TokenStore.open(small.store).gather(EVERY) for dtype, small in smalls.items()}


@pytest.fixture
def tokens(all_tokens: dict[str, Tokens], dtype: str) -> Tokens:
    return all_tokens[dtype]


@pytest.fixture
def path(small: Small, tmp_path: Path) -> Path:
    """A store of one's own, to be damaged at will."""
    return Path(shutil.copytree(small.store, tmp_path / "copy.zarr"))


@pytest.fixture(scope="module")
def orphan(smalls: dict[str, Small], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose frames and encoder are gone, so that nothing of it can be encoded again; read only."""
    root, small = tmp_path_factory.mktemp("orphan"), smalls["float16"]
    dataset = Path(shutil.copytree(small.dataset, root / "small"))
    weights = Path(shutil.copy(small.weights, root / "tcn.safetensors"))
    lost = Small(dataset, weights, root / "orphan.zarr")
    lost.extract(lost.store)
    shutil.rmtree(dataset)
    weights.unlink()
    return lost.store


def other_stamps(path: Path, shard: int | None = None) -> dict[Path, tuple[int, int]]:
    """When the files of all shards but one were written, and their records."""
    found = work_stamps(path)
    mine = () if shard is None else (shard_file(path, shard), record_file(path, shard))
    return {file: stamp for file, stamp in found.items() if file not in mine}


# A byte of a shard.

PLACES: dict[str, Callable[[int, int], tuple[int, int]]] = {
    "first byte of a shard": lambda stride, size: (2, 0),
    "first byte of a frame": lambda stride, size: (2, stride),
    "last byte of a frame's tokens": lambda stride, size: (2, 2 * stride - 5),
    "first byte of a frame's checksum": lambda stride, size: (2, 2 * stride - 4),
    "last byte of a frame's checksum": lambda stride, size: (2, 2 * stride - 1),
    "first byte of the index": lambda stride, size: (2, PER_SHARD * stride),
    "a length in the index": lambda stride, size: (2, PER_SHARD * stride + 16 + 8),
    "last byte of the index": lambda stride, size: (2, size - 5),
    "first byte of the index's checksum": lambda stride, size: (2, size - 4),
    "last byte of a shard": lambda stride, size: (2, size - 1),
    "last frame of the short shard": lambda stride, size: (5, stride),
    "place of a frame that the short shard does not have": lambda stride, size: (5, 2 * stride + 2 * 16 + 3),
}


def check_flip(small: Small, path: Path, tokens: Tokens, content: Content, shard: int, offset: int, mask: int) -> None:
    """Flip bits, and follow the user from the first error to the repaired store."""
    card, file = TokenStore.open(path).card, shard_file(path, shard)
    row = offset // (card.frame_bytes + 4)
    frame = card.shard_frames(shard)[row] if row < len(card.shard_frames(shard)) else None
    whole = [number for number in EVERY if number // PER_SHARD != shard or frame not in (None, number)]
    flip(file, offset, mask)

    store = TokenStore.open(path)
    for frames in (EVERY, np.array([frame or shard * PER_SHARD])):
        with pytest.raises(UserError) as refusal:
            store.gather(frames)
        assert is_refusal(refusal.value, file, f"wmcache repair {path}", "" if frame is None else f"frame {frame} ")
    np.testing.assert_array_equal(store.gather(np.array(whole)), tokens[whole])
    with pytest.raises(UserError, match="tokens"):
        zarr_reader(path).gather(EVERY, np.empty((FRAMES, *card.frame_shape), card.dtype))

    found = verify(path)
    assert [(fault.shard, fault.file) for fault in found.faults] == [(shard, str(file))]
    assert found.shards_done == SHARDS - 1
    assert not found.sound
    if frame is not None:
        assert found.faults[0].reason.endswith(f"in frames {frame}")

    others, damaged = other_stamps(path, shard), file.stat()
    repair(path, device="cpu")
    assert other_stamps(path, shard) == others
    # A new file may get the inode of the deleted one.
    assert (file.stat().st_ino, file.stat().st_mtime_ns) != (damaged.st_ino, damaged.st_mtime_ns)
    assert content(path) == content(small.store)
    assert verify(path).sound
    np.testing.assert_array_equal(TokenStore.open(path).gather(EVERY), tokens)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", PLACES)
def test_a_flipped_bit_is_named_found_and_mended(
    small: Small, path: Path, tokens: Tokens, content: Content, place: str
) -> None:
    card = TokenStore.open(path).card
    shard, offset = PLACES[place](card.frame_bytes + 4, card.shard_bytes(2))
    check_flip(small, path, tokens, content, shard, offset, 1)


@pytest.mark.parametrize(("seed", "dtype"), [(seed, DTYPES[seed % 2]) for seed in range(30)])
def test_flipped_bits_anywhere_are_named_found_and_mended(
    small: Small, path: Path, tokens: Tokens, content: Content, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    shard = int(rng.integers(SHARDS))
    size = shard_file(path, shard).stat().st_size
    check_flip(small, path, tokens, content, shard, int(rng.integers(size)), int(rng.integers(1, 256)))


def test_damage_in_several_shards_is_mended_at_once(small: Small, path: Path, content: Content, tokens: Tokens) -> None:
    flip(shard_file(path, 0), 10)
    flip(shard_file(path, 0), 600)
    shard_file(path, 3).unlink()
    record_file(path, 4).unlink()
    os.truncate(shard_file(path, 5), 99)
    found = verify(path)
    assert [fault.shard for fault in found.faults] == [0, 3, 4, 5]
    assert "in frames 0, 2" in found.faults[0].reason
    repair(path, device="cpu")
    assert content(path) == content(small.store)


# The file of a shard.

CUTS = {
    "emptied": lambda data: b"",
    "cut to a byte": lambda data: data[:1],
    "cut after a frame": lambda data: data[:260],
    "cut before its index": lambda data: data[: -(16 * PER_SHARD + 4)],
    "cut by a byte": lambda data: data[:-1],
    "cut in the middle, both ends there": lambda data: data[:300] + data[400:],
    "appended to": lambda data: data + b"\0",
    "written twice": lambda data: data + data,
    **{
        f"cut at random, seed {seed}": lambda data, seed=seed: data[
            : int(np.random.default_rng(seed).integers(1, len(data)))
        ]
        for seed in range(4)
    },
}
SAME_SIZE = {
    "zeroed": lambda data: bytes(len(data)),
    "zeroed from the middle on": lambda data: data[:500] + bytes(len(data) - 500),
    "zeroed up to the middle": lambda data: bytes(500) + data[500:],
    "shifted by a byte": lambda data: data[1:] + b"\0",
}


def check_lost_shard(small: Small, path: Path, content: Content, lost: int) -> None:
    """A shard whose file is not the one that was written: found, and exactly that one is made again."""
    found = verify(path)
    assert [(fault.shard, fault.file) for fault in found.faults] == [(lost, str(shard_file(path, lost)))]
    others = other_stamps(path, lost)
    repair(path, device="cpu")
    assert other_stamps(path, lost) == others
    assert content(path) == content(small.store)
    assert verify(path).sound


@pytest.mark.parametrize("cut", CUTS)
def test_a_shard_of_another_length_is_refused_found_and_mended(
    small: Small, path: Path, content: Content, cut: str
) -> None:
    file = shard_file(path, 2)
    opened = TokenStore.open(path)
    replace(file, CUTS[cut](file.read_bytes()))
    for read in (lambda: TokenStore.open(path), lambda: opened.gather(EVERY)):
        with pytest.raises(UserError) as refusal:
            read()
        assert is_refusal(refusal.value, file, f"wmcache repair {path}")
    check_lost_shard(small, path, content, 2)


@pytest.mark.parametrize("other", SAME_SIZE)
def test_a_shard_of_the_right_length_with_other_bytes_is_refused_found_and_mended(
    small: Small, path: Path, content: Content, other: str
) -> None:
    file = shard_file(path, 2)
    replace(file, SAME_SIZE[other](file.read_bytes()))
    with pytest.raises(UserError) as refusal:
        TokenStore.open(path).gather(EVERY)
    assert is_refusal(refusal.value, file, f"wmcache repair {path}")
    check_lost_shard(small, path, content, 2)


def test_a_missing_shard_is_refused_found_and_mended(small: Small, path: Path, content: Content) -> None:
    opened = TokenStore.open(path)
    shard_file(path, 2).unlink()
    for read in (lambda: TokenStore.open(path), lambda: opened.gather(EVERY)):
        with pytest.raises(UserError) as refusal:
            read()
        assert is_refusal(refusal.value, shard_file(path, 2), f"wmcache repair {path}")
    check_lost_shard(small, path, content, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other", [1, 5])
def test_a_shard_in_the_place_of_another_is_found_and_made_again(
    small: Small, path: Path, content: Content, tokens: Tokens, other: int
) -> None:
    # Every frame of it equals its own checksum; only the record knows that these are the frames of another shard.
    replace(shard_file(path, 2), shard_file(path, other).read_bytes())
    check_lost_shard(small, path, content, 2)
    np.testing.assert_array_equal(TokenStore.open(path).gather(EVERY), tokens)


def test_a_shard_in_the_place_of_another_is_made_again_even_where_its_record_is_lost(
    small: Small, path: Path, content: Content
) -> None:
    replace(shard_file(path, 2), shard_file(path, 1).read_bytes())
    record_file(path, 2).unlink()
    repair(path, device="cpu")
    assert content(path) == content(small.store)


def test_a_store_without_any_shard_is_refused_found_and_mended(small: Small, path: Path, content: Content) -> None:
    for shard in range(SHARDS):
        shard_file(path, shard).unlink()
    with pytest.raises(UserError, match=r"6 of 6 shards are missing .* wmcache repair"):
        TokenStore.open(path)
    assert [fault.shard for fault in verify(path).faults] == [*range(SHARDS)]
    repair(path, device="cpu")
    assert content(path) == content(small.store)


@pytest.mark.parametrize("damage", [lambda file: flip(file, 700), lambda file: file.unlink()], ids=["flip", "missing"])
def test_the_same_extraction_mends_what_it_can_see_and_repair_the_rest(
    small: Small, path: Path, content: Content, damage: Damage
) -> None:
    damage(shard_file(path, 2))
    seen = not shard_file(path, 2).exists()
    small.extract(path)
    assert verify(path).sound == seen
    repair(path, device="cpu")
    assert content(path) == content(small.store)


def test_what_cannot_be_made_again_is_not_dropped(orphan: Path, tmp_path: Path, content: Content) -> None:
    path = Path(shutil.copytree(orphan, tmp_path / "copy.zarr"))
    flip(shard_file(path, 2), 300)
    before = content(path)
    with pytest.raises(UserError) as refusal:
        repair(path, device="cpu")
    assert is_refusal(refusal.value, "dataset.json", "--dataset")
    assert content(path) == before
    whole = np.delete(EVERY, 9)
    np.testing.assert_array_equal(TokenStore.open(path).gather(whole), TokenStore.open(orphan).gather(whole))


# The record of a shard.

RECORDS: dict[str, Damage] = {
    "missing": lambda file: file.unlink(),
    "empty": lambda file: replace(file, b""),
    "cut": lambda file: replace(file, file.read_bytes()[:-100]),
    "garbled": lambda file: replace(file, b"\xff\x00 <html>404</html>"),
    "a list": lambda file: replace(file, b"[]"),
    "another object": lambda file: replace(file, b"{}"),
    "a digit of a sum changed": lambda file: edit_json(file, lambda it: it["sum"].__setitem__(3, it["sum"][3] + 1e-9)),
    "a digit of the checksum changed": lambda file: edit_json(file, lambda it: it.update(sha256="0" * 64)),
    "of another shard": lambda file: shutil.copy(file.with_name("000001.json"), file),
    "of another store": lambda file: forge_record(file, lambda it: it.update(identity="0" * 64)),
    "without its sums": lambda file: forge_record(file, lambda it: it.pop("sum")),
}


@pytest.mark.parametrize("damage", RECORDS)
def test_a_lost_record_is_written_again_without_encoding(
    orphan: Path, tmp_path: Path, content: Content, damage: str
) -> None:
    path = Path(shutil.copytree(orphan, tmp_path / "copy.zarr"))
    RECORDS[damage](record_file(path, 2))
    np.testing.assert_array_equal(TokenStore.open(path).gather(EVERY), TokenStore.open(orphan).gather(EVERY))
    found = verify(path)
    assert [(fault.shard, fault.file) for fault in found.faults] == [(2, str(record_file(path, 2)))]
    assert is_refusal(found.faults[0].reason, record_file(path, 2))
    others, shards = other_stamps(path, 2), shard_stamps(path)
    repair(path, device="cpu")
    assert other_stamps(path, 2) == others
    assert shard_stamps(path) == shards
    assert content(path) == content(orphan)
    assert verify(path).sound


@pytest.mark.parametrize("folder_too", [False, True], ids=["files", "folder"])
def test_all_lost_records_are_written_again_without_encoding(
    orphan: Path, tmp_path: Path, content: Content, folder_too: bool
) -> None:
    path = Path(shutil.copytree(orphan, tmp_path / "copy.zarr"))
    for shard in range(SHARDS):
        record_file(path, shard).unlink()
    if folder_too:  # what copies files by their names makes no empty folders
        (path / "tokens" / "commits").rmdir()
    shards = shard_stamps(path)
    assert [fault.shard for fault in verify(path).faults] == [*range(SHARDS)]
    repair(path, device="cpu")
    assert shard_stamps(path) == shards
    assert content(path) == content(orphan)


@pytest.mark.parametrize("dtype", ["int8"])
@pytest.mark.parametrize("damage", RECORDS)
def test_an_int8_shard_without_its_record_is_made_again(
    small: Small, path: Path, content: Content, damage: str
) -> None:
    RECORDS[damage](record_file(path, 2))
    others = other_stamps(path, 2)
    assert [fault.shard for fault in verify(path).faults] == [2]
    repair(path, device="cpu")
    assert other_stamps(path, 2) == others
    assert content(path) == content(small.store)


def test_a_record_is_not_written_again_for_a_shard_that_is_damaged_too(
    small: Small, path: Path, content: Content
) -> None:
    record_file(path, 2).unlink()
    flip(shard_file(path, 2), 300)
    repair(path, device="cpu")
    assert content(path) == content(small.store)


# The description of a store.


def change_digit(file: Path, key: str) -> None:
    """Change one digit of the first number after a key, as text, so that nothing else changes."""
    text = file.read_text()
    start = text.index(f'"{key}"')
    at = next(i for i in range(start + len(key) + 2, len(text)) if text[i].isdigit())
    replace(file, f"{text[:at]}{9 - int(text[at])}{text[at + 1 :]}".encode())


DESCRIPTIONS: dict[str, Damage] = {
    "missing": lambda file: file.unlink(),
    "empty": lambda file: replace(file, b""),
    "cut": lambda file: replace(file, file.read_bytes()[:1000]),
    "cut by a byte": lambda file: replace(file, file.read_bytes().rstrip()[:-1]),
    "garbled": lambda file: replace(file, os.urandom(50)),
    "zeroed": lambda file: replace(file, bytes(file.stat().st_size)),
    "a page": lambda file: replace(file, b"<html>404</html>"),
    "a digit of a mean changed": lambda file: change_digit(file, "mean"),
    "a digit of a std changed": lambda file: change_digit(file, "std"),
    "a digit of the identity changed": lambda file: change_digit(file, "image_size"),
    "a digit of the card changed": lambda file: change_digit(file, "token_dim"),
    "a digit of the format changed": lambda file: change_digit(file, "format_version"),
    "a digit of a column's checksum changed": lambda file: change_digit(file, "state"),
    "attributes lost": lambda file: edit_json(file, lambda it: it.pop("attributes")),
    "attributes a list": lambda file: edit_json(file, lambda it: it.update(attributes=[])),
    "of another format": lambda file: edit_json(file, lambda it: it["attributes"].update(format="other")),
    "node type lost": lambda file: edit_json(file, lambda it: it.pop("node_type")),
    "node type misspelt": lambda file: edit_json(file, lambda it: it.update(node_typf=it.pop("node_type"))),
    "an array": lambda file: edit_json(file, lambda it: it.update(node_type="array")),
    "of another zarr": lambda file: edit_json(file, lambda it: it.update(zarr_format=2)),
}


def check_description(small: Small, path: Path, content: Content, dtype: str, file: Path) -> None:
    """A description that is damaged: refused with the command that fixes it, which encodes nothing."""
    with pytest.raises(UserError) as refusal:
        TokenStore.open(path)
    named = file if file.name == "zarr.json" and file.parent.name != "state" else file.parent
    assert is_refusal(refusal.value, named, AGAIN)
    found = verify(path)
    assert [fault.shard for fault in found.faults] == [None]
    assert not found.sound
    before = work_stamps(path)
    small.extract(path, dtype)
    assert work_stamps(path) == before
    assert content(path) == content(small.store)
    assert verify(path).sound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("damage", DESCRIPTIONS)
def test_a_damaged_zarr_json_is_refused_and_written_anew_by_the_same_extraction(
    small: Small, path: Path, content: Content, dtype: str, damage: str
) -> None:
    file = path / "zarr.json"
    DESCRIPTIONS[damage](file)
    with pytest.raises(UserError, match="wmcache extract"):
        repair(path, device="cpu")
    check_description(small, path, content, dtype, file)


def make_incomplete(path: Path, lost: int) -> None:
    """As a kill leaves it: a shard was not begun, and nothing is declared complete."""
    attributes = read_attributes(path)
    kept = {name: value for name, value in attributes.items() if name not in ("mean", "std")}
    columns = {name: kept["columns"][name] for name in STEP_COLUMNS}
    write_attributes(path, {**kept, "columns": columns, "complete": False})
    record_file(path, lost).unlink()
    shard_file(path, lost).unlink()


def test_a_store_that_is_only_said_to_be_complete_is_refused_and_finished(
    small: Small, path: Path, content: Content
) -> None:
    make_incomplete(path, 3)
    file = path / "zarr.json"
    replace(file, file.read_bytes().replace(b'"complete": false', b'"complete": true'))
    with pytest.raises(UserError) as refusal:
        TokenStore.open(path)
    assert is_refusal(refusal.value, file, AGAIN)
    others = other_stamps(path, 3)
    small.extract(path)
    assert other_stamps(path, 3) == others
    assert content(path) == content(small.store)


def test_a_damaged_description_without_any_record_is_left_alone(small: Small, path: Path, content: Content) -> None:
    # Nothing says any more whose tokens these are, so nothing may be made of them.
    (path / "zarr.json").write_text("{")
    for shard in range(SHARDS):
        record_file(path, shard).unlink()
    before = content(path)
    with pytest.raises(UserError) as refusal:
        small.extract(path)
    assert is_refusal(refusal.value, path, "choose another --out")
    assert content(path) == before
    remove(path)
    small.extract(path)
    assert content(path) == content(small.store)


def inner(metadata: dict[str, Any]) -> dict[str, Any]:
    """The settings of the codec that cuts shards into frames."""
    found: dict[str, Any] = metadata["codecs"][0]["configuration"]
    return found


TRANSPOSE = {"name": "transpose", "configuration": {"order": [0, 2, 1]}}
ZSTD = {"name": "zstd", "configuration": {"level": 0, "checksum": False}}
ARRAYS: dict[str, Callable[[dict[str, Any]], object]] = {
    "fewer frames": lambda it: it["shape"].__setitem__(0, FRAMES - 1),
    "more frames": lambda it: it["shape"].__setitem__(0, FRAMES + 1),
    "other axes": lambda it: it["shape"].reverse(),
    "another type": lambda it: it.update(data_type="int16", fill_value=0),
    "an unknown type": lambda it: it.update(data_type="float17"),
    "another fill value": lambda it: it.update(fill_value=0.0),
    "no fill value": lambda it: it.pop("fill_value"),
    "an unknown codec": lambda it: it["codecs"].append({"name": "rot13"}),
    "no codec": lambda it: it["codecs"].clear(),
    "no checksums": lambda it: inner(it)["codecs"].pop(),
    "the other byte order": lambda it: inner(it)["codecs"][0]["configuration"].update(endian="big"),
    "tokens transposed": lambda it: inner(it)["codecs"].insert(0, TRANSPOSE),
    "tokens compressed": lambda it: inner(it)["codecs"].insert(1, ZSTD),
    "the index in front": lambda it: inner(it).update(index_location="start"),
    "an index without a checksum": lambda it: inner(it)["index_codecs"].pop(),
    "other chunks": lambda it: inner(it)["chunk_shape"].__setitem__(0, 2),
    "other shards": lambda it: it["chunk_grid"]["configuration"]["chunk_shape"].__setitem__(0, 2),
    "other names of shards": lambda it: it["chunk_key_encoding"]["configuration"].update(separator="."),
    "a group": lambda it: (it.clear(), it.update(zarr_format=3, node_type="group", attributes={})),
}


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "garbled", *ARRAYS])
def test_a_damaged_description_of_the_tokens_is_refused_and_written_anew_by_the_same_extraction(
    small: Small, path: Path, content: Content, dtype: str, damage: str
) -> None:
    file = path / "tokens" / "zarr.json"
    if damage in ARRAYS:
        edit_json(file, ARRAYS[damage])
    else:
        DESCRIPTIONS[damage](file)
    check_description(small, path, content, dtype, file)


@pytest.mark.parametrize("damage", ["the other byte order", "tokens transposed"])
def test_another_description_of_the_tokens_never_gives_other_numbers(path: Path, tokens: Tokens, damage: str) -> None:
    edit_json(path / "tokens" / "zarr.json", ARRAYS[damage])
    for address in (path, f"file://{path}"):
        try:
            found = TokenStore.open(address).gather(EVERY)
        except UserError:
            continue
        np.testing.assert_array_equal(found, tokens)


def the_chunk(column: Path) -> Path:
    """The one file that holds a column's values."""
    [file] = [part for part in (column / "c").rglob("*") if part.is_file()]
    return file


COLUMNS: dict[str, Damage] = {
    "missing": lambda column: shutil.rmtree(column),
    "chunk missing": lambda column: the_chunk(column).unlink(),
    "chunk empty": lambda column: replace(the_chunk(column), b""),
    "chunk cut": lambda column: replace(the_chunk(column), the_chunk(column).read_bytes()[:-5]),
    "byte flipped": lambda column: flip(the_chunk(column), the_chunk(column).stat().st_size // 2),
    "zarr.json missing": lambda column: (column / "zarr.json").unlink(),
    "zarr.json garbled": lambda column: replace(column / "zarr.json", b"{"),
    "type edited": lambda column: edit_json(column / "zarr.json", lambda it: it.update(data_type="int16")),
    "length edited": lambda column: edit_json(column / "zarr.json", lambda it: it["shape"].__setitem__(0, 21)),
    "another column": lambda column: (
        shutil.rmtree(column),
        shutil.copytree(column.with_name("step" if column.name == "episode" else "episode"), column),
    ),
}


@pytest.mark.parametrize("damage", COLUMNS)
@pytest.mark.parametrize("column", STEP_COLUMNS)
def test_a_damaged_column_is_refused_and_written_anew_by_the_same_extraction(
    small: Small, path: Path, content: Content, dtype: str, column: str, damage: str
) -> None:
    COLUMNS[damage](path / column)
    check_description(small, path, content, dtype, path / column / "any")


@pytest.mark.parametrize("dtype", ["int8"])
@pytest.mark.parametrize("damage", [damage for damage in COLUMNS if damage != "another column"])
@pytest.mark.parametrize("hint", ["extract", "repair"])
def test_a_damaged_scale_is_refused_and_written_anew(
    small: Small, path: Path, content: Content, tokens: Tokens, dtype: str, damage: str, hint: str
) -> None:
    COLUMNS[damage](path / "scale")
    if hint == "extract":
        check_description(small, path, content, dtype, path / "scale" / "any")
        return
    with pytest.raises(UserError, match="scale"):
        TokenStore.open(path)
    before = work_stamps(path)
    repair(path, device="cpu")
    assert work_stamps(path) == before
    assert content(path) == content(small.store)
    np.testing.assert_array_equal(TokenStore.open(path).gather(EVERY), tokens)


def test_a_damaged_column_and_a_damaged_shard_are_mended_at_once(small: Small, path: Path, content: Content) -> None:
    flip(shard_file(path, 2), 300)
    COLUMNS["byte flipped"](path / "state")
    repair(path, device="cpu")
    assert content(path) == content(small.store)


@pytest.mark.parametrize("dtype", ["int8"])
def test_an_unfinished_int8_store_gives_no_steps_for_tokens(small: Small, path: Path) -> None:
    make_incomplete(path, 3)
    with pytest.raises(UserError, match="complete"):
        TokenStore.open(path, allow_incomplete=True).gather(np.array([0]))


FILES = [
    "zarr.json",
    "tokens/zarr.json",
    "tokens/commits/000002.json",
    *(f"{column}/zarr.json" for column in STEP_COLUMNS),
]


@pytest.mark.parametrize("seed", range(40))
def test_a_flipped_bit_anywhere_in_the_descriptions_gives_the_right_numbers_or_one_line(
    small: Small, path: Path, content: Content, tokens: Tokens, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    file = path / FILES[seed % len(FILES)]
    # The seal holds what is in front of the last 100 bytes of the group's zarr.json, so half of the flips are there.
    size = file.stat().st_size
    first = size - 100 if seed % 2 and file.parent == path else 0
    flip(file, int(rng.integers(first, size)), 1 << int(rng.integers(8)))
    found, refusal = verify(path), ""
    try:
        store = TokenStore.open(path)
        np.testing.assert_array_equal(store.gather(EVERY), tokens)
        np.testing.assert_array_equal(store.state, TokenStore.open(small.store).state)
    except UserError as error:
        refusal = str(error)
    if refusal:
        assert is_refusal(refusal, AGAIN)
        assert not found.sound
        small.extract(path)
        assert content(path) == content(small.store)
    elif not found.sound:
        assert [fault.shard for fault in found.faults] == [2]
        repair(path, device="cpu")
        assert content(path) == content(small.store)


# A frame that a shard does not have.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reader", ["mapped", "zarr", "zarr by its address"])
def test_a_missing_frame_is_an_error_and_never_zeros(
    small: Small, path: Path, content: Content, tokens: Tokens, reader: str
) -> None:
    card = TokenStore.open(path).card
    lose_chunk(shard_file(path, 2), card, 1)
    whole = np.setdiff1d(EVERY, [8, 9, 10, 11] if reader == "mapped" else [9])
    if reader == "zarr":
        some, out = zarr_reader(path), np.empty((FRAMES, *card.frame_shape), card.dtype)
        with pytest.raises(UserError, match="lacks frame 9;"):
            some.gather(EVERY, out)
        with pytest.raises(UserError, match="lacks frame 9;"):
            some.gather(np.array([9, 9]), out[:2])
        some.gather(whole, out[: len(whole)])
        stored = TokenStore.open(small.store).gather_stored(whole)
        np.testing.assert_array_equal(out[: len(whole)], stored)
    else:
        far = as_path("memory://damaged/copy.zarr")
        assert isinstance(far, UPath)
        remove_all(far)
        upload(path, far, last="zarr.json")
        store = TokenStore.open(path if reader == "mapped" else str(far))
        for frames in (EVERY, np.array([9])):
            with pytest.raises(UserError, match="lacks frame 9;"):
                store.gather(frames)
        np.testing.assert_array_equal(store.gather(whole), tokens[whole])
    [fault] = verify(path).faults
    assert (fault.shard, fault.file) == (2, str(shard_file(path, 2)))
    assert "frame 9" in fault.reason
    repair(path, device="cpu")
    assert content(path) == content(small.store)


def test_an_index_that_points_to_another_frame_is_refused(small: Small, path: Path, content: Content) -> None:
    # Two frames in each other's place, each with its own checksum, under an index that agrees with itself.
    card, file = TokenStore.open(path).card, shard_file(path, 2)
    entries = np.frombuffer(file.read_bytes()[-index_bytes(card) : -4], "<u8").reshape(-1, 2)
    rewrite_index(file, card, {0: tuple(entries[1].tolist()), 1: tuple(entries[0].tolist())})
    with pytest.raises(UserError, match=r"wmcache repair"):
        TokenStore.open(path).gather(EVERY)
    check_lost_shard(small, path, content, 2)


# Under an open reader.


def by_another(small: Small, path: Path) -> None:
    fresh = path.with_name("fresh.zarr")
    small.extract(fresh)
    shutil.rmtree(path)
    fresh.rename(path)


def by_repair(small: Small, path: Path) -> None:
    flip(shard_file(path, 2), 300)
    repair(path, device="cpu")


def by_extraction(small: Small, path: Path) -> None:
    shard_file(path, 2).unlink()
    small.extract(path)


@pytest.mark.parametrize(
    "change",
    [
        by_another,
        by_repair,
        by_extraction,
        lambda small, path: remove(path),
        lambda small, path: path.rename(path.with_name("moved.zarr")),
    ],
    ids=["replaced", "repaired", "finished again", "deleted", "moved"],
)
@pytest.mark.parametrize("loaded", [False, True], ids=["mapped", "in memory"])
def test_a_reader_is_told_that_its_store_has_changed(
    small: Small, path: Path, tokens: Tokens, change: Callable[[Small, Path], None], loaded: bool
) -> None:
    store, cold = TokenStore.open(path), TokenStore.open(path)
    if loaded:
        store.load()
    np.testing.assert_array_equal(store.gather(EVERY), tokens)
    change(small, path)
    for reader in (store, cold):
        with pytest.raises(UserError) as refusal:
            reader.gather(EVERY)
        assert is_refusal(refusal.value, path, "replaced or changed")


def test_a_reader_is_not_disturbed_by_what_changes_nothing(small: Small, path: Path, tokens: Tokens) -> None:
    store = TokenStore.open(path)
    small.extract(path)
    repair(path, device="cpu")
    verify(path)
    np.testing.assert_array_equal(store.gather(EVERY), tokens)


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 9000])
def test_a_file_that_is_cut_while_it_is_mapped_is_an_error_and_no_crash(
    store_path: Path, tmp_path: Path, start: Start, size: int
) -> None:
    # In another process, which reading beyond the end of a mapped file would kill.
    path = Path(shutil.copytree(store_path, tmp_path / "copy.zarr"))
    assert shard_file(path, 3).stat().st_size > 3 * 4096
    refusal = start(gather_around_a_cut, path, 3, size).refused()
    assert is_refusal(refusal, shard_file(path, 3), "wmcache repair")


# Copies, and names of all kinds.


@pytest.mark.parametrize("time", [None, 0, 2**31], ids=["new", "zero", "in the future"])
def test_nothing_depends_on_times(small: Small, tmp_path: Path, content: Content, tokens: Tokens, time: int) -> None:
    path = Path(shutil.copytree(small.store, tmp_path / "copy.zarr", copy_function=shutil.copyfile))
    if time is not None:
        for file in (path, *path.rglob("*")):
            os.utime(file, (time, time))
    before = stamps(path)
    np.testing.assert_array_equal(TokenStore.open(path).gather(EVERY), tokens)
    assert verify(path).sound
    assert verify(path).leftovers == []
    small.extract(path)
    assert stamps(path) == before
    flip(shard_file(path, 2), 300)
    repair(path, device="cpu")
    assert content(path) == content(small.store)


NAMES = {
    "unicode": "größe 迷路 é",  # the last letter is two code points
    "spaces": "  my  store ",
    "shell": "$HOME; echo 'x' \"y\" * {a,b} %s {0}",
    "dash": "-rf",
    "long": "x" * 200,
}


@pytest.fixture(scope="module")
def two_episodes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough to train on; read only."""
    path = tmp_path_factory.mktemp("two") / "two"
    collect("UMaze", path, episodes=2, length=25, image_size=16, frames_per_shard=16)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_any_name_does_for_datasets_stores_and_runs(
    two_episodes: Path, tcn_weights: Path, tmp_path: Path, tiny: TrainOptions, content: Content, name: str
) -> None:
    root = tmp_path / NAMES[name]
    dataset = Path(shutil.copytree(two_episodes, root / NAMES[name]))
    weights = Path(shutil.copy(tcn_weights, root / f"{NAMES[name]}.safetensors"))
    path = root / f"{NAMES[name]}.zarr"
    extract(FrameDataset.open(dataset), encoders.create("tcn", weights=weights, device="cpu"), path)
    whole = content(path)
    flip(shard_file(path, 2), 30)
    assert [fault.shard for fault in verify(path).faults] == [2]
    repair(path, device="cpu")
    assert content(path) == whole
    run = root / f"{NAMES[name]} run"
    train(path, run, with_other(tiny, steps=2, checkpoint_every=1, validate_every=2))
    assert last_checkpoint(run).name == "step-00000002"


@pytest.mark.parametrize("name", NAMES)
def test_the_command_in_a_message_can_be_pasted_into_a_shell(
    small: Small, tmp_path: Path, start: Start, content: Content, name: str
) -> None:
    path = Path(shutil.copytree(small.store, tmp_path / f"{NAMES[name]}.zarr"))
    shard_file(path, 2).unlink()
    with pytest.raises(UserError) as refusal:
        TokenStore.open(path)
    words = shlex.split(str(refusal.value).partition("hint it with: ")[2])
    assert words[0] == "wmcache"
    status, output, escaped = start(command, *words[1:], "--device", "cpu").returned()
    assert (status, escaped) == (0, ""), output
    assert content(path) == content(small.store)


# What the encoder gives for one frame only.


@pytest.fixture(scope="module")
def overflowing(smalls: dict[str, Small], tmp_path_factory: pytest.TempPathFactory) -> Small:
    """Black frames and a white one, frame 9; and weights whose first channel overflows float16 for white alone."""
    root, small = tmp_path_factory.mktemp("overflow"), smalls["float16"]
    dataset = Path(shutil.copytree(small.dataset, root / "white"))
    steps, image = FrameDataset.open(dataset).steps, np.zeros((16, 16, 3), np.uint8)
    for shard in range(SHARDS):
        frames = range(shard * PER_SHARD, min(FRAMES, (shard + 1) * PER_SHARD))
        write_shard(dataset, shard, [(steps.key(frame), image + 255 * (frame == 9)) for frame in frames])
        agree(dataset, shard)
    encoder = encoders.create("tcn", weights=small.weights, device="cpu")
    features: list[torch.Tensor] = []
    encoder.backbone.get_submodule("network.head.0").register_forward_hook(
        lambda module, inputs, output: features.append(output)
    )
    encoder(np.stack([image, image + 255]))
    black, white = features[0].double()
    # White's first token, less all that it has in common with black's tokens: black gives nothing in this direction.
    basis = torch.linalg.qr(black.T)[0]
    direction = white[0] - basis @ (basis.T @ white[0])
    weights = load_file(small.weights)
    weights["head.1.weight"][0] = (1e5 * direction / direction.square().sum()).float()
    weights["head.1.bias"][0] = 0
    save_file(weights, root / "overflow.safetensors")
    return Small(dataset, root / "overflow.safetensors", root / "none.zarr")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_frame_whose_tokens_overflow_fails_its_shard_and_no_other(
    overflowing: Small, small: Small, tmp_path: Path, dtype: str, sign: int
) -> None:
    weights = load_file(overflowing.weights)
    weights["head.1.weight"][0] *= sign
    save_file(weights, tmp_path / "overflow.safetensors")
    path, dataset = tmp_path / "some.zarr", FrameDataset.open(overflowing.dataset)
    bad = encoders.create("tcn", weights=tmp_path / "overflow.safetensors", device="cpu")
    with pytest.raises(UserError, match=r"1 of 6 shards failed, the others are done; .*for frame 9;") as refusal:
        extract(dataset, bad, path, dtype=dtype)
    assert is_refusal(refusal.value)
    assert not record_file(path, 2).exists()
    assert not shard_file(path, 2).exists()
    assert StoreWriter.resume(path, bad.identity(dataset.card.fingerprint, dtype)).pending() == [2]
    found = verify(path)
    assert (found.complete, found.shards_done, found.faults) == (False, 5, [])
    with pytest.raises(UserError, match="incomplete"):
        TokenStore.open(path)
    # Better weights are other weights, and so another store.
    good = encoders.create("tcn", weights=small.weights, device="cpu")
    with pytest.raises(UserError, match=r"other settings .*weights_sha256"):
        extract(dataset, good, path, dtype=dtype)
    extract(dataset, good, tmp_path / "other.zarr", dtype=dtype)
    assert verify(tmp_path / "other.zarr").sound


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused_before_a_store_is_made(
    small: Small, tmp_path: Path, value: float
) -> None:
    weights = load_file(small.weights)
    weights["stem.0.weight"][0, 0, 0, 0] = value
    save_file(weights, tmp_path / "bad.safetensors")
    with pytest.raises(UserError) as refusal:
        Small(small.dataset, tmp_path / "bad.safetensors", small.store).extract(tmp_path / "some.zarr")
    assert is_refusal(refusal.value, tmp_path / "bad.safetensors", "not finite")
    assert not (tmp_path / "some.zarr").exists()


# Checkpoints.


@pytest.fixture(scope="module")
def options(tiny: TrainOptions) -> TrainOptions:
    return with_other(tiny, steps=8, checkpoint_every=4)


@pytest.fixture(scope="module")
def trained(store_path: Path, tmp_path_factory: pytest.TempPathFactory, options: TrainOptions) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    train(store_path, run, options)
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run", symlinks=True))


def flip_in_header(file: Path, word: bytes) -> None:
    """Change the first letter of a word in the header of a safetensors file."""
    at = file.read_bytes().index(word)
    assert at < int.from_bytes(file.read_bytes()[:8], "little")
    flip(file, at)


def resume_from(run: Path, store: Path, options: TrainOptions, first: int) -> None:
    """Go on, and see that it went on from the checkpoint of step `first`."""
    before = (run / "metrics.jsonl").read_text().splitlines()
    train(store, run, with_other(options, steps=12), resume=True)
    after = (run / "metrics.jsonl").read_text().splitlines()
    kept = sum(json.loads(line)["step"] <= first for line in before)
    # Steps that are trained again log other times.
    assert after[:kept] == before[:kept]
    assert kept == len(before) or after[kept] != before[kept]
    assert last_checkpoint(run).name == "step-00000012"


CHECKPOINTS: dict[str, Damage] = {
    **{
        f"{name}: {how}": lambda folder, name=name, damage=damage: damage(folder / f"{name}.safetensors")
        for name in ("model", "optimizer")
        for how, damage in {
            "missing": lambda file: file.unlink(),
            "empty": lambda file: replace(file, b""),
            "cut in the header": lambda file: replace(file, file.read_bytes()[:500]),
            "cut in half": lambda file: replace(file, file.read_bytes()[: file.stat().st_size // 2]),
            "cut by a byte": lambda file: replace(file, file.read_bytes()[:-1]),
            "zeroed": lambda file: replace(file, bytes(file.stat().st_size)),
            "header's length flipped": lambda file: flip(file, 1),
            "header's length absurd": lambda file: flip(file, 7, 0x40),
            "a shape flipped": lambda file: flip_in_header(file, b"16]"),
            "a type flipped": lambda file: flip_in_header(file, b"F32"),
            "a name flipped": lambda file: flip_in_header(file, b"blocks.0.mlp.0.bias"),
            "a value flipped": lambda file: flip(file, file.stat().st_size - 6),
        }.items()
    },
    "optimizer: the generator's name flipped": lambda folder: flip_in_header(
        folder / "optimizer.safetensors", b"rng.cpu"
    ),
    **{
        f"state: {text or 'empty'}": lambda folder, text=text: (folder / "state.json").write_text(text)
        for text in ("", "{", "[]", "{}", "\0\0", '{"step": null}', '{"step": "x"}', '{"step": -1}', '{"step": 9}')
    },
    "state: missing": lambda folder: (folder / "state.json").unlink(),
}


@pytest.mark.parametrize("damage", CHECKPOINTS)
def test_a_damaged_checkpoint_is_named_with_a_remedy_that_works(
    run: Path, store_path: Path, options: TrainOptions, damage: str
) -> None:
    newest = last_checkpoint(run)
    CHECKPOINTS[damage](newest)
    with pytest.raises(UserError) as refusal:
        train(store_path, run, with_other(options, steps=12), resume=True)
    file = {"model": "model.safetensors", "optimizer": "optimizer.safetensors", "state": "state.json"}
    assert is_refusal(refusal.value, newest / file[damage.partition(":")[0]], "move its folder")
    shutil.rmtree(newest)
    resume_from(run, store_path, options, 4)


def as_text(last: Path) -> None:
    """As tools that know no links copy one."""
    name = last.readlink()
    last.unlink()
    last.write_text(str(name))


def as_folder(last: Path) -> None:
    """As `cp -L`, and many a synchronising program, copy one."""
    folder = last.resolve()
    last.unlink()
    shutil.copytree(folder, last)


LINKS: dict[str, Damage] = {
    "missing": lambda last: last.unlink(),
    "dangling": lambda last: (last.unlink(), last.symlink_to("step-00000099")),
    "to itself": lambda last: (last.unlink(), last.symlink_to("last")),
    "copied as a text": as_text,
    "copied as a folder": as_folder,
}


@pytest.mark.parametrize("damage", LINKS)
def test_the_newest_checkpoint_is_found_without_its_link(
    run: Path, store_path: Path, options: TrainOptions, damage: str
) -> None:
    LINKS[damage](run / "checkpoints" / "last")
    resume_from(run, store_path, options, 8)
    assert (run / "checkpoints" / "last").is_symlink()


@pytest.mark.parametrize(
    "tail",
    [b"garbage}\n", b'{"step": 9, "lo', b"\xff\xfe}\n", b"[]}\n", b'{"a": 1}\n', bytes(100)],
    ids=["garbled", "torn", "no text", "a list", "without a step", "zeros"],
)
def test_a_damaged_end_of_the_log_does_not_stop_a_run(
    run: Path, store_path: Path, options: TrainOptions, tail: bytes
) -> None:
    log = run / "metrics.jsonl"
    before = log.read_bytes()
    log.write_bytes(before + tail)
    train(store_path, run, with_other(options, steps=12), resume=True)
    lines = log.read_bytes()
    assert lines.startswith(before)
    assert [json.loads(line)["step"] for line in lines.splitlines()][-1] == 12


@pytest.mark.parametrize("name", ["config.json", "identity.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "\0\0"], ids=["empty", "cut", "list", "other", "zeros"])
def test_a_run_with_damaged_settings_is_refused_in_one_line(
    run: Path, store_path: Path, options: TrainOptions, content: Content, name: str, text: str
) -> None:
    (run / name).write_text(text)
    before = content(run / "checkpoints")
    with pytest.raises(UserError) as refusal:
        train(store_path, run, with_other(options, steps=12), resume=True)
    assert is_refusal(refusal.value, run / name)
    assert content(run / "checkpoints") == before
