"""Broken frame shards: an extraction fails the shard that is broken and does all others."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import damage_tools as tools
import numpy as np
import pytest
from damage_tools import is_refusal
from fault_workers import Child, Sample, command, content
from safetensors.torch import load_file, save_file

from wmcache.cache import TokenStore
from wmcache.cache.layout import shard_file
from wmcache.cache.records import record_file
from wmcache.cache.verify import verify
from wmcache.common.errors import UserError
from wmcache.pipeline import encoders
from wmcache.pipeline.frames import FrameDataset, write_shard
from wmcache.pipeline.repair import repair

Start = Callable[..., Child]

BAD = 2
NAME = f"frames-{BAD:06d}.tar"
FIRST = BAD * tools.PER_SHARD


@pytest.fixture
def mine(small: Sample, tmp_path: Path) -> Sample:
    """A copy of the frames to be broken, and the path of a store that does not exist yet."""
    dataset = Path(shutil.copytree(small.dataset, tmp_path / small.dataset.name))
    return Sample(dataset, small.weights, {"float16": tmp_path / "some.zarr"})


def in_tar(data: bytes, member: int, part: str) -> int:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        found = tar.getmembers()[member]
    return found.offset if part == "header" else found.offset_data


def without_end(data: bytes) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        last = tar.getmembers()[-1]
    return data[: last.offset_data + -(-last.size // 512) * 512]


FILES: dict[str, Callable[[bytes], bytes]] = {
    "cut on a member boundary": lambda data: data[: in_tar(data, 2, "header")],
    "cut on a member boundary, with a full end": lambda data: data[: in_tar(data, 2, "header")].ljust(
        -(-len(data) // 10240) * 10240, b"\0"
    ),
    "cut in a header": lambda data: data[: in_tar(data, 2, "header") + 100],
    "cut in an image": lambda data: data[: in_tar(data, 2, "data") + 40],
    "empty": lambda data: b"",
    "a page": lambda data: b"<!DOCTYPE html><html><title>404 Not Found</title></html>\n" * 40,
    "a header lost": lambda data: data[: in_tar(data, 1, "header")] + bytes(512) + data[in_tar(data, 1, "data") :],
}


def second(data: bytes | None = None, suffix: str = "png", cut: int = 0) -> Callable[[tools.Members], tools.Members]:
    """Replace or cut the image of the second member."""

    def edit(members: tools.Members) -> tools.Members:
        name, image = members[1]
        image = image[: len(image) - cut] if data is None else data
        return [members[0], (name.replace("png", suffix), image), *members[2:]]

    return edit


MEMBERS: dict[str, Callable[[tools.Members], tools.Members]] = {
    "a duplicate": lambda members: [members[0], members[0], *members[2:]],
    "a member more": lambda members: [*members, ("000000-00012.png", members[0][1])],
    "out of order": lambda members: [members[1], members[0], *members[2:]],
    "a member missing": lambda members: [members[0], *members[2:]],
    "the last member missing": lambda members: members[:-1],
    "a small image": second(tools.image_of("RGB", 8)),
    "an image cut": second(cut=30),
    "another kind of file": second(b"x", "txt"),
    "folders in names": lambda members: [(f"./{name}", data) for name, data in members],
}
ONE_FRAME = {
    damage
    for damage in MEMBERS
    if "image" in damage or damage in ("a duplicate", "a member missing", "another kind of file")
}


def break_tar(dataset: Path, damage: str) -> bytes:
    tar = dataset / NAME
    whole = tar.read_bytes()
    if damage == "another tar":
        tools.replace(tar, tar.with_name("frames-000001.tar").read_bytes())
    elif damage in FILES:
        tools.replace(tar, FILES[damage](whole))
    else:
        tools.write_tar(tar, [tools.entry(*member) for member in MEMBERS[damage](tools.members(tar))])
    return whole


def check_failed(mine: Sample, small: Sample) -> UserError:
    with pytest.raises(UserError, match="1 of 6 shards") as refusal:
        mine.extract(mine.store)
    assert is_refusal(refusal.value, mine.dataset / NAME)
    found = verify(mine.store)
    assert (found.complete, found.shards_done, found.faults, found.leftovers) == (False, tools.SHARDS - 1, [], [])
    assert not record_file(mine.store, BAD).exists()
    assert not shard_file(mine.store, BAD).exists()
    with pytest.raises(UserError):
        TokenStore.open(mine.store)
    store = TokenStore.open(mine.store, allow_incomplete=True)
    others = tools.EVERY[tools.EVERY // tools.PER_SHARD != BAD]
    np.testing.assert_array_equal(store.gather(others), TokenStore.open(small.store).gather(others))
    with pytest.raises(UserError, match=r"tokens/c\.2\.0\.0"):
        store.gather(tools.EVERY)
    return refusal.value


def portable(store: Path) -> dict[str, Any]:
    files: dict[str, Any] = content(store)
    attributes = json.loads(files.pop("zarr.json"))["attributes"]
    del attributes["checksum"], attributes["card"]["dataset"]["path"]
    return {**files, "attributes": attributes}


def check_continued(mine: Sample, small: Sample) -> None:
    mine.extract(mine.store)
    assert portable(mine.store) == portable(small.store)
    assert verify(mine.store).sound


@pytest.mark.parametrize("damage", [*FILES, *MEMBERS, "another tar"])
@pytest.mark.parametrize("matching", [False, True], ids=["", "matching checksums"])
def test_a_broken_tar_fails_its_shard_and_no_other_until_it_is_restored(
    mine: Sample, small: Sample, damage: str, matching: bool
) -> None:
    whole = break_tar(mine.dataset, damage)
    if matching:
        tools.update_checksums(mine.dataset, BAD)
    refusal = str(check_failed(mine, small))
    if matching and damage in ONE_FRAME:
        assert f"000000-{FIRST + 1:05d}" in refusal or "frame 1;" in refusal
    if not matching:
        tools.replace(mine.dataset / NAME, whole)
        check_continued(mine, small)


def test_a_tar_without_its_end_is_refused_unless_its_checksum_matches(mine: Sample, small: Sample) -> None:
    tools.replace(mine.dataset / NAME, without_end((mine.dataset / NAME).read_bytes()))
    with pytest.raises(UserError, match=NAME):
        mine.extract(mine.store)
    # Every frame is there and named; the zeros after them add nothing.
    tools.update_checksums(mine.dataset, BAD)
    other = mine.store.with_name("other.zarr")
    mine.extract(other)
    np.testing.assert_array_equal(
        TokenStore.open(other).gather(tools.EVERY), TokenStore.open(small.store).gather(tools.EVERY)
    )


@pytest.mark.parametrize("damage", ["missing", "folder", "dangling link", "link to itself"])
def test_a_tar_that_is_not_a_file_fails_its_shard_and_no_other(mine: Sample, small: Sample, damage: str) -> None:
    tar = mine.dataset / NAME
    kept = tar.rename(tar.with_name("kept"))
    if damage == "folder":
        tar.mkdir()
    elif damage != "missing":
        tar.symlink_to("nowhere" if damage == "dangling link" else NAME)
    check_failed(mine, small)
    if damage == "folder":
        tar.rmdir()
    else:
        tar.unlink(missing_ok=True)
    tar.symlink_to(kept)  # a large dataset may be spread over disks
    check_continued(mine, small)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_repair_with_broken_frames_makes_the_other_shards(mine: Sample, dtype: str) -> None:
    mine.extract(mine.store, dtype)
    before = content(mine.store)
    whole = break_tar(mine.dataset, "cut in an image")
    for shard in (BAD, 4):
        shard_file(mine.store, shard).write_bytes(b"torn")
    with pytest.raises(UserError, match="1 of 2 shards") as refusal:
        repair(mine.store, device="cpu")
    assert is_refusal(refusal.value, mine.dataset / NAME)
    assert verify(mine.store).faults == []
    assert verify(mine.store).shards_done == tools.SHARDS - 1
    tools.replace(mine.dataset / NAME, whole)
    repair(mine.store, device="cpu")
    assert content(mine.store) == before


def test_the_command_ends_with_status_1_and_one_line_then_continues(mine: Sample, small: Sample, start: Start) -> None:
    whole = break_tar(mine.dataset, "cut in an image")
    extract = ["wmcache", "extract", *mine.words, "--out", mine.store]
    for failed in ("1 of 6", "1 of 1"):  # the second time only the broken shard is tried
        status, output = start(command, *extract).returned()
        last = output.splitlines()[-1]
        assert status == 1
        assert "Traceback" not in output
        assert last.startswith(f"Error: {failed} shards")
        assert str(mine.dataset / NAME) in last
    for words, expected in ((["verify", mine.store], 1), (["ls", mine.store.parent], 0)):
        status, output = start(command, "wmcache", *words).returned()
        assert status == expected
        assert "5 of 6 shards" in output
    tools.replace(mine.dataset / NAME, whole)
    assert start(command, *extract).returned()[0] == 0
    assert portable(mine.store) == portable(small.store)


# Frames that the encoder cannot encode.


@pytest.fixture(scope="module")
def overflowing(small: Sample, tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """Black frames and a white one, frame 9; and weights whose tokens overflow float16 in one channel for white alone."""
    root = tmp_path_factory.mktemp("overflow")
    dataset = Path(shutil.copytree(small.dataset, root / "white"))
    steps, image = FrameDataset.open(dataset).steps, np.zeros((16, 16, 3), np.uint8)
    for shard in range(tools.SHARDS):
        frames = range(shard * tools.PER_SHARD, min(tools.FRAMES, (shard + 1) * tools.PER_SHARD))
        write_shard(dataset, shard, [(steps.key(frame), image + 255 * (frame == 9)) for frame in frames])
        tools.update_checksums(dataset, shard)
    encoder = encoders.create("tcn", weights=small.weights, device="cpu")
    black, white = encoder(np.stack([image, image + 255])).float().abs().amax(1)
    channel = (white / black).argmax()
    assert white[channel] > 1.5 * black[channel]
    weights = load_file(small.weights)
    for name in ("head.1.weight", "head.1.bias"):
        weights[name][channel] *= 65504 / (white * black).sqrt()[channel]
    save_file(weights, root / "overflow.safetensors")
    return Sample(dataset, root / "overflow.safetensors", {})


@pytest.mark.parametrize(("dtype", "sign"), [("float16", 1), ("int8", -1)])
def test_a_frame_whose_tokens_overflow_fails_its_shard_and_no_other(
    overflowing: Sample, tmp_path: Path, dtype: str, sign: int
) -> None:
    weights, path = load_file(overflowing.weights), tmp_path / "some.zarr"
    for name in ("head.1.weight", "head.1.bias"):
        weights[name] *= sign
    save_file(weights, tmp_path / "overflow.safetensors")
    with pytest.raises(UserError, match=r"1 of 6 shards.* frame 9;") as refusal:
        Sample(overflowing.dataset, tmp_path / "overflow.safetensors", {}).extract(path, dtype)
    assert is_refusal(refusal.value)
    assert not record_file(path, 2).exists()
    assert not shard_file(path, 2).exists()
    found = verify(path)
    assert (found.complete, found.shards_done, found.faults) == (False, 5, [])
    with pytest.raises(UserError):
        TokenStore.open(path)
