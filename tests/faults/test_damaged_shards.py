"""Damaged shards and records: damage is noticed, named and repaired, and everything that is not damaged stays as it is."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace as with_other
from pathlib import Path

import numpy as np
import pytest
from damage_tools import (
    EVERY,
    FRAMES,
    PER_SHARD,
    SHARDS,
    check_repaired,
    flip,
    gather_around_a_cut,
    index_bytes,
    is_refusal,
    lose_chunk,
    replace,
    rewrite_index,
    stamps,
    zarr_reader,
)
from fault_workers import Child, Sample, command, content
from numpy.typing import NDArray
from upath import UPath

from wmcache.cache import TokenStore
from wmcache.cache.catalogue import remove
from wmcache.cache.layout import shard_file
from wmcache.cache.records import record_file
from wmcache.cache.verify import verify
from wmcache.common.errors import UserError
from wmcache.common.paths import as_path, upload
from wmcache.common.paths import remove as remove_all
from wmcache.pipeline.collect import collect
from wmcache.pipeline.repair import repair
from wmcache.trainer.checkpoint import last_checkpoint
from wmcache.trainer.loop import train
from wmcache.trainer.options import TrainOptions

Start = Callable[..., Child]
Damage = Callable[[Path], object]
Tokens = NDArray[np.float16]

DTYPES = ("float16", "int8")


# Bytes of a shard.

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
    "index of a frame that the short shard does not have": lambda stride, size: (5, 2 * stride + 2 * 16 + 3),
}


def check_flip(whole: Path, path: Path, tokens: Tokens, shard: int, offset: int, mask: int) -> None:
    """Flip bits, and follow a user from the first error to the repaired store."""
    card, file = TokenStore.open(path).card, shard_file(path, shard)
    row = offset // (card.frame_bytes + 4)
    frame = card.shard_frames(shard)[row] if row < len(card.shard_frames(shard)) else None
    sound = [number for number in EVERY if number // PER_SHARD != shard or frame not in (None, number)]
    flip(file, offset, mask)
    store, damaged = TokenStore.open(path), file.stat()
    for frames in (EVERY, np.array([frame or shard * PER_SHARD])):
        with pytest.raises(UserError) as refusal:
            store.gather(frames)
        assert is_refusal(refusal.value, file, f"wmcache repair {path}", "" if frame is None else f"frame {frame} ")
    np.testing.assert_array_equal(store.gather(np.array(sound)), tokens[sound])
    with pytest.raises(UserError, match="tokens"):
        zarr_reader(path).gather(EVERY, np.empty((FRAMES, *card.frame_shape), card.dtype))
    assert frame is None or verify(path).faults[0].reason.endswith(f" {frame}")
    check_repaired(path, whole, shard)
    # A new file may get the inode of the deleted one.
    assert (file.stat().st_ino, file.stat().st_mtime_ns) != (damaged.st_ino, damaged.st_mtime_ns)
    np.testing.assert_array_equal(TokenStore.open(path).gather(EVERY), tokens)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", PLACES)
def test_a_flipped_bit_is_named_found_and_repaired(whole: Path, path: Path, tokens: Tokens, place: str) -> None:
    card = TokenStore.open(path).card
    shard, offset = PLACES[place](card.frame_bytes + 4, card.shard_bytes(2))
    check_flip(whole, path, tokens, shard, offset, 1)


@pytest.mark.parametrize(("seed", "dtype"), [(seed, DTYPES[seed % 2]) for seed in range(20)])
def test_flipped_bits_anywhere_are_named_found_and_repaired(whole: Path, path: Path, tokens: Tokens, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shard = int(rng.integers(SHARDS))
    size = shard_file(path, shard).stat().st_size
    check_flip(whole, path, tokens, shard, int(rng.integers(size)), int(rng.integers(1, 256)))


OTHERS: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda data: None,
    "emptied": lambda data: b"",
    "cut to a byte": lambda data: data[:1],
    "cut after a frame": lambda data: data[:260],
    "cut before its index": lambda data: data[: -(16 * PER_SHARD + 4)],
    "cut by a byte": lambda data: data[:-1],
    "cut in the middle, both ends there": lambda data: data[:300] + data[400:],
    "appended to": lambda data: data + b"\0",
    "written twice": lambda data: data + data,
    "zeroed": lambda data: bytes(len(data)),
    "zeroed from the middle on": lambda data: data[:500] + bytes(len(data) - 500),
    "zeroed up to the middle": lambda data: bytes(500) + data[500:],
    "shifted by a byte": lambda data: data[1:] + b"\0",
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_shard_of_other_bytes_is_refused_found_and_repaired(whole: Path, path: Path, other: str) -> None:
    file, opened = shard_file(path, 2), TokenStore.open(path)
    data = OTHERS[other](file.read_bytes())
    if data is None:
        file.unlink()
    else:
        replace(file, data)
    for read in (lambda: TokenStore.open(path).gather(EVERY), lambda: opened.gather(EVERY)):
        with pytest.raises(UserError) as refusal:
            read()
        assert is_refusal(refusal.value, file, f"wmcache repair {path}")
    check_repaired(path, whole, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other", [1, 5])
def test_a_shard_replaced_by_another_is_found_and_made_again(
    whole: Path, path: Path, tokens: Tokens, other: int
) -> None:
    # Every frame matches its own checksum; only the record shows that these are the frames of another shard.
    replace(shard_file(path, 2), shard_file(path, other).read_bytes())
    check_repaired(path, whole, 2)
    np.testing.assert_array_equal(TokenStore.open(path).gather(EVERY), tokens)


def test_an_index_that_swaps_two_frames_is_refused(whole: Path, path: Path) -> None:
    # Each frame matches its own checksum, and the index its own.
    card, file = TokenStore.open(path).card, shard_file(path, 2)
    entries = np.frombuffer(file.read_bytes()[-index_bytes(card) : -4], "<u8").reshape(-1, 2)
    rewrite_index(file, card, {0: tuple(entries[1].tolist()), 1: tuple(entries[0].tolist())})
    with pytest.raises(UserError, match="wmcache repair"):
        TokenStore.open(path).gather(EVERY)
    check_repaired(path, whole, 2)


def break_several(path: Path) -> None:
    flip(shard_file(path, 0), 10)
    flip(shard_file(path, 0), 600)
    shard_file(path, 3).unlink()
    record_file(path, 4).unlink()
    os.truncate(shard_file(path, 5), 99)


def replace_and_forget(path: Path) -> None:
    replace(shard_file(path, 2), shard_file(path, 1).read_bytes())
    record_file(path, 2).unlink()


def flip_and_forget(path: Path) -> None:
    flip(shard_file(path, 2), 300)
    record_file(path, 2).unlink()


def flip_and_spoil_a_column(path: Path) -> None:
    flip(shard_file(path, 2), 300)
    shutil.rmtree(path / "state" / "c")


@pytest.mark.parametrize(
    ("damage", "shards"),
    [
        (break_several, [0, 3, 4, 5]),
        (replace_and_forget, [2]),
        (flip_and_forget, [2]),
        (flip_and_spoil_a_column, [None, 2]),
        (lambda path: [shard_file(path, shard).unlink() for shard in range(SHARDS)], [*range(SHARDS)]),
    ],
    ids=["several shards", "another shard, no record", "a flip, no record", "a flip and a column", "all shards lost"],
)
def test_damage_of_several_kinds_is_repaired_at_once(
    whole: Path, path: Path, damage: Damage, shards: list[int | None]
) -> None:
    damage(path)
    assert {fault.shard for fault in verify(path).faults} <= {*shards}
    repair(path, device="cpu")
    assert content(path) == content(whole)


@pytest.mark.parametrize("missing", [False, True])
def test_the_same_extraction_repairs_what_it_sees_and_repair_the_rest(
    small: Sample, whole: Path, path: Path, missing: bool
) -> None:
    if missing:
        shard_file(path, 2).unlink()
    else:
        flip(shard_file(path, 2), 700)
    small.extract(path)
    assert verify(path).sound == missing
    repair(path, device="cpu")
    assert content(path) == content(whole)


def test_what_cannot_be_made_again_is_not_dropped(orphan: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(orphan, tmp_path / "copy.zarr"))
    flip(shard_file(path, 2), 300)
    before = content(path)
    with pytest.raises(UserError) as refusal:
        repair(path, device="cpu")
    assert is_refusal(refusal.value, "dataset.json", "--dataset")
    assert content(path) == before
    sound = np.delete(EVERY, 9)
    np.testing.assert_array_equal(TokenStore.open(path).gather(sound), TokenStore.open(orphan).gather(sound))


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 9000])
def test_a_file_that_is_cut_while_it_is_mapped_is_an_error_and_no_crash(
    store_path: Path, tmp_path: Path, start: Start, size: int
) -> None:
    # In another process: reading beyond the end of a mapped file would kill it.
    path = Path(shutil.copytree(store_path, tmp_path / "copy.zarr"))
    assert shard_file(path, 3).stat().st_size > 3 * 4096
    refusal = start(gather_around_a_cut, path, 3, size).refused()
    assert is_refusal(refusal, shard_file(path, 3), "wmcache repair")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reader", ["mapped", "zarr", "URL"])
def test_a_missing_frame_is_an_error_and_never_zeros(whole: Path, path: Path, tokens: Tokens, reader: str) -> None:
    card = TokenStore.open(path).card
    lose_chunk(shard_file(path, 2), card, 1)
    sound = np.setdiff1d(EVERY, [8, 9, 10, 11] if reader == "mapped" else [9])
    if reader == "zarr":
        some, out = zarr_reader(path), np.empty((FRAMES, *card.frame_shape), card.dtype)
        for frames in (EVERY, np.array([9, 9])):
            with pytest.raises(UserError, match="frame 9;"):
                some.gather(frames, out[: len(frames)])
        some.gather(sound, out[: len(sound)])
        np.testing.assert_array_equal(out[: len(sound)], TokenStore.open(whole).gather_stored(sound))
    else:
        far = as_path("memory://damaged/copy.zarr")
        assert isinstance(far, UPath)
        remove_all(far)
        upload(path, far, last="zarr.json")
        store = TokenStore.open(path if reader == "mapped" else str(far))
        for frames in (EVERY, np.array([9])):
            with pytest.raises(UserError, match="frame 9;"):
                store.gather(frames)
        np.testing.assert_array_equal(store.gather(sound), tokens[sound])
    assert "frame 9" in verify(path).faults[0].reason
    check_repaired(path, whole, 2)


# Under an open reader.


def by_another(small: Sample, path: Path) -> None:
    fresh = path.with_name("fresh.zarr")
    small.extract(fresh)
    shutil.rmtree(path)
    fresh.rename(path)


def by_repair(small: Sample, path: Path) -> None:
    flip(shard_file(path, 2), 300)
    repair(path, device="cpu")


def by_extraction(small: Sample, path: Path) -> None:
    shard_file(path, 2).unlink()
    small.extract(path)


def by_moving(small: Sample, path: Path) -> None:
    path.rename(path.with_name("moved.zarr"))


@pytest.mark.parametrize("change", [by_another, by_repair, by_extraction, by_moving, lambda _, path: remove(path)])
@pytest.mark.parametrize("loaded", [False, True], ids=["mapped", "in memory"])
def test_a_reader_notices_that_its_store_has_changed(
    small: Sample, path: Path, tokens: Tokens, change: Callable[[Sample, Path], None], loaded: bool
) -> None:
    store, cold = TokenStore.open(path), TokenStore.open(path)
    if loaded:
        store.load()
    np.testing.assert_array_equal(store.gather(EVERY), tokens)
    change(small, path)
    for reader in (store, cold):
        with pytest.raises(UserError) as refusal:
            reader.gather(EVERY)
        assert is_refusal(refusal.value, path)


def test_a_reader_is_not_disturbed_by_commands_that_change_nothing(small: Sample, path: Path, tokens: Tokens) -> None:
    store = TokenStore.open(path)
    small.extract(path)
    repair(path, device="cpu")
    verify(path)
    np.testing.assert_array_equal(store.gather(EVERY), tokens)


# Copies, and names of all kinds.


@pytest.mark.parametrize("time", [None, 0, 2**31], ids=["new", "zero", "in the future"])
def test_nothing_depends_on_times(small: Sample, whole: Path, tmp_path: Path, tokens: Tokens, time: int | None) -> None:
    path = Path(shutil.copytree(whole, tmp_path / "copy.zarr", copy_function=shutil.copyfile))
    if time is not None:
        for file in (path, *path.rglob("*")):
            os.utime(file, (time, time))
    before = stamps(path)
    np.testing.assert_array_equal(TokenStore.open(path).gather(EVERY), tokens)
    assert (verify(path).sound, verify(path).leftovers) == (True, [])
    small.extract(path)
    assert stamps(path) == before
    flip(shard_file(path, 2), 300)
    repair(path, device="cpu")
    assert content(path) == content(whole)


NAMES = {
    "unicode": "größe 迷路 é",  # the last letter is two code points
    "spaces": "  my  store ",
    "shell": "$HOME; echo 'x' \"y\" * {a,b} %s {0}",
    "dash": "-rf",
    "long": "x" * 200,
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_any_name_works_for_datasets_stores_and_runs(
    tcn_weights: Path, tmp_path: Path, tiny: TrainOptions, name: str
) -> None:
    root = tmp_path / name
    collect("UMaze", root / name, episodes=2, length=25, image_size=16, frames_per_shard=16, cluster="local:1")
    path, run = root / f"{name}.zarr", root / f"{name} run"
    Sample(root / name, Path(shutil.copy(tcn_weights, root / f"{name}.safetensors")), {}).extract(path)
    whole = content(path)
    flip(shard_file(path, 2), 30)
    assert [fault.shard for fault in verify(path).faults] == [2]
    repair(path, device="cpu")
    assert content(path) == whole
    train(path, run, with_other(tiny, steps=2, checkpoint_every=1, validate_every=2))
    assert last_checkpoint(run).name == "step-00000002"


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_the_command_in_an_error_can_be_pasted_into_a_shell(
    whole: Path, tmp_path: Path, start: Start, name: str
) -> None:
    path = Path(shutil.copytree(whole, tmp_path / f"{name}.zarr"))
    shard_file(path, 2).unlink()
    with pytest.raises(UserError) as refusal:
        TokenStore.open(path)
    hint = str(refusal.value)
    words = shlex.split(hint[hint.rindex("wmcache repair") :])
    status, output = start(command, *words, "--device", "cpu").returned()
    assert status == 0, output
    assert content(path) == content(whole)
