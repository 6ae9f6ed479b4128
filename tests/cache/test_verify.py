"""Verification finds every change of a store, names the shard that has to be done again, and changes nothing."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from wmcache.cache import StoreCard, StoreWriter, TokenStore
from wmcache.cache.layout import read_attributes, shard_file, write_attributes
from wmcache.cache.records import record_file
from wmcache.cache.verify import verify, whole_tokens
from wmcache.common.errors import MissingError, UserError

Tokens = NDArray[np.float16]
MakeWriter = Callable[..., StoreWriter]
Write = Callable[..., None]
Damage = Callable[[Path], object]
STRIDE = 6 * 4 * 2 + 4


def everything(path: Path) -> dict[Path, tuple[int, bytes]]:
    return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in path.rglob("*") if file.is_file()}


def flip(file: Path, *offsets: int) -> None:
    data = bytearray(file.read_bytes())
    for offset in offsets:
        data[offset] ^= 1
    file.write_bytes(data)


@pytest.fixture
def int8_path(tmp_path: Path, make_writer: MakeWriter, write: Write) -> Path:
    write(make_writer(tmp_path / "int8.zarr", dtype="int8"))
    return tmp_path / "int8.zarr"


def test_a_sound_store(finished: Path, int8_path: Path) -> None:
    for path in (finished, int8_path):
        before = everything(path)
        found = verify(path)
        assert found.sound
        assert (found.path, found.complete, found.shards, found.shards_done) == (str(path), True, 4, 4)
        assert (found.frames, found.faults, found.leftovers, found.drift) == (50, [], [], None)
        assert everything(path) == before


def _exchange_frames(path: Path) -> None:
    data = shard_file(path, 1).read_bytes()
    shard_file(path, 1).write_bytes(data[STRIDE : 2 * STRIDE] + data[:STRIDE] + data[2 * STRIDE :])


def _a_folder(path: Path) -> None:
    shard_file(path, 1).unlink()
    shard_file(path, 1).mkdir()


SHARDS: dict[str, tuple[Damage, str]] = {
    "exchanged frames": (_exchange_frames, ""),
    "longer": (lambda path: shard_file(path, 1).write_bytes(bytes(1093)), "1093.*1092"),
    "flipped bits": (lambda path: flip(shard_file(path, 1), STRIDE + 3, 4 * STRIDE, 16 * STRIDE - 1), "17, 20, 31"),
    "a flipped bit in the index": (lambda path: flip(shard_file(path, 1), -9), ""),
    "a folder": (_a_folder, ""),
}
"""Damage, and the numbers in the reason: sizes, or frames."""


@pytest.mark.parametrize("damage", SHARDS)
def test_a_damaged_shard_is_one_fault_and_stays_as_it_is(finished: Path, damage: str) -> None:
    change, numbers = SHARDS[damage]
    change(finished)
    before = everything(finished)
    found = verify(finished)
    assert everything(finished) == before
    assert (found.sound, found.complete, found.shards, found.shards_done) == (False, True, 4, 3)
    (fault,) = found.faults
    assert (fault.shard, fault.file) == (1, str(shard_file(finished, 1)))
    assert "\n" not in fault.reason
    assert re.search(numbers, fault.reason), fault.reason


def test_damaged_frames_of_an_int8_store_are_named(int8_path: Path) -> None:
    flip(shard_file(int8_path, 3), 5, 28 + 5)
    (fault,) = verify(int8_path).faults
    assert fault.shard == 3
    assert fault.reason.endswith(" 48, 49")


def test_all_faults_are_found(finished: Path) -> None:
    record_file(finished, 1).unlink()
    flip(shard_file(finished, 0), 0)
    shard_file(finished, 3).unlink()
    (finished / "step" / "zarr.json").unlink()
    found = verify(finished)
    assert [fault.shard for fault in found.faults] == [None, 0, 1, 3]
    assert found.shards_done == 1


def test_a_store_without_tokens_is_damaged(finished: Path) -> None:
    shutil.rmtree(finished / "tokens")
    assert {fault.shard for fault in verify(finished).faults} == {None, 0, 1, 2, 3}


def test_missing_shards_of_an_incomplete_store_are_not_faults(
    tmp_path: Path, make_writer: MakeWriter, write: Write
) -> None:
    writer = make_writer(tmp_path / "some.zarr")
    found = verify(writer.path)
    assert (found.complete, found.sound, found.shards, found.shards_done, found.faults) == (False, False, 4, 0, [])
    write(writer, [2])
    found = verify(writer.path)
    assert (found.complete, found.sound, found.shards_done, found.faults) == (False, False, 1, [])
    flip(shard_file(writer.path, 2), 3)
    assert [fault.shard for fault in verify(writer.path).faults] == [2]


def test_a_store_that_is_not_declared_complete_is_not_sound(finished: Path) -> None:
    write_attributes(finished, {**read_attributes(finished), "complete": False})
    found = verify(finished)
    assert (found.shards_done, found.faults, found.complete, found.sound) == (4, [], False, False)


def test_a_missing_store_and_another_group_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"none\.zarr"):
        verify(tmp_path / "none.zarr")
    zarr.create_group(tmp_path / "other.zarr")
    with pytest.raises(UserError, match=r"other\.zarr"):
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
def test_other_files_are_named_and_harmless(finished: Path, name: str) -> None:
    (finished / name).write_bytes(b"left over")
    found = verify(finished)
    assert found.sound
    assert found.leftovers == [str(finished / name)]
    assert TokenStore.open(finished).gather(np.arange(50)).shape == (50, 6, 4)


def test_whole_tokens_need_a_whole_shard_and_no_record(finished: Path, card: StoreCard, tokens: Tokens) -> None:
    record_file(finished, 1).unlink()
    np.testing.assert_array_equal(whole_tokens(finished, 1, card), tokens[16:32])
    for shard, offset in ((0, STRIDE + 3), (1, -9)):
        flip(shard_file(finished, shard), offset)
        assert whole_tokens(finished, shard, card) is None
    shard_file(finished, 2).unlink()
    assert whole_tokens(finished, 2, card) is None


def test_tokens_of_int8_and_tokens_that_are_not_finite_are_not_whole(
    finished: Path, int8_path: Path, card: StoreCard
) -> None:
    zarr.open_group(finished, mode="r+")["tokens"][20, 0, 0] = np.nan  # type: ignore[index]
    assert whole_tokens(finished, 1, card) is None
    assert whole_tokens(finished, 0, card) is not None
    assert whole_tokens(int8_path, 1, TokenStore.open(int8_path).card) is None
