"""Hostile frame datasets with matching checksums: one line of error, and no code run, file written or absurd memory taken."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import damage_tools as tools
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from damage_tools import is_refusal
from fault_workers import Sample

from wmcache.common.errors import UserError
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.frames import FrameDataset, fingerprint
from wmcache.pipeline.steps import Steps
from wmcache.pipeline.stores import default_store, default_weights

Edit = Callable[[dict[str, Any]], object]
Refused = Callable[..., str]


@pytest.fixture
def copied(small: Sample, tmp_path: Path) -> Path:
    """A copy of the frames, to be changed."""
    return Path(shutil.copytree(small.dataset, tmp_path / "in" / "small"))


# Tars.

TAR = "frames-000001.tar"


def put(copied: Path, entries: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    """Replace a tar by one of these members, and update the checksums of the dataset."""
    tools.write_tar(copied / TAR, entries)
    tools.update_checksums(copied, 1)


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "library": ("x.pyd", {}),
    "pickle of the frame": ("000000-00004.pkl", {}),
    "outside": ("../../escape.png", {}),
    "absolute": ("{root}/escape.png", {}),
    "command": ("pipe:touch {root}/canary", {}),
    "symbolic link": ("000000-00004.png", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
    "pipe": ("000000-00004.png", {"type": tarfile.FIFOTYPE}),
    "line break": ("a\nb.png", {}),
    "no text": ("\udcff.png", {}),
    "long name": ("x" * 100_000, {}),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("where", ["first", "last"])
def test_a_member_that_is_not_a_frame_is_refused(
    copied: Path, tmp_path: Path, refused: Refused, canary: Path, other: str, where: str
) -> None:
    name, header = OTHERS[other]
    whole = [tools.entry(*member) for member in tools.members(copied / TAR)]
    odd = tools.entry(name.format(root=tmp_path), b"" if "type" in header else b"MZ", **header)
    put(copied, [odd, *whole[1:]] if where == "first" else [*whole[:-1], odd])
    assert is_refusal(refused(tools.read_shard, copied, 1), copied / TAR)
    assert not (tmp_path / "escape.png").exists()


@pytest.mark.parametrize("size", [10**10, 10**15])
def test_a_sparse_member_is_refused(copied: Path, refused: Refused, size: int) -> None:
    headers = {"GNU.sparse.size": str(size), "GNU.sparse.map": "0,0", "GNU.sparse.name": "000000-00004.png"}
    put(
        copied,
        [
            tools.entry("000000-00004.png", pax_headers=headers),
            *(tools.entry(*one) for one in tools.members(copied / TAR)[1:]),
        ],
    )
    assert is_refusal(refused(tools.read_shard, copied, 1), TAR)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("size", [2**32, 10**13])
def test_a_header_that_claims_more_than_there_is_is_refused(
    copied: Path, refused: Refused, kind: bytes, size: int
) -> None:
    info, _ = tools.entry("000000-00004.png", type=kind, size=size)
    tools.replace(copied / TAR, info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    tools.update_checksums(copied, 1)
    assert is_refusal(refused(tools.read_shard, copied, 1), TAR)


def test_a_compressed_tar_does_not_unpack_to_more_than_its_frames(copied: Path, refused: Refused) -> None:
    # webdataset unpacks compressed tars; this megabyte unpacks to 256.
    size = 2**28
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=1) as stream:
        stream.write(tools.entry("000000-00004.png", size=size)[0].tobuf())
        for _ in range(size // 2**20):
            stream.write(bytes(2**20))
    tools.replace(copied / TAR, packed.getvalue())
    tools.update_checksums(copied, 1)
    assert is_refusal(refused(tools.read_shard, copied, 1, room=2**27), TAR)


# Images.


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_by_hand(width: int, height: int, data: bytes, depth: int = 8, colour: int = 2, extra: bytes = b"") -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = (png_chunk(b"IHDR", head), extra, png_chunk(b"IDAT", zlib.compress(data)), png_chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


ROWS = bytes(16 * (1 + 3 * 16))
IMAGES: dict[str, Callable[[], bytes]] = {
    "60000 pixels a side": lambda: png_by_hand(60000, 60000, bytes(10)),
    "a row of 16 times 10**9": lambda: png_by_hand(16, 10**9, bytes(10)),
    "fewer rows than its header": lambda: png_by_hand(16, 16, ROWS[:300]),
    "text that unpacks to 256 megabytes": lambda: png_by_hand(
        16, 16, ROWS, extra=png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**28), 1))
    ),
    "RGBA": lambda: tools.image_of("RGBA"),
    "palette": lambda: tools.image_of("P"),
    "a JPEG": lambda: tools.image_of("RGB", kind="JPEG"),
    "a page": lambda: b"<html>404</html>",
    "PostScript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n(touch canary) (w) file\n",
}


@pytest.mark.parametrize("image", IMAGES)
def test_a_frame_that_is_another_image_is_refused(copied: Path, refused: Refused, image: str) -> None:
    whole = tools.members(copied / TAR)
    put(
        copied,
        [tools.entry(*whole[0]), tools.entry(whole[1][0], IMAGES[image]()), *(tools.entry(*one) for one in whole[2:])],
    )
    line = refused(tools.read_shard, copied, 1, room=2**27)
    assert is_refusal(line, TAR, whole[1][0])


# Cards of datasets.


def edit_card(copied: Path, edit: Edit) -> None:

    def both(card: dict[str, Any]) -> None:
        edit(card)
        try:
            card["fingerprint"] = fingerprint(card["steps_sha256"], card["shards"])
        except (KeyError, TypeError):
            return

    tools.edit_json(copied / "dataset.json", both)


ABSURD = {
    "image_size": [10**9, 2**63, 0, -1, 16.0, "16", None, [], True],
    "frames": [10**15, 10**12, 0, -1, 22.0, "22", None, {}],
    "frames_per_shard": [0, -4, 10**11, 4.0, "4", None],
    "episodes": [0, -1, 1.0, "1", None],
    "fps": [0, -20, "20", None],
    "shards": [None, 5, {}, "frames", [None] * tools.SHARDS, [[]] * tools.SHARDS, [{}] * tools.SHARDS, []],
    "maze": [None, 5, "###", [5], [None]],
    "name": [None, 5, [], {}],
    "format_version": [None, "1", [1], 2],
    "steps_sha256": [None, 5, "0" * 64],
    "_target_": ["os.system"],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in ABSURD.items() for value in values])
def test_an_absurd_dataset_card_is_refused(copied: Path, refused: Refused, key: str, value: Any) -> None:
    edit_card(copied, lambda card: card.update({key: value}))
    assert is_refusal(refused(FrameDataset.open, copied), copied)


@pytest.mark.parametrize("name", ["../../escape", "/escape", "a/../../escape", "..", ".", "", "a/b", "a\0b"])
def test_a_datasets_name_does_not_leave_the_home_folder(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder: Encoder, name: str
) -> None:
    # Default paths contain the name of the dataset.
    name, home = f"{tmp_path}{name}" if name.startswith("/") else name, tmp_path / "home"
    monkeypatch.setenv("WMCACHE_HOME", str(home))
    edit_card(copied, lambda card: card.update(name=name))
    try:
        frames = FrameDataset.open(copied)
    except UserError:
        return
    store, weights = default_store(frames.card.name, encoder), default_weights(frames.card.name, "tcn")
    assert Path(os.path.normpath(store)).is_relative_to(home / "stores")
    assert Path(os.path.normpath(weights)).is_relative_to(home / "encoders")


# Step tables.


def column(name: str, values: Any) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.schema.get_field_index(name), name, pa.array(values))


TABLES: dict[str, Callable[[pa.Table], pa.Table]] = {
    "a row fewer": lambda table: table.slice(1),
    "no episodes": column("episode", pa.nulls(tools.FRAMES)),
    "steps beyond 32 bits": column("step", [10**12] * tools.FRAMES),
    "states of all lengths": column("state", [[1.0] * (i % 3) for i in range(tools.FRAMES)]),
    "states of lists of text": column("state", [["x"]] * tools.FRAMES),
    "states of NaN": column("state", [[float("nan")] * 4] * tools.FRAMES),
    "empty actions": column("action", [[]] * tools.FRAMES),
}


@pytest.mark.parametrize("edit", TABLES)
def test_another_step_table_is_refused(copied: Path, refused: Refused, edit: str) -> None:
    file = copied / "steps.parquet"
    pq.write_table(TABLES[edit](pq.read_table(file)), file)
    assert is_refusal(refused(FrameDataset.open, copied), file)


def test_a_step_table_of_nan_is_refused_though_its_checksum_matches(copied: Path, refused: Refused) -> None:
    file = copied / "steps.parquet"
    pq.write_table(TABLES["states of NaN"](pq.read_table(file)), file)
    steps = Steps.from_table(pq.read_table(file), {})
    edit_card(copied, lambda card: card.update(steps_sha256=steps.sha256()))
    assert is_refusal(refused(FrameDataset.open, copied), file)


def test_a_garbled_step_table_is_the_same_table_or_refused(copied: Path) -> None:
    file, steps = copied / "steps.parquet", FrameDataset.open(copied).steps
    whole = file.read_bytes()
    for seed in range(400):
        rng = np.random.default_rng(seed)
        data = bytearray(whole)
        for _ in range(int(rng.choice([1, 1, 2, 8]))):
            first = len(data) - 2300 if rng.random() < 0.7 else 0  # mostly in the footer
            data[int(rng.integers(first, len(data)))] = int(rng.integers(256))
        file.write_bytes(data)
        refusal = None
        try:
            found = FrameDataset.open(copied).steps
            assert found.sha256() == steps.sha256(), f"seed {seed}"
        except UserError as error:
            refusal = error
        assert refusal is None or is_refusal(refusal, file), f"seed {seed}: {refusal}"
