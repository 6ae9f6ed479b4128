from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from wmcache.common.errors import UserError
from wmcache.common.files import sha256_of
from wmcache.pipeline.frames import FrameDataset, fingerprint

SHARD = "frames-000001.tar"
Members = list[tuple[str, bytes]]


def edit_card(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    card = json.loads((path / "dataset.json").read_bytes())
    edit(card)
    (path / "dataset.json").write_text(json.dumps(card))


def accept(path: Path) -> None:
    """Record the checksum of the changed tar, to reach the checks behind it."""
    tar = path / SHARD

    def edit(card: dict[str, Any]) -> None:
        card["shards"][1].update(sha256=sha256_of(tar), bytes=tar.stat().st_size)
        card["fingerprint"] = fingerprint(card["steps_sha256"], card["shards"])

    edit_card(path, edit)


def rewrite(path: Path, edit: Callable[[Members], Members]) -> None:
    with tarfile.open(path / SHARD) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(path / SHARD, "w") as tar:
        for name, data in edit(members):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    accept(path)


def png(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of a few bytes that declares 60 000 x 60 000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(10))) + chunk(b"IEND", b"")


def test_frames_are_read_in_any_order(dataset: FrameDataset) -> None:
    everything = np.concatenate([dataset.read_shard(shard) for shard in range(dataset.num_shards)])
    wanted = [359, 0, 64, 63, 0]
    np.testing.assert_array_equal(dataset.read_frames(wanted), everything[wanted])
    assert everything.shape == (360, 32, 32, 3)


def test_every_tar_but_the_last_is_full(dataset: FrameDataset) -> None:
    assert [len(dataset.read_shard(shard)) for shard in range(dataset.num_shards)] == [64] * 5 + [40]
    assert [record["frames"] for record in dataset.card.shards] == [64] * 5 + [40]


# webdataset leaves open tars to the garbage collector.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_shards(dataset_path: Path, dataset: FrameDataset) -> None:
    tars = [str(tar) for tar in sorted(dataset_path.glob("*.tar"))]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8"))
    keys = [f"{episode:06d}-{step:05d}" for episode in range(6) for step in range(60)]
    assert [sample["__key__"] for sample in samples] == keys
    np.testing.assert_array_equal([sample["png"] for sample in samples], dataset.read_frames(range(360)))


def test_pyarrow_reads_the_steps(dataset_path: Path, dataset: FrameDataset) -> None:
    table = pq.read_table(dataset_path / "steps.parquet")
    assert table.schema.names == ["episode", "step", "action", "state"]
    assert table["episode"].to_pylist() == np.repeat(np.arange(6), 60).tolist()
    assert table["step"].to_pylist() == [*range(60)] * 6
    np.testing.assert_array_equal(table["action"].to_pylist(), dataset.steps.action)
    np.testing.assert_array_equal(table["state"].to_pylist(), dataset.steps.state)


def test_a_flipped_byte_and_a_missing_tar_are_named(copied: Path) -> None:
    data = bytearray((copied / SHARD).read_bytes())
    data[len(data) // 2] ^= 1
    (copied / SHARD).write_bytes(data)
    damaged = FrameDataset.open(copied)
    with pytest.raises(UserError, match=SHARD):
        damaged.read_shard(1)
    (copied / SHARD).unlink()
    with pytest.raises(UserError, match=SHARD):
        damaged.read_shard(1)
    assert len(damaged.read_shard(0)) == 64


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(lambda members: members[:-1], id="cut on a member boundary"),
        pytest.param(lambda members: [], id="no member"),
        pytest.param(lambda members: [*members, members[-1]], id="one too many"),
        pytest.param(lambda members: [members[0], *members[:-1]], id="duplicate"),
        pytest.param(lambda members: [members[1], members[0], *members[2:]], id="out of order"),
        pytest.param(lambda members: [("setup.pyd", b"MZ"), *members[1:]], id="foreign member"),
        pytest.param(lambda members: [("../" + members[0][0], members[0][1]), *members[1:]], id="path outside"),
        pytest.param(lambda members: [(members[0][0], members[0][1][:-40]), *members[1:]], id="image cut short"),
        pytest.param(lambda members: [(members[0][0], b"<html>404</html>"), *members[1:]], id="no image"),
        pytest.param(lambda members: [(members[0][0], png(Image.new("RGB", (16, 16)))), *members[1:]], id="small"),
        pytest.param(lambda members: [(members[0][0], png(Image.new("RGBA", (32, 32)))), *members[1:]], id="RGBA"),
        pytest.param(lambda members: [(members[0][0], png(Image.new("L", (32, 32)))), *members[1:]], id="grey"),
        pytest.param(
            lambda members: [(members[0][0], png(Image.new("RGB", (32, 32)), "JPEG")), *members[1:]], id="JPEG"
        ),
        pytest.param(lambda members: [(members[0][0], bomb()), *members[1:]], id="bomb"),
    ],
)
def test_a_tar_with_other_contents_is_named(copied: Path, edit: Callable[[Members], Members]) -> None:
    rewrite(copied, edit)
    with pytest.raises(UserError, match=SHARD):
        FrameDataset.open(copied).read_shard(1)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data[: len(data) // 2 + 100], id="cut inside a member"),
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: b"<html>404</html>" * 100, id="a page instead"),
        pytest.param(lambda data: b"\x00" * 512 + data[512:], id="first header lost"),
        pytest.param(lambda data: data[:100] + b"9" + data[101:], id="bad header checksum"),
    ],
)
def test_a_broken_tar_is_named(copied: Path, damage: Callable[[bytes], bytes]) -> None:
    (copied / SHARD).write_bytes(damage((copied / SHARD).read_bytes()))
    accept(copied)
    with pytest.raises(UserError, match=SHARD):
        FrameDataset.open(copied).read_shard(1)


def test_a_link_in_a_tar_is_not_followed(copied: Path) -> None:
    with tarfile.open(copied / SHARD) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(copied / SHARD, "w") as tar:
        for i, (name, data) in enumerate(members):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if i == 0:
                info.type, info.linkname, info.size = tarfile.SYMTYPE, "/etc/passwd", 0
            tar.addfile(info, io.BytesIO(data))
    accept(copied)
    with pytest.raises(UserError, match=SHARD):
        FrameDataset.open(copied).read_shard(1)


def test_a_missing_dataset_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere/dataset\.json .*wmcache collect"):
        FrameDataset.open(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "{", "[]", '"frames"', "{}", '{"colour": "blue"}'])
def test_a_garbled_card_is_named(copied: Path, text: str) -> None:
    (copied / "dataset.json").write_text(text)
    with pytest.raises(UserError, match=r"dataset\.json"):
        FrameDataset.open(copied)


def test_another_format_version_is_refused(copied: Path) -> None:
    edit_card(copied, lambda card: card.update(format_version=99))
    with pytest.raises(UserError, match=r"99.* 1;"):
        FrameDataset.open(copied)


def _edit_table(edit: Callable[[pa.Table], pa.Table]) -> Callable[[Path], object]:
    return lambda file: pq.write_table(edit(pq.read_table(file)), file)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(_edit_table(lambda table: table.slice(0, len(table) - 1)), id="last row lost"),
        pytest.param(_edit_table(lambda table: table.take(list(range(len(table)))[::-1])), id="reversed"),
        pytest.param(_edit_table(lambda table: table.drop_columns(["state"])), id="column lost"),
        pytest.param(lambda file: file.write_bytes(b""), id="empty"),
        pytest.param(lambda file: file.write_bytes(file.read_bytes()[:100]), id="first 100 bytes"),
        pytest.param(lambda file: file.write_bytes(file.read_bytes()[:-1]), id="last byte lost"),
        pytest.param(lambda file: file.unlink(), id="missing"),
    ],
)
def test_damaged_steps_are_named(copied: Path, damage: Callable[[Path], object]) -> None:
    damage(copied / "steps.parquet")
    with pytest.raises(UserError, match=r"steps\.parquet"):
        FrameDataset.open(copied)
