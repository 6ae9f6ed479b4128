"""Inputs made by an enemy, every checksum agreeing: one line, at once, and no code run, nothing written elsewhere, no absurd memory."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from damage_tools import (
    FRAMES,
    PER_SHARD,
    SHARDS,
    Small,
    Warden,
    agree,
    command,
    create_encoder,
    edit_json,
    flip,
    forge,
    forge_record,
    index_bytes,
    is_refusal,
    load_model_on_cpu,
    make_small,
    open_and_gather,
    peak,
    read_shard,
    replace,
    resume_run,
    rewrite_index,
    vouch,
    vouch_for,
)
from fault_workers import Child
from PIL import Image

from wmcache.cache import TokenStore
from wmcache.cache.catalogue import list_stores
from wmcache.cache.layout import shard_file
from wmcache.cache.records import record_file
from wmcache.cache.verify import verify
from wmcache.common.errors import UserError
from wmcache.common.files import sha256_of
from wmcache.engine.checkpoint import last_checkpoint
from wmcache.engine.log import truncate_metrics
from wmcache.pipeline.fit import default_weights
from wmcache.pipeline.frames import FrameDataset, Steps, fingerprint
from wmcache.pipeline.repair import repair
from wmcache.pipeline.stores import default_store
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.train import train

Start = Callable[..., Child]
Edit = Callable[[dict[str, Any]], object]
Outcome = Callable[..., tuple[str, str]]
Refused = Callable[..., str]

ROOM = 1_000_000_000
"""Bytes that an input of a few kilobytes may take, and still have them to spare."""
AT_ONCE = 10.0
"""Seconds in which a machine with other things to do still says no."""


@pytest.fixture(scope="module")
def small(tcn_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Small:
    """Read only."""
    return make_small(tmp_path_factory.mktemp("small"), tcn_weights)


@pytest.fixture
def copied(small: Small, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small.dataset, tmp_path / "in" / "small"))


@pytest.fixture
def store(small: Small, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small.store, tmp_path / "in" / "small.zarr"))


@pytest.fixture(scope="module")
def trained(store_path: Path, tmp_path_factory: pytest.TempPathFactory, tiny: TrainOptions) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    train(store_path, run, tiny)
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "in" / "run", symlinks=True))


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """What hostile code would make; it must not be there in the end."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


@pytest.fixture(scope="module")
def warden(processes: ForkServerContext, small: Small) -> Iterator[Warden]:
    warden = Warden(processes)
    # What its libraries reserve for themselves at the first call is no matter of ours.
    for function in (read_shard, open_and_gather):
        place = (small.dataset, 1) if function is read_shard else (small.store,)
        assert warden.ask(10 * ROOM, AT_ONCE, function, *place) == ("returned", "")
    yield warden
    warden.close()


@pytest.fixture
def outcome(warden: Warden, tmp_path: Path) -> Outcome:
    """(function, *arguments) -> what becomes of the call; within bounded memory, at once, and with no new file."""

    def call(function: Callable[..., Any], *arguments: Any, room: int = ROOM) -> tuple[str, str]:
        before = sorted(tmp_path.rglob("*"))
        kind, line = warden.ask(room, AT_ONCE, function, *arguments)
        assert kind in ("returned", "refused"), f"{kind}: {line}"
        assert sorted(tmp_path.rglob("*")) == before
        assert kind == "returned" or is_refusal(line), line
        return kind, line

    return call


@pytest.fixture
def refused(outcome: Outcome) -> Refused:
    """(function, *arguments) -> the one line that the call is refused with."""

    def call(function: Callable[..., Any], *arguments: Any, room: int = ROOM) -> str:
        kind, line = outcome(function, *arguments, room=room)
        assert kind == "refused"
        return line

    return call


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.canary),)


def test_the_canary_would_sing(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Evil(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


# Tars.


def members(copied: Path, shard: int = 1) -> list[tuple[str, bytes]]:
    with tarfile.open(copied / f"frames-{shard:06d}.tar") as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]


def entry(name: str, data: bytes = b"", **header: Any) -> tuple[tarfile.TarInfo, bytes]:
    """A member with its header as one likes."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in header.items():
        setattr(info, key, value)
    return info, data


def write_tar(copied: Path, entries: list[tuple[tarfile.TarInfo, bytes]], shard: int = 1) -> None:
    """A tar of these members in the place of another, with a dataset that agrees."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, data in entries:
            tar.addfile(info, io.BytesIO(data))
    replace(copied / f"frames-{shard:06d}.tar", buffer.getvalue())
    agree(copied, shard)


STRANGERS: dict[str, tuple[str, dict[str, Any]]] = {
    "library": ("x.pyd", {}),
    "pickle": ("x.pkl", {}),
    "torch": ("x.pth", {}),
    "pickle of the frame": ("000000-00004.pkl", {}),
    "outside": ("../../escape.png", {}),
    "absolute": ("{root}/escape.png", {}),
    "command": ("pipe:touch {root}/canary", {}),
    "symbolic link": ("000000-00004.png", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
    "hard link": ("000000-00004.png", {"type": tarfile.LNKTYPE, "linkname": "/etc/passwd"}),
    "device": ("000000-00004.png", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5}),
    "pipe": ("000000-00004.png", {"type": tarfile.FIFOTYPE}),
    "folder": ("000000-00004.png", {"type": tarfile.DIRTYPE}),
    "line break": ("a\nb.png", {}),
    "no text": ("\udcff.png", {}),
    "no name": ("", {}),
    "long name": ("x" * 100_000, {}),
}


@pytest.mark.parametrize("stranger", STRANGERS)
@pytest.mark.parametrize("place", ["first", "last"])
def test_a_stranger_in_the_place_of_a_frame_is_refused(
    copied: Path, tmp_path: Path, refused: Refused, canary: Path, stranger: str, place: str
) -> None:
    name, header = STRANGERS[stranger]
    whole = [entry(*member) for member in members(copied)]
    odd = entry(name.format(root=tmp_path), b"" if "type" in header else b"MZ", **header)
    write_tar(copied, [odd, *whole[1:]] if place == "first" else [*whole[:-1], odd])
    line = refused(read_shard, copied, 1)
    assert is_refusal(line, copied / "frames-000001.tar")
    assert not (tmp_path / "escape.png").exists()


def sparse(size: int, version: str) -> tuple[tarfile.TarInfo, bytes]:
    """A member of a few bytes that says that it is a file of `size` bytes, most of them holes."""
    name = "000000-00004.png"
    if version == "0.1":
        headers = {"GNU.sparse.size": str(size), "GNU.sparse.map": "0,0", "GNU.sparse.name": name}
        return entry(name, pax_headers=headers)
    headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(size)}
    return entry(name, b"1\n0\n0\n".ljust(512, b"\0"), pax_headers={**headers, "GNU.sparse.name": name})


@pytest.mark.parametrize("size", [10**10, 10**15])
@pytest.mark.parametrize("version", ["0.1", "1.0"])
def test_a_member_of_holes_is_refused(copied: Path, refused: Refused, size: int, version: str) -> None:
    write_tar(copied, [sparse(size, version), *(entry(*member) for member in members(copied)[1:])])
    assert is_refusal(refused(read_shard, copied, 1), "frames-000001.tar")


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("size", [2**32, 10**13])
def test_a_header_that_claims_more_than_there_is_is_refused(
    copied: Path, refused: Refused, kind: bytes, size: int
) -> None:
    info, _ = entry("000000-00004.png", type=kind, size=size)
    replace(copied / "frames-000001.tar", info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    agree(copied, 1)
    assert is_refusal(refused(read_shard, copied, 1), "frames-000001.tar")


def test_a_compressed_tar_does_not_unpack_to_more_than_its_frames(copied: Path, start: Start) -> None:
    # webdataset unpacks what it finds compressed; this is a megabyte that unpacks to 256.
    size = 2**28
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=1) as stream:
        stream.write(entry("000000-00004.png", size=size)[0].tobuf())
        for _ in range(size // 2**20):
            stream.write(bytes(2**20))
    replace(copied / "frames-000001.tar", packed.getvalue())
    agree(copied, 1)
    line, memory = start(peak, read_shard, copied, 1).returned(AT_ONCE)
    assert is_refusal(line, "frames-000001.tar")
    assert memory < 2**27


@pytest.mark.parametrize("record", ["GNU.sparse.map=a", "GNU.sparse.size=x", "size=-5", "size=x", "hdrcharset=x"])
def test_a_header_that_makes_no_sense_is_refused_or_ignored(copied: Path, outcome: Outcome, record: str) -> None:
    length = len(record) + 4
    line = f"{length} {record}\n".encode()
    assert len(line) == length
    info, _ = entry("x", type=tarfile.XHDTYPE, size=len(line))
    tar = copied / "frames-000001.tar"
    replace(tar, info.tobuf() + line.ljust(512, b"\0") + tar.read_bytes())
    agree(copied, 1)
    kind, line = outcome(read_shard, copied, 1)
    assert kind == "returned" or is_refusal(line, tar)


# Images.


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_by_hand(width: int, height: int, data: bytes, depth: int = 8, colour: int = 2, extra: bytes = b"") -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = (png_chunk(b"IHDR", head), extra, png_chunk(b"IDAT", zlib.compress(data)), png_chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def as_file(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


ROWS = bytes(16 * (1 + 3 * 16))
IMAGES: dict[str, Callable[[], bytes]] = {
    "60000 pixels a side": lambda: png_by_hand(60000, 60000, bytes(10)),
    "2**31 - 1 pixels a side": lambda: png_by_hand(2**31 - 1, 2**31 - 1, bytes(10)),
    "no pixels": lambda: png_by_hand(0, 0, b""),
    "a row of 16 times 10**9": lambda: png_by_hand(16, 10**9, bytes(10)),
    "cut": lambda: png_by_hand(16, 16, ROWS)[:-40],
    "fewer rows than it says": lambda: png_by_hand(16, 16, ROWS[:300]),
    "no rows": lambda: png_by_hand(16, 16, b""),
    "text that unpacks to 256 megabytes": lambda: png_by_hand(
        16, 16, ROWS, extra=png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**28), 1))
    ),
    "a profile that unpacks to 256 megabytes": lambda: png_by_hand(
        16, 16, ROWS, extra=png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**28), 1))
    ),
    "an unknown filter": lambda: png_by_hand(16, 16, b"\x09" + ROWS[1:]),
    "RGBA": lambda: as_file(Image.new("RGBA", (16, 16))),
    "grey": lambda: as_file(Image.new("L", (16, 16))),
    "grey, 16 bit": lambda: as_file(Image.new("I;16", (16, 16))),
    "palette": lambda: as_file(Image.new("P", (16, 16))),
    "a bit a pixel": lambda: as_file(Image.new("1", (16, 16))),
    "a JPEG": lambda: as_file(Image.new("RGB", (16, 16)), "JPEG"),
    "a GIF": lambda: as_file(Image.new("RGB", (16, 16)), "GIF"),
    "a page": lambda: b"<html>404</html>",
    "PostScript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n(touch canary) (w) file\n",
    "a pickle": lambda: pickle.dumps({}),
}


@pytest.mark.parametrize("image", IMAGES)
def test_a_frame_that_is_another_image_is_refused(copied: Path, refused: Refused, image: str) -> None:
    whole = members(copied)
    write_tar(copied, [entry(*whole[0]), entry(whole[1][0], IMAGES[image]()), *(entry(*one) for one in whole[2:])])
    line = refused(read_shard, copied, 1, room=2**27)
    assert is_refusal(line, "frames-000001.tar", whole[1][0])


# Cards of datasets.


def edit_card(copied: Path, edit: Edit) -> None:
    """Change dataset.json, with a fingerprint that agrees where there can be one."""

    def both(card: dict[str, Any]) -> None:
        edit(card)
        try:
            card["fingerprint"] = fingerprint(card["steps_sha256"], card["shards"])
        except (KeyError, TypeError):
            return

    edit_json(copied / "dataset.json", both)


ABSURD = {
    "image_size": [10**9, 2**63, 0, -1, 16.0, "16", None, [], True],
    "frames": [10**15, 10**12, 0, -1, 22.0, "22", None, {}],
    "frames_per_shard": [0, -4, 10**11, 4.0, "4", None],
    "episodes": [0, -1, 1.0, "1", None],
    "fps": [0, -20, "20", None],
    "shards": [None, 5, {}, "frames", [None] * SHARDS, [[]] * SHARDS, [{}] * SHARDS, []],
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
def test_a_datasets_name_leads_nowhere(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder: Any, name: str
) -> None:
    # Default places of what is made of a dataset have its name in them.
    name = f"{tmp_path}{name}" if name.startswith("/") else name
    monkeypatch.setenv("WMCACHE_HOME", str(tmp_path / "home"))
    edit_card(copied, lambda card: card.update(name=name))
    try:
        frames = FrameDataset.open(copied)
    except UserError:
        return
    for place, folder in (
        (default_store(frames.card.name, encoder), "stores"),
        (default_weights(frames.card.name, "tcn"), "encoders"),
    ):
        assert Path(os.path.normpath(place)).is_relative_to(tmp_path / "home" / folder)


@pytest.mark.parametrize("depth", [10**4, 10**6])
@pytest.mark.parametrize("where", ["dataset.json", "zarr.json", "tokens/zarr.json", "tokens/commits/000002.json"])
def test_nested_json_is_refused(copied: Path, store: Path, refused: Refused, where: str, depth: int) -> None:
    root = copied if where == "dataset.json" else store
    replace(root / where, b'{"attributes": ' + b"[" * depth + b"]" * depth + b"}")
    if where.startswith("tokens/commits"):
        assert [fault.shard for fault in verify(root).faults] == [2]
    else:
        assert is_refusal(refused(FrameDataset.open if root == copied else TokenStore.open, root), root)


@pytest.mark.parametrize("where", ["dataset.json", "zarr.json", "tokens/zarr.json"])
def test_a_huge_json_file_is_refused(copied: Path, store: Path, refused: Refused, where: str) -> None:
    root = copied if where == "dataset.json" else store
    os.truncate(root / where, 10**10)  # takes no room on the disk
    assert is_refusal(refused(FrameDataset.open if root == copied else TokenStore.open, root), root)


# Step tables.


def column(name: str, values: Any) -> Callable[[pa.Table], pa.Table]:
    """Another column of that name."""
    return lambda table: table.set_column(table.schema.get_field_index(name), name, pa.array(values))


TABLES: dict[str, Callable[[pa.Table], pa.Table]] = {
    "a row fewer": lambda table: table.slice(1),
    "no rows": lambda table: table.slice(0, 0),
    "twice the rows": lambda table: pa.concat_tables([table, table]),
    "no columns": lambda table: table.select([]),
    "episodes of text": column("episode", ["x"] * FRAMES),
    "episodes of bytes": column("episode", [b"x"] * FRAMES),
    "episodes of lists": column("episode", [[0]] * FRAMES),
    "no episodes": column("episode", pa.nulls(FRAMES)),
    "steps beyond 32 bits": column("step", [10**12] * FRAMES),
    "steps of lists": column("step", [[0]] * FRAMES),
    "states of text": column("state", ["x"] * FRAMES),
    "states of numbers": column("state", [1.0] * FRAMES),
    "states of all lengths": column("state", [[1.0] * (i % 3) for i in range(FRAMES)]),
    "states of lists of text": column("state", [["x"]] * FRAMES),
    "states of objects": column("state", [{"a": 1}] * FRAMES),
    "no states": column("state", pa.nulls(FRAMES)),
    "states that are no numbers": column("state", [[float("nan")] * 4] * FRAMES),
    "empty actions": column("action", [[]] * FRAMES),
}


@pytest.mark.parametrize("edit", TABLES)
def test_another_step_table_is_refused(copied: Path, refused: Refused, edit: str) -> None:
    file = copied / "steps.parquet"
    pq.write_table(TABLES[edit](pq.read_table(file)), file)
    assert is_refusal(refused(FrameDataset.open, copied), file)


def test_a_step_table_of_numbers_that_are_none_is_refused_though_the_card_agrees(
    copied: Path, refused: Refused
) -> None:
    file = copied / "steps.parquet"
    pq.write_table(TABLES["states that are no numbers"](pq.read_table(file)), file)
    steps = Steps.from_table(pq.read_table(file))
    edit_card(copied, lambda card: card.update(steps_sha256=steps.sha256()))
    assert is_refusal(refused(FrameDataset.open, copied), file)


FILES: dict[str, Callable[[bytes], bytes]] = {
    "a page": lambda data: b"<html>404</html>",
    "empty": lambda data: b"",
    "cut in the footer": lambda data: data[:-200],
    "cut in the data": lambda data: data[:300],
    "the footer alone": lambda data: data[-1500:],
    "a footer that claims 2**31 bytes": lambda data: data[:-8] + struct.pack("<I", 2**31 - 1) + data[-4:],
    "a footer of no bytes": lambda data: data[:-8] + struct.pack("<I", 0) + data[-4:],
    "encrypted": lambda data: b"PARE" + data[4:-4] + b"PARE",
}


@pytest.mark.parametrize("damage", FILES)
def test_a_file_that_is_no_step_table_is_refused(copied: Path, refused: Refused, damage: str) -> None:
    file = copied / "steps.parquet"
    replace(file, FILES[damage](file.read_bytes()))
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
        refusal = ""
        try:
            found = FrameDataset.open(copied).steps
            assert found.sha256() == steps.sha256(), f"seed {seed}"
        except UserError as error:
            refusal = str(error)
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
        assert not refusal or is_refusal(refusal, file), f"seed {seed}: {refusal}"


# Metadata of token stores.


CARDS: dict[str, Edit] = {
    f"{key} {value!r}": lambda it, key=key, value=value: it["card"].update({key: value})
    for key, values in {
        "frames": [10**15, 10**12, 2**39, 0, -22, 22.0, "22", True, None],
        "frames_per_shard": [0, -4, 10**12, 1, 4.0, None],
        "token_dim": [-32, 0, 2**39, 2**70, "32", None],
        "token_grid": [["2", "2"], "22", 4, [2], [2, 2, 1], [2**39, 2**39], [-2, -2], [[2], [2]], None, {}],
        "dtype": ["object", "float64", "O", [], {}, None, 5],
        "dataset": [None, [], "x"],
        "encoder": [None, [], "x"],
        "_target_": ["os.system"],
    }.items()
    for value in values
}
ATTRIBUTES: dict[str, Edit] = {
    "no card": lambda it: it.pop("card"),
    "card a list": lambda it: it.update(card=[]),
    "identity a list": lambda it: it.update(identity=[]),
    "identity with another field": lambda it: it["identity"].update(_target_="os.system"),
    "identity without a field": lambda it: it["identity"].pop("layer"),
    "normalisation a number": lambda it: it["identity"].update(normalisation=5),
    "normalisation of numbers": lambda it: it["identity"].update(normalisation=[5, 5]),
    "no columns": lambda it: it.pop("columns"),
    "columns a list": lambda it: it.update(columns=["state"]),
    "columns none": lambda it: it.update(columns=None),
    "columns a text": lambda it: it.update(columns="state"),
    "a column outside": lambda it: it["columns"].update({"../../etc": "0"}),
    "a column at the root": lambda it: it["columns"].update({"/etc/passwd": "0"}),
    "a column without a name": lambda it: it["columns"].update({"": "0"}),
    "the tokens a column": lambda it: it["columns"].update(tokens="0"),
    "a column's checksum a number": lambda it: it["columns"].update(state=5),
    "no state": lambda it: it["columns"].pop("state"),
    "complete missing": lambda it: it.pop("complete"),
    "mean a text": lambda it: it.update(mean="x"),
    "mean of texts": lambda it: it.update(mean=["x"] * 32),
    "mean too short": lambda it: it.update(mean=[0.0]),
    "mean nested": lambda it: it.update(mean=[[0.0]] * 32),
    "mean of NaN": lambda it: it.update(mean=[float("nan")] * 32),
    "std of infinity": lambda it: it.update(std=[float("inf")] * 32),
    "complete without a mean": lambda it: it.pop("mean"),
    "format a list": lambda it: it.update(format_version=[1]),
    "no checksums of shards": lambda it: it["columns"].pop("sha256"),
    "checksums of shards a number": lambda it: it["columns"].update(sha256=5),
    "a scale of tokens that are none": lambda it: it["columns"].update(scale="0"),
    "no layout": lambda it: it.pop("layout"),
    "layout a list": lambda it: it.update(layout=[]),
}


@pytest.mark.parametrize("edit", [*CARDS, *ATTRIBUTES])
def test_absurd_attributes_under_a_good_seal_are_refused(store: Path, refused: Refused, edit: str) -> None:
    forge(store, {**CARDS, **ATTRIBUTES}[edit])
    assert is_refusal(refused(open_and_gather, store), store)


@pytest.mark.parametrize(
    "edit", ["frames 1000000000000", "frames_per_shard 1", "columns none", "dtype []", "mean a text"]
)
@pytest.mark.parametrize("function", [verify, list_stores, repair])
def test_absurd_attributes_stop_no_other_command(
    store: Path, outcome: Outcome, function: Callable[..., Any], edit: str
) -> None:
    # `wmcache ls` of a folder with such a store in it must still list the others.
    forge(store, {**CARDS, **ATTRIBUTES}[edit])
    kind, _ = outcome(function, store.parent if function is list_stores else store)
    assert kind == "returned" or function is not list_stores


@pytest.mark.parametrize("attributes", [[], None, 5, "x", [{}], {}, {"format": "wmcache-token-store"}])
def test_attributes_that_are_none_are_refused(store: Path, refused: Refused, attributes: Any) -> None:
    edit_json(store / "zarr.json", lambda it: it.update(attributes=attributes))
    assert is_refusal(refused(open_and_gather, store), store)


@pytest.mark.parametrize("frames", [10**9, 2**39])
def test_an_absurd_number_of_frames_is_refused_though_all_descriptions_agree(
    store: Path, refused: Refused, frames: int
) -> None:
    forge(store, lambda it: it["card"].update(frames=frames, frames_per_shard=1))

    def longer(metadata: dict[str, Any]) -> None:
        metadata["shape"][0] = frames

    def longer_in_one_chunk(metadata: dict[str, Any]) -> None:
        metadata["shape"][0] = frames
        metadata["chunk_grid"]["configuration"]["chunk_shape"][0] = frames

    def shorter_shards(metadata: dict[str, Any]) -> None:
        longer(metadata)
        metadata["chunk_grid"]["configuration"]["chunk_shape"][0] = 1

    edit_json(store / "tokens" / "zarr.json", shorter_shards)
    for name in ("action", "state", "episode", "step"):
        edit_json(store / name / "zarr.json", longer_in_one_chunk)
    vouch(store)
    for function in (open_and_gather, repair):
        assert is_refusal(refused(function, store), store)


ARRAYS: dict[str, Edit] = {
    "10**15 rows": lambda it: it["shape"].__setitem__(0, 10**15),
    "10**12 rows, a chunk each": lambda it: (
        it["shape"].__setitem__(0, 10**12),
        it["chunk_grid"]["configuration"]["chunk_shape"].__setitem__(0, 1),
    ),
    "rows of 10**12": lambda it: (
        it.update(shape=[FRAMES, 10**12]),
        it["chunk_grid"]["configuration"].update(chunk_shape=[FRAMES, 10**12]),
    ),
    "rows of rows of rows": lambda it: it.update(shape=[FRAMES] + [2**20] * 40),
    "negative rows": lambda it: it["shape"].__setitem__(0, -FRAMES),
    "rows of text": lambda it: it["shape"].__setitem__(0, "22"),
    "an unknown codec": lambda it: it.update(codecs=[{"name": "rot13"}]),
    "codecs an object": lambda it: it.update(codecs={"name": "bytes"}),
    "codecs by the thousand": lambda it: it.update(codecs=it["codecs"] + [{"name": "crc32c"}] * 5000),
    "an import path for a codec": lambda it: it.update(codecs=[{"name": "os.system", "configuration": {"command": "x"}}]),
    "a pickle for a codec": lambda it: it["codecs"].append({"name": "numcodecs.pickle", "configuration": {}}),
    "an unknown type": lambda it: it.update(data_type="object"),
    "text": lambda it: it.update(data_type="string", fill_value=""),
    "a type by its structure": lambda it: it.update(data_type={"name": "struct", "configuration": {"fields": []}}),
    "no chunks": lambda it: it.update(chunk_grid=None),
    "chunks of nothing": lambda it: it["chunk_grid"]["configuration"].update(chunk_shape=[0] * len(it["shape"])),
    "chunks of 10**15": lambda it: it["chunk_grid"]["configuration"].update(chunk_shape=[10**15] * len(it["shape"])),
    "chunks elsewhere": lambda it: it.update(chunk_key_encoding={"name": "default", "configuration": {"separator": "/../"}}),
}  # fmt: skip


@pytest.mark.parametrize("edit", ARRAYS)
@pytest.mark.parametrize("name", ["tokens", "state"])
def test_an_absurd_array_is_refused(store: Path, refused: Refused, name: str, edit: str) -> None:
    edit_json(store / name / "zarr.json", ARRAYS[edit])
    vouch(store)
    assert is_refusal(refused(open_and_gather, store), store)


def test_a_column_does_not_unpack_to_more_than_its_values(store: Path, start: Start) -> None:
    # 20 kilobytes that unpack to half a gigabyte; the column is 700 bytes.
    [chunk] = [file for file in (store / "state" / "c").rglob("*") if file.is_file()]
    packed = io.BytesIO()
    with pa.CompressedOutputStream(packed, "zstd") as stream:
        for _ in range(2**9):
            stream.write(bytes(2**20))
        stream.flush()
        data = packed.getvalue()
    assert len(data) < 10**5
    replace(chunk, data)
    line, memory = start(peak, open_and_gather, store).returned(AT_ONCE)
    assert is_refusal(line, "state")
    assert memory < 2**27


def version_2(**changes: Any) -> dict[str, Any]:
    """Metadata of a column in the older format, which knew codecs that run code."""
    metadata = {"zarr_format": 2, "shape": [FRAMES, 4], "chunks": [FRAMES, 4], "dtype": "<f8", "fill_value": 0.0}
    return {**metadata, "order": "C", "filters": None, "compressor": None, "attributes": {}, **changes}


PICKLE = {"id": "pickle", "protocol": 5}
TEXT = {"id": "vlen-utf8"}
OBJECTS = {
    "a filter": version_2(filters=[PICKLE]),
    "a compressor": version_2(compressor=PICKLE),
    "objects": version_2(dtype="|O", fill_value=0, filters=[PICKLE]),
    "objects, compressed": version_2(dtype="|O", fill_value=0, compressor=PICKLE),
    "behind another filter": version_2(dtype="|O", fill_value="", filters=[TEXT, PICKLE]),
    "behind a filter, compressed": version_2(dtype="|O", fill_value="", filters=[TEXT], compressor=PICKLE),
}


@pytest.mark.parametrize("where", ["consolidated", "beside", "by its address"])
@pytest.mark.parametrize("objects", OBJECTS)
def test_pickles_in_a_column_are_refused(
    store: Path, small: Small, refused: Refused, canary: Path, objects: str, where: str
) -> None:
    names = ("tokens", "action", "episode", "step")
    (store / "state" / "0.0").write_bytes(pickle.dumps(Evil(canary)))
    if where == "consolidated":
        arrays = {name: json.loads((store / name / "zarr.json").read_bytes()) for name in names}
        inline = {"kind": "inline", "must_understand": False, "metadata": {**arrays, "state": OBJECTS[objects]}}
        edit_json(store / "zarr.json", lambda it: it.update(consolidated_metadata=inline))
    elif where == "beside":
        (store / "state" / ".zarray").write_text(json.dumps(OBJECTS[objects]))
        (store / "state" / "zarr.json").unlink()
    else:
        attributes = json.loads((store / "zarr.json").read_bytes())["attributes"]
        (store / "zarr.json").unlink()
        (store / ".zgroup").write_text('{"zarr_format": 2}')
        (store / ".zattrs").write_text(json.dumps(attributes))
        for name in names:
            array = zarr.open_array(small.store / name, mode="r")
            shutil.copy(store / name / "zarr.json", store / name / "other.json")
            shutil.rmtree(store / name / "c", ignore_errors=True)  # the tokens have none
            zarr.create_array(store / name, data=array[:], fill_value=array.fill_value, zarr_format=2, overwrite=True)
            shutil.copy(small.store / name / "zarr.json", store / name / "zarr.json")
        (store / "state" / ".zarray").write_text(json.dumps(OBJECTS[objects]))
    assert is_refusal(refused(open_and_gather, f"file://{store}" if where == "by its address" else store))
    assert not canary.exists()


@pytest.mark.parametrize("first", [2**64 - 2, 2**63, 2**63 - 1, 2**32])
@pytest.mark.parametrize("length", [1, 0, 2**62 + 1])
def test_an_index_that_points_beyond_its_file_is_refused(
    store: Path, refused: Refused, first: int, length: int
) -> None:
    # From 2**64 - 2 on, the places that follow at the right distance are small numbers again.
    card = TokenStore.open(store).card
    stride = card.frame_bytes + 4
    entries = {row: ((first + stride * row) % 2**64, stride * length % 2**64) for row in range(PER_SHARD)}
    rewrite_index(shard_file(store, 2), card, entries)
    assert is_refusal(refused(open_and_gather, store), shard_file(store, 2))
    assert [fault.shard for fault in verify(store).faults] == [2]


def test_frames_that_are_no_numbers_are_read_as_they_are_but_never_verified(store: Path) -> None:
    # A NaN is what a lost frame reads as, so no extraction writes one; only an enemy does, with a checksum that agrees.
    card, file = TokenStore.open(store).card, shard_file(store, 2)
    data = bytearray(file.read_bytes())
    data[: card.frame_bytes] = np.full(card.frame_bytes // 2, np.nan, np.float16).tobytes()
    data[card.frame_bytes : card.frame_bytes + 4] = struct.pack(
        "<I", google_crc32c.value(bytes(data[: card.frame_bytes]))
    )
    assert len(data) - index_bytes(card) == PER_SHARD * (card.frame_bytes + 4)
    replace(file, bytes(data))
    assert [fault.shard for fault in verify(store).faults] == [2]
    repair(store, device="cpu")
    assert verify(store).sound


def test_a_record_that_agrees_with_another_shards_bytes_is_found(small: Small, store: Path) -> None:
    replace(shard_file(store, 2), shard_file(store, 1).read_bytes())
    forge_record(record_file(store, 2), lambda it: it.update(sha256=sha256_of(shard_file(store, 2))))
    assert [fault.shard for fault in verify(store).faults] == [2]
    repair(store, device="cpu")
    assert shard_file(store, 2).read_bytes() == shard_file(small.store, 2).read_bytes()
    assert record_file(store, 2).read_bytes() == record_file(small.store, 2).read_bytes()


RECORDS: dict[str, Edit] = {
    "frames a number": lambda it: it.update(frames=5),
    "frames of text": lambda it: it.update(frames=["8", "12"]),
    "bytes a text": lambda it: it.update(bytes="1108"),
    "bytes absurd": lambda it: it.update(bytes=10**18),
    "sum a text": lambda it: it.update(sum="x"),
    "sum of texts": lambda it: it.update(sum=["x"] * 32),
    "sum too short": lambda it: it.update(sum=[0.0]),
    "sum of NaN": lambda it: it.update(sum=[float("nan")] * 32),
    "sum none": lambda it: it.update(sum=None),
    "sha256 a number": lambda it: it.update(sha256=5),
    "identity a list": lambda it: it.update(identity=[]),
}


@pytest.mark.parametrize("edit", RECORDS)
def test_an_absurd_record_is_found_and_written_anew(small: Small, store: Path, outcome: Outcome, edit: str) -> None:
    forge_record(record_file(store, 2), RECORDS[edit])
    assert [fault.shard for fault in verify(store).faults] == [2]
    assert outcome(repair, store) == ("returned", "")
    assert record_file(store, 2).read_bytes() == record_file(small.store, 2).read_bytes()
    assert (store / "zarr.json").read_bytes() == (small.store / "zarr.json").read_bytes()


RECIPES: dict[str, dict[str, Any]] = {
    "unknown name": {"name": "os.system"},
    "name a list": {"name": ["tcn"]},
    "no name": {"name": None},
    "another argument": {"name": "tcn", "_target_": "os.system"},
    "device": {"name": "tcn", "device": "cpu"},
    "weights a number": {"name": "tcn", "weights": 5},
    "image size a text": {"name": "tcn", "image_size": "64"},
    "image size absurd": {"name": "tcn", "image_size": 32 * 10**6},
    "image size negative": {"name": "tcn", "image_size": -32},
    "dtype": {"name": "tcn", "dtype": "object"},
    "dtype a list": {"name": "tcn", "dtype": []},
    "normalisation a list": {"name": "tcn", "normalisation": []},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_absurd_recipe_of_an_encoder_is_refused(store: Path, small: Small, refused: Refused, recipe: str) -> None:
    weights = {"weights": str(small.weights), **RECIPES[recipe]}
    forge(store, lambda it: it["card"].update(encoder=weights))
    flip(shard_file(store, 2), 300)
    assert is_refusal(refused(repair, store))


@pytest.mark.parametrize("path", [None, 5, [], "", "/dev/null", "a\0b", "pipe:touch canary", "http://localhost:1/"])
def test_an_absurd_place_of_the_frames_is_refused(store: Path, refused: Refused, path: Any) -> None:
    forge(store, lambda it: it["card"]["dataset"].update(path=path))
    flip(shard_file(store, 2), 300)
    assert is_refusal(refused(repair, store), "--dataset")


# Weights, checkpoints and settings of runs.


def pickled(canary: Path) -> bytes:
    return pickle.dumps(Evil(canary))


def saved_by_torch(canary: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"stem.0.weight": Evil(canary)}, buffer)
    return buffer.getvalue()


def header(value: Any, data: bytes = b"") -> Callable[[Path], bytes]:
    """A safetensors file with a header as one likes."""
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return lambda canary: struct.pack("<Q", len(text)) + text + data


WEIGHTS: dict[str, Callable[[Path], bytes]] = {
    "a pickle": pickled,
    "saved by torch": saved_by_torch,
    "a page": lambda canary: b"<html>404</html>",
    "a header of 2**62 bytes": lambda canary: struct.pack("<Q", 2**62) + b"{}",
    "a header of 10**8 bytes": lambda canary: struct.pack("<Q", 10**8) + b"{}",
    "no header": lambda canary: struct.pack("<Q", 0),
    "a nested header": header(b"[" * 10**5 + b"]" * 10**5),
    "an absurd shape": header({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, b"abcd"),
    "a negative shape": header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"abcd"),
    "data elsewhere": header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [10**12, 10**12 + 4]}}, b"abcd"),
    "an unknown type": header({"a": {"dtype": "O", "shape": [1], "data_offsets": [0, 4]}}, b"abcd"),
    "no tensors": header({}),
}


@pytest.mark.parametrize("weights", WEIGHTS)
def test_weights_that_are_none_are_refused(tmp_path: Path, refused: Refused, canary: Path, weights: str) -> None:
    file = tmp_path / "evil.safetensors"
    file.write_bytes(WEIGHTS[weights](canary))
    assert is_refusal(refused(create_encoder, file), file)


@pytest.mark.parametrize("name", ["evil.pt", "evil.pth", "evil.pkl", "evil.bin", "evil", "evil.safetensors.pt"])
def test_weights_of_another_kind_are_not_even_opened(tmp_path: Path, refused: Refused, canary: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pickled(canary))
    assert is_refusal(refused(create_encoder, tmp_path / name), name, ".safetensors")


def test_evil_weights_are_one_line_on_the_command_line_too(
    copied: Path, tmp_path: Path, start: Start, canary: Path
) -> None:
    file = tmp_path / "evil.safetensors"
    file.write_bytes(pickled(canary))
    words = ["extract", "--dataset", copied, "--weights", file, "--out", tmp_path / "some.zarr", "--device", "cpu"]
    status, output, escaped = start(command, *map(str, words)).returned(AT_ONCE)
    assert (status, escaped) == (1, "")
    assert output.splitlines()[-1].startswith("Error: ")
    assert str(file) in output
    assert not (tmp_path / "some.zarr").exists()


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_checkpoint_that_is_none_is_refused(
    run: Path, store_path: Path, refused: Refused, canary: Path, name: str, weights: str
) -> None:
    file = last_checkpoint(run) / name
    file.write_bytes(WEIGHTS[weights](canary))
    vouch_for(file.parent)
    assert is_refusal(refused(resume_run, store_path, run), file.parent)
    if name == "model.safetensors":
        assert is_refusal(refused(load_model_on_cpu, run), file.parent)


SETTINGS: dict[str, Edit] = {
    "a class for a model": lambda it: it.update(model="os.system"),
    "a list for a model": lambda it: it.update(model=["dino-wm"]),
    "no model": lambda it: it.update(model=None),
    "a class in the options": lambda it: it["model_options"].update(_target_="os.system"),
    "options a list": lambda it: it.update(model_options=[]),
    "options a text": lambda it: it.update(model_options="width"),
    "width 10**9": lambda it: it["model_options"].update(width=10**9),
    "width 10**30": lambda it: it["model_options"].update(width=10**30),
    "width 0": lambda it: it["model_options"].update(width=0),
    "width negative": lambda it: it["model_options"].update(width=-16),
    "width a text": lambda it: it["model_options"].update(width="16"),
    "no heads": lambda it: it["model_options"].update(heads=0),
    "depth 10**8": lambda it: it["model_options"].update(depth=10**8),
    "depth a text": lambda it: it["model_options"].update(depth="1"),
    "dropout 2": lambda it: it["model_options"].update(dropout=2.0),
    "mlp of 10**12": lambda it: it["model_options"].update(mlp_ratio=1e12),
    "shape a list": lambda it: it.update(shape=[4, 32]),
    "shape with another field": lambda it: it["shape"].update(_target_="os.system"),
    "shape without a field": lambda it: it["shape"].pop("history"),
    "10**9 tokens": lambda it: it["shape"].update(tokens=10**9),
    "10**6 frames of history": lambda it: it["shape"].update(history=10**6),
    "negative actions": lambda it: it["shape"].update(action_dim=-10),
    "dimensions in text": lambda it: it["shape"].update(token_dim="32"),
    "no dimensions": lambda it: it["shape"].update(token_dim=None),
}


@pytest.mark.parametrize("edit", SETTINGS)
def test_absurd_settings_of_a_run_are_refused(run: Path, refused: Refused, edit: str) -> None:
    edit_json(run / "config.json", SETTINGS[edit])
    assert is_refusal(refused(load_model_on_cpu, run, room=2 * ROOM), run)


def test_a_nested_line_in_the_log_does_not_stop_a_run(run: Path, store_path: Path, outcome: Outcome) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write("[" * 10**6 + "]" * 10**6 + "\n")
    assert outcome(truncate_metrics, run, 8) == ("returned", "")


def test_what_an_enemy_calls_things_stays_on_one_line(store: Path, small: Small, refused: Refused) -> None:
    # A message goes to a terminal, which such characters would clear, or make it say something else.
    forge(store, lambda it: it["identity"].update(layer="head\n\x1b[2JAll is well."))
    assert is_refusal(refused(small.extract, store), "other settings")
