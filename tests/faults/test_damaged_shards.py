"""Damaged shards: damage is noticed, named and repaired, and everything that is not damaged stays as it is."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace as with_other
from pathlib import Path

import damage_tools as tools
import numpy as np
import pytest
import zarr
from damage_tools import is_refusal
from fault_workers import Child, Sample, command, content
from upath import UPath

from wmcache.cache import TokenStore
from wmcache.cache.catalogue import remove
from wmcache.cache.reader import ZarrReader
from wmcache.cache.verify import verify
from wmcache.common.errors import UserError
from wmcache.common.paths import as_path, upload
from wmcache.common.paths import remove as remove_all
from wmcache.engine.checkpoint import last_checkpoint
from wmcache.pipeline.collect import collect
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.train import train

Start = Callable[..., Child]

BOTH = pytest.mark.parametrize("dtype", ["float16", "int8"])

# (stride of a frame, size of a shard) -> (shard, offset)
POSITIONS: dict[str, Callable[[int, int], tuple[int, int]]] = {
    "first byte of a shard": lambda stride, size: (2, 0),
    "last byte of a frame's tokens": lambda stride, size: (2, 2 * stride - 5),
    "last byte of a frame's checksum": lambda stride, size: (2, 2 * stride - 1),
    "a length in the index": lambda stride, size: (2, tools.PER_SHARD * stride + 16 + 8),
    "last byte of a shard": lambda stride, size: (2, size - 1),
    "last frame of the short shard": lambda stride, size: (5, stride),
    "index of a frame that the short shard does not have": lambda stride, size: (5, 2 * stride + 2 * 16 + 3),
    **{
        f"at random, seed {seed}": lambda stride, size, seed=seed: (2, int(np.random.default_rng(seed).integers(size)))
        for seed in range(10)
    },
}


@BOTH
@pytest.mark.parametrize("position", POSITIONS)
def test_a_flipped_bit_is_named_found_and_repaired(copy: tools.Copy, position: str) -> None:
    tokens, card = copy.tokens, TokenStore.open(copy.path).card
    shard, offset = POSITIONS[position](card.frame_bytes + 4, card.shard_bytes(2))
    row, file = offset // (card.frame_bytes + 4), copy.shard(shard)
    frame = card.shard_frames(shard)[row] if row < len(card.shard_frames(shard)) else None
    tools.flip(file, offset)
    store, damaged = TokenStore.open(copy.path), file.stat()
    for frames in (tools.EVERY, np.array([frame or shard * tools.PER_SHARD])):
        with pytest.raises(UserError) as refusal:
            store.gather(frames)
        assert is_refusal(
            refusal.value, file, f"wmcache repair {copy.path}", "" if frame is None else f"frame {frame} "
        )
    sound = [number for number in tools.EVERY if number // tools.PER_SHARD != shard or frame not in (None, number)]
    np.testing.assert_array_equal(store.gather(np.array(sound)), tokens[sound])
    remote = ZarrReader(zarr.open_group(copy.path, mode="r")["tokens"], card, copy.path)
    with pytest.raises(UserError, match="tokens"):
        remote.gather(tools.EVERY, np.empty((tools.FRAMES, *card.frame_shape), card.dtype))
    assert frame is None or verify(copy.path).faults[0].reason.endswith(f" {frame}")
    copy.check_repair(shard)
    # A new file may get the inode of the deleted one.
    assert (file.stat().st_ino, file.stat().st_mtime_ns) != (damaged.st_ino, damaged.st_mtime_ns)
    np.testing.assert_array_equal(TokenStore.open(copy.path).gather(tools.EVERY), tokens)


OTHERS: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda data: None,
    "emptied": lambda data: b"",
    "cut before its index": lambda data: data[: -(16 * tools.PER_SHARD + 4)],
    "appended to": lambda data: data + b"\0",
    "zeroed": lambda data: bytes(len(data)),
    "zeroed from the middle on": lambda data: data[:500] + bytes(len(data) - 500),
    "shifted by a byte": lambda data: data[1:] + b"\0",
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_shard_of_other_bytes_is_refused_found_and_repaired(copy: tools.Copy, other: str) -> None:
    file, opened = copy.shard(2), TokenStore.open(copy.path)
    data = OTHERS[other](file.read_bytes())
    file.unlink()
    if data is not None:
        file.write_bytes(data)
    for read in (lambda: TokenStore.open(copy.path).gather(tools.EVERY), lambda: opened.gather(tools.EVERY)):
        with pytest.raises(UserError) as refusal:
            read()
        assert is_refusal(refusal.value, file, f"wmcache repair {copy.path}")
    copy.check_repair(2)


@BOTH
@pytest.mark.parametrize("other", [1, 5])
def test_a_shard_replaced_by_another_is_found_and_made_again(copy: tools.Copy, other: int) -> None:
    # Every frame matches its own checksum; only the record shows that these are the frames of another shard.
    tools.replace(copy.shard(2), copy.shard(other).read_bytes())
    copy.check_repair(2)


def test_an_index_that_swaps_two_frames_is_refused(copy: tools.Copy) -> None:
    # Each frame matches its own checksum, and the index its own.
    card, file = TokenStore.open(copy.path).card, copy.shard(2)
    entries = np.frombuffer(file.read_bytes()[-tools.index_bytes(card) : -4], "<u8").reshape(-1, 2)
    tools.rewrite_index(file, card, {0: tuple(entries[1].tolist()), 1: tuple(entries[0].tolist())})
    with pytest.raises(UserError, match="wmcache repair"):
        TokenStore.open(copy.path).gather(tools.EVERY)
    copy.check_repair(2)


@BOTH
def test_damage_of_several_kinds_is_repaired_at_once(copy: tools.Copy, dtype: str) -> None:
    tools.flip(copy.shard(0), 10)
    tools.flip(copy.shard(0), 500)
    shutil.rmtree(copy.path / ("scale" if dtype == "int8" else "state") / "c")
    tools.replace(copy.shard(2), copy.shard(1).read_bytes())
    copy.record(2).unlink()
    copy.shard(3).unlink()
    copy.record(4).unlink()
    os.truncate(copy.shard(5), 99)
    assert {fault.shard for fault in verify(copy.path).faults} == {None, 0, 2, 3, 4, 5}
    copy.repair()
    assert copy.restored


def test_what_cannot_be_made_again_is_not_dropped(orphan: tools.Copy) -> None:
    tools.flip(orphan.shard(2), 300)
    before, sound = content(orphan.path), np.delete(tools.EVERY, 9)
    with pytest.raises(UserError) as refusal:
        orphan.repair()
    assert is_refusal(refusal.value, "dataset.json", "--dataset")
    assert content(orphan.path) == before
    np.testing.assert_array_equal(TokenStore.open(orphan.path).gather(sound), orphan.tokens[sound])


@pytest.mark.parametrize("size", [0, 4095, 9000])
def test_a_file_that_is_cut_while_it_is_mapped_is_an_error_and_no_crash(
    store_path: Path, tmp_path: Path, start: Start, size: int
) -> None:
    # In another process: reading beyond the end of a mapped file would kill it.
    path = Path(shutil.copytree(store_path, tmp_path / "copy.zarr"))
    file = path / "tokens" / "c.3.0.0"
    assert file.stat().st_size > 3 * 4096
    assert is_refusal(start(tools.gather_around_a_cut, path, file, size).refused(), file, "wmcache repair")


@BOTH
@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "URL"])
def test_a_missing_frame_is_an_error_and_never_zeros(copy: tools.Copy, mapped: bool) -> None:
    tokens, card = copy.tokens, TokenStore.open(copy.path).card
    tools.lose_chunk(copy.shard(2), card, 1)
    sound = np.setdiff1d(tools.EVERY, [8, 9, 10, 11] if mapped else [9])
    far = as_path("memory://damaged/copy.zarr")
    assert isinstance(far, UPath)
    remove_all(far)
    upload(copy.path, far, last="zarr.json")
    store = TokenStore.open(copy.path if mapped else far)
    for frames in (tools.EVERY, np.array([9, 9])):
        with pytest.raises(UserError, match="frame 9;"):
            store.gather(frames)
    np.testing.assert_array_equal(store.gather(sound), tokens[sound])
    assert "frame 9" in verify(copy.path).faults[0].reason
    copy.check_repair(2)


# Under an open reader.


def by_another(copy: tools.Copy) -> None:
    fresh = copy.path.with_name("fresh.zarr")
    copy.sample.extract(fresh)
    shutil.rmtree(copy.path)
    fresh.rename(copy.path)


def by_repair(copy: tools.Copy) -> None:
    tools.flip(copy.shard(2), 300)
    copy.repair()


def by_moving(copy: tools.Copy) -> None:
    copy.path.rename(copy.path.with_name("moved.zarr"))


@pytest.mark.parametrize("change", [by_another, by_repair, by_moving, lambda copy: remove(copy.path)])
@pytest.mark.parametrize("loaded", [False, True], ids=["mapped", "in memory"])
def test_a_reader_notices_that_its_store_has_changed(
    copy: tools.Copy, change: Callable[[tools.Copy], None], loaded: bool
) -> None:
    store, cold = TokenStore.open(copy.path), TokenStore.open(copy.path)
    if loaded:
        store.load()
    np.testing.assert_array_equal(store.gather(tools.EVERY), copy.tokens)
    change(copy)
    for reader in (store, cold):
        reader.prefetch(tools.EVERY)
        with pytest.raises(UserError) as refusal:
            reader.gather(tools.EVERY)
        assert is_refusal(refusal.value, copy.path)


def test_a_reader_is_not_disturbed_by_commands_that_change_nothing(copy: tools.Copy) -> None:
    store = TokenStore.open(copy.path)
    copy.extract()
    copy.repair()
    verify(copy.path)
    np.testing.assert_array_equal(store.gather(tools.EVERY), copy.tokens)


# Copies, and names of all kinds.


@pytest.mark.parametrize("time", [None, 0, 2**31], ids=["new", "zero", "in the future"])
def test_nothing_depends_on_times(copy: tools.Copy, time: int | None) -> None:
    for file in (copy.path, *copy.path.rglob("*")):
        os.utime(file, None if time is None else (time, time))
    before = tools.stamps(copy.path)
    np.testing.assert_array_equal(TokenStore.open(copy.path).gather(tools.EVERY), copy.tokens)
    assert (verify(copy.path).sound, verify(copy.path).leftovers) == (True, [])
    copy.extract()
    assert tools.stamps(copy.path) == before
    tools.flip(copy.shard(2), 300)
    copy.check_repair(2)


NAMES = {
    "unicode": "größe 迷路 é",  # the last letter is two code points
    "spaces": "  my  store ",
    "shell": "$HOME; echo 'x' \"y\" * {a,b} %s {0}",
    "dash": "-rf",
    "long": "x" * 200,
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_any_name_works_for_datasets_stores_and_runs(
    tcn_weights: Path, tmp_path: Path, tiny: TrainOptions, start: Start, name: str
) -> None:
    dataset, path, run = (tmp_path / name / f"{name}{suffix}" for suffix in ("", ".zarr", " run"))
    collect("UMaze", dataset, episodes=2, length=25, image_size=16, frames_per_shard=16, cluster="local:1")
    Sample(dataset, Path(shutil.copy(tcn_weights, tmp_path / name / f"{name}.safetensors")), {}).extract(path)
    train(path, run, with_other(tiny, steps=2, checkpoint_every=1, validate_every=2))
    assert last_checkpoint(run).name == "step-00000002"
    whole = content(path)
    (path / "tokens" / "c.2.0.0").unlink()
    assert [fault.shard for fault in verify(path).faults] == [2]
    # The command in the error can be pasted into a shell.
    with pytest.raises(UserError) as refusal:
        TokenStore.open(path)
    hint = str(refusal.value)
    status, output = start(command, *shlex.split(hint[hint.rindex("wmcache repair") :]), "--device", "cpu").returned()
    assert status == 0, output
    assert content(path) == whole
