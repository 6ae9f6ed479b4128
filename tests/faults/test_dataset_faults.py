"""Frame shards that are broken: what an extraction does about one of them, and about all the others."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage_tools import EVERY, PER_SHARD, SHARDS, Small, agree, command, is_refusal, make_small, replace
from fault_workers import Child
from PIL import Image

from wmcache.cache import TokenStore
from wmcache.cache.layout import shard_file
from wmcache.cache.records import record_file
from wmcache.cache.verify import verify
from wmcache.common.errors import UserError
from wmcache.pipeline.repair import repair

Content = Callable[[Path], dict[str, bytes]]
Start = Callable[..., Child]
Members = list[tuple[str, bytes]]

BAD = 2
NAME = f"frames-{BAD:06d}.tar"
FIRST = BAD * PER_SHARD


@pytest.fixture(scope="module")
def small(tcn_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Small:
    """Read only."""
    return make_small(tmp_path_factory.mktemp("small"), tcn_weights)


@pytest.fixture
def mine(small: Small, tmp_path: Path) -> Small:
    """The same frames in a place of one's own, to be broken at will, and no store yet."""
    dataset = Path(shutil.copytree(small.dataset, tmp_path / small.dataset.name))
    return Small(dataset, small.weights, tmp_path / "some.zarr")


def in_tar(data: bytes, member: int, part: str) -> int:
    """The place in a tar file where a member's header or data begins."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        found = tar.getmembers()[member]
    return found.offset if part == "header" else found.offset_data


def without_end(data: bytes) -> bytes:
    """The tar without the blocks of zeros behind its last member."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        last = tar.getmembers()[-1]
    return data[: last.offset_data + -(-last.size // 512) * 512]


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


END = bytes(1024)
FILES: dict[str, Callable[[bytes], bytes]] = {
    "cut on a member boundary": lambda data: data[: in_tar(data, 2, "header")],
    "cut on a member boundary, with an end": lambda data: data[: in_tar(data, 2, "header")] + END,
    "cut on a member boundary, with a full end": lambda data: (data[: in_tar(data, 2, "header")] + END).ljust(
        -(-len(data) // 10240) * 10240, b"\0"
    ),
    "cut in the last image": lambda data: data[: in_tar(data, 3, "data") + 40],
    "cut in a header": lambda data: data[: in_tar(data, 2, "header") + 100],
    "cut after a header": lambda data: data[: in_tar(data, 2, "data")],
    "cut in an image": lambda data: data[: in_tar(data, 2, "data") + 40],
    "empty": lambda data: b"",
    "only its end": lambda data: END,
    "a page": lambda data: b"<!DOCTYPE html><html><title>404 Not Found</title></html>\n" * 40,
    "zeros": lambda data: bytes(len(data)),
    "zeros from a member on": lambda data: data[: in_tar(data, 2, "header")].ljust(len(data), b"\0"),
    "a header lost": lambda data: data[: in_tar(data, 1, "header")] + bytes(512) + data[in_tar(data, 1, "data") :],
    "a header flipped": lambda data: flipped(data, in_tar(data, 1, "header") + 100),
    "another tar": lambda data: b"",  # filled in by the test, which knows it
}


def png(mode: str, side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (side, side)).save(buffer, "PNG")
    return buffer.getvalue()


MEMBERS: dict[str, Callable[[Members], Members]] = {
    "a duplicate": lambda members: [members[0], members[0], *members[2:]],
    "a duplicate more": lambda members: [members[0], *members],
    "a member more": lambda members: [*members, ("000000-00012.png", members[0][1])],
    "out of order": lambda members: [members[1], members[0], *members[2:]],
    "backwards": lambda members: members[::-1],
    "a member missing": lambda members: [members[0], *members[2:]],
    "the last member missing": lambda members: members[:-1],
    "no members": lambda members: [],
    "a small image": lambda members: [members[0], (members[1][0], png("RGB", 8)), *members[2:]],
    "a large image": lambda members: [members[0], (members[1][0], png("RGB", 224)), *members[2:]],
    "a grey image": lambda members: [members[0], (members[1][0], png("L", 16)), *members[2:]],
    "an image cut": lambda members: [members[0], (members[1][0], members[1][1][:-30]), *members[2:]],
    "an empty image": lambda members: [members[0], (members[1][0], b""), *members[2:]],
    "a page for an image": lambda members: [members[0], (members[1][0], b"<html>"), *members[2:]],
    "another kind of file": lambda members: [members[0], (members[1][0].replace("png", "txt"), b"x"), *members[2:]],
    "folders in names": lambda members: [(f"./{name}", data) for name, data in members],
}
ONE_FRAME = {
    damage
    for damage in MEMBERS
    if "image" in damage or damage in ("a duplicate", "a duplicate more", "a member missing", "another kind of file")
}


def rewritten(data: bytes, edit: Callable[[Members], Members]) -> bytes:
    """The tar with other members."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, image in edit(members):
            info = tarfile.TarInfo(name)
            info.size = len(image)
            tar.addfile(info, io.BytesIO(image))
    return buffer.getvalue()


def break_tar(dataset: Path, damage: str) -> bytes:
    """Put the damage in place; returns what was there."""
    tar = dataset / NAME
    whole = tar.read_bytes()
    if damage == "another tar":
        replace(tar, tar.with_name("frames-000001.tar").read_bytes())
    else:
        replace(tar, FILES[damage](whole) if damage in FILES else rewritten(whole, MEMBERS[damage]))
    return whole


def check_the_others(mine: Small, small: Small) -> None:
    """One shard is not there, in no way; all others are, and hold what they should."""
    found = verify(mine.store)
    assert (found.complete, found.shards_done, found.faults, found.leftovers) == (False, SHARDS - 1, [], [])
    assert not record_file(mine.store, BAD).exists()
    assert not shard_file(mine.store, BAD).exists()
    with pytest.raises(UserError, match="incomplete"):
        TokenStore.open(mine.store)
    store = TokenStore.open(mine.store, allow_incomplete=True)
    others = EVERY[EVERY // PER_SHARD != BAD]
    np.testing.assert_array_equal(store.gather(others), TokenStore.open(small.store).gather(others))
    with pytest.raises(UserError, match=r"tokens/c\.2\.0\.0"):
        store.gather(EVERY)


def tokens_of(store: Path, content: Content) -> dict[str, Any]:
    """All of a store but where its frames are."""
    files: dict[str, Any] = content(store)
    attributes = json.loads(files.pop("zarr.json"))["attributes"]
    del attributes["checksum"], attributes["card"]["dataset"]["path"]
    return {**files, "attributes": attributes}


@pytest.mark.parametrize("damage", [*FILES, *MEMBERS])
def test_a_broken_tar_fails_its_shard_and_no_other_until_it_is_restored(
    mine: Small, small: Small, content: Content, damage: str
) -> None:
    whole = break_tar(mine.dataset, damage)
    with pytest.raises(UserError) as refusal:
        mine.extract(mine.store)
    assert is_refusal(refusal.value, "1 of 6 shards failed, the others are done", mine.dataset / NAME)
    check_the_others(mine, small)
    replace(mine.dataset / NAME, whole)
    mine.extract(mine.store)
    assert tokens_of(mine.store, content) == tokens_of(small.store, content)
    assert verify(mine.store).sound


@pytest.mark.parametrize("damage", [*FILES, *MEMBERS])
def test_a_broken_tar_that_its_dataset_vouches_for_fails_its_shard_and_names_the_frame(
    mine: Small, small: Small, damage: str
) -> None:
    break_tar(mine.dataset, damage)
    agree(mine.dataset, BAD)
    with pytest.raises(UserError) as refusal:
        mine.extract(mine.store)
    assert is_refusal(refusal.value, "1 of 6 shards failed, the others are done", mine.dataset / NAME)
    if damage in ONE_FRAME:
        frame = 1 if damage == "a duplicate more" else FIRST + 1
        assert f"000000-{frame:05d}" in str(refusal.value) or "frame 1;" in str(refusal.value)
    check_the_others(mine, small)


def test_a_tar_without_its_end_is_refused_unless_its_dataset_vouches_for_it(mine: Small, small: Small) -> None:
    whole = (mine.dataset / NAME).read_bytes()
    replace(mine.dataset / NAME, without_end(whole))
    with pytest.raises(UserError, match=NAME):
        mine.extract(mine.store)
    # Every frame is there and named; blocks of zeros behind them say nothing more.
    agree(mine.dataset, BAD)
    mine.extract(mine.store.with_name("other.zarr"))
    found = TokenStore.open(mine.store.with_name("other.zarr")).gather(EVERY)
    np.testing.assert_array_equal(found, TokenStore.open(small.store).gather(EVERY))


@pytest.mark.parametrize("damage", ["missing", "folder", "dangling link", "link to itself"])
def test_a_tar_that_is_no_file_fails_its_shard_and_no_other(
    mine: Small, small: Small, content: Content, damage: str
) -> None:
    tar = mine.dataset / NAME
    kept = tar.rename(tar.with_name("kept"))
    if damage == "folder":
        tar.mkdir()
    elif damage != "missing":
        tar.symlink_to("nowhere" if damage == "dangling link" else NAME)
    with pytest.raises(UserError) as refusal:
        mine.extract(mine.store)
    assert is_refusal(refusal.value, "1 of 6 shards failed, the others are done", tar)
    check_the_others(mine, small)
    if damage == "folder":
        tar.rmdir()
    else:
        tar.unlink(missing_ok=True)
    tar.symlink_to(kept)  # as a large dataset may be spread over disks
    mine.extract(mine.store)
    assert tokens_of(mine.store, content) == tokens_of(small.store, content)


def test_a_tar_that_stays_broken_fails_alone_the_next_time(mine: Small, content: Content) -> None:
    break_tar(mine.dataset, "cut in an image")
    with pytest.raises(UserError, match=r"1 of 6 shards failed"):
        mine.extract(mine.store)
    done = content(mine.store)
    with pytest.raises(UserError, match=r"1 of 1 shards failed"):
        mine.extract(mine.store)
    assert content(mine.store) == done


def test_every_broken_tar_is_counted_and_the_first_is_named(mine: Small, content: Content) -> None:
    for shard in range(SHARDS):
        os.truncate(mine.dataset / f"frames-{shard:06d}.tar", 1000 * (shard % 2))
    with pytest.raises(UserError, match=r"6 of 6 shards failed, the others are done; the first: .*frames-00000\d\.tar"):
        mine.extract(mine.store)
    assert verify(mine.store).shards_done == 0
    assert not list((mine.store / "tokens" / "commits").iterdir())


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_repair_of_a_store_whose_frames_are_broken_too_mends_what_can_be_mended(
    mine: Small, content: Content, dtype: str
) -> None:
    mine.extract(mine.store, dtype)
    before = content(mine.store)
    whole = break_tar(mine.dataset, "cut in an image")
    for shard in (BAD, 4):
        shard_file(mine.store, shard).write_bytes(b"torn")
    with pytest.raises(UserError) as refusal:
        repair(mine.store, device="cpu")
    assert is_refusal(refusal.value, "1 of 2 shards failed, the others are done", mine.dataset / NAME)
    assert [fault.shard for fault in verify(mine.store).faults] == []
    assert verify(mine.store).shards_done == SHARDS - 1
    replace(mine.dataset / NAME, whole)
    repair(mine.store, device="cpu")
    assert content(mine.store) == before


def test_the_command_ends_with_status_1_and_one_line_then_goes_on(
    mine: Small, small: Small, start: Start, content: Content
) -> None:
    whole = break_tar(mine.dataset, "cut in an image")
    words = ["extract", "--dataset", mine.dataset, "--weights", mine.weights, "--out", mine.store, "--device", "cpu"]
    status, output, escaped = start(command, *map(str, words)).returned()
    assert (status, escaped) == (1, "")
    assert "Traceback" not in output
    last = output.splitlines()[-1]
    assert last.startswith("Error: 1 of 6 shards failed, the others are done; ")
    assert str(mine.dataset / NAME) in last
    for words_of in (["verify", mine.store], ["ls", mine.store.parent]):
        status, output, escaped = start(command, *map(str, words_of)).returned()
        assert (status, escaped) == (words_of[0] == "verify", "")
        assert "5 of 6 shards" in output
    replace(mine.dataset / NAME, whole)
    assert start(command, *map(str, words)).returned()[0] == 0
    assert tokens_of(mine.store, content) == tokens_of(small.store, content)
