"""Verification finds every change of a store, names the shard that has to be done again, and changes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from wmcache.cache import TokenStore
from wmcache.cache.layout import shard_file
from wmcache.cache.verify import verify

from ..conftest import contents, flip, make_writer, write

STRIDE = 6 * 4 * 2 + 4


def test_damaged_frames_are_named(finished: Path, tmp_path: Path) -> None:
    int8_path = tmp_path / "int8.zarr"
    write(make_writer(int8_path, dtype="int8"))
    flip(shard_file(finished, 1), STRIDE + 3, 4 * STRIDE, 16 * STRIDE - 1)
    flip(shard_file(int8_path, 3), 5, 28 + 5)
    for path, shard, frames in ((finished, 1, " 17, 20, 31"), (int8_path, 3, " 48, 49")):
        before = contents(path)
        (fault,) = verify(path).faults
        assert fault.shard == shard
        assert fault.reason.endswith(frames)
        assert contents(path) == before


def test_a_folder_in_place_of_a_shard_is_a_fault(finished: Path) -> None:
    shard_file(finished, 1).unlink()
    shard_file(finished, 1).mkdir()
    assert [(fault.shard, fault.file) for fault in verify(finished).faults] == [(1, str(shard_file(finished, 1)))]


def test_a_store_without_tokens_is_damaged(finished: Path) -> None:
    shutil.rmtree(finished / "tokens")
    assert {fault.shard for fault in verify(finished).faults} == {None, 0, 1, 2, 3}


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
