"""How the fault suite damages files, and a child process that reads hostile files with limited memory."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import resource
import struct
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import psutil
from fault_workers import Sample, content
from numpy.typing import NDArray
from PIL import Image

from wmcache.cache import StoreCard, TokenStore
from wmcache.cache.layout import shard_file
from wmcache.cache.reader import ABSENT
from wmcache.cache.records import record_file
from wmcache.cache.verify import verify
from wmcache.common.errors import UserError
from wmcache.common.files import sha256_of
from wmcache.common.jsonfiles import seal
from wmcache.pipeline.frames import FrameDataset, fingerprint
from wmcache.pipeline.repair import repair
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.train import train

FRAMES, PER_SHARD, SHARDS = 22, 4, 6
EVERY = np.arange(FRAMES)
ROOM = 1_000_000_000
"""Bytes of memory that reading a hostile file of a few kilobytes may take, with plenty to spare."""
AT_ONCE = 10.0
"""Seconds in which a busy machine still answers."""
DESTROYS = ("repair", "again with", "wmcache extract", "collect", "fit it again", "delete", "--overwrite", "damaged")
"""Words that no hint about a healthy file may contain."""


def replace(file: Path, data: bytes) -> None:
    """Write other bytes under the same name in a new file; processes that have the old one open or mapped keep it."""
    other = file.with_name(f".{file.name}.other")
    other.write_bytes(data)
    other.replace(file)


def flip(file: Path, offset: int, mask: int = 1) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= mask
    replace(file, bytes(data))


def edit_json(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(file.read_bytes())
    edit(value)
    replace(file, (json.dumps(value, indent=2) + "\n").encode())


def forge(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change a store's attributes and seal them again, as an attacker would."""

    def reseal(metadata: dict[str, Any]) -> None:
        metadata["attributes"].pop("checksum")
        edit(metadata["attributes"])
        metadata["attributes"] = seal(metadata["attributes"])

    edit_json(path / "zarr.json", reseal)


def forge_record(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(file.read_bytes())
    values.pop("checksum", None)
    edit(values)
    replace(file, json.dumps(seal(values)).encode())


def update_checksums(dataset: Path, shard: int) -> None:
    """Update the checksums in dataset.json to those of a changed tar."""
    tar = dataset / f"frames-{shard:06d}.tar"

    def edit(card: dict[str, Any]) -> None:
        card["shards"][shard].update(sha256=sha256_of(tar), bytes=tar.stat().st_size)
        card["fingerprint"] = fingerprint(card["steps_sha256"], card["shards"])

    edit_json(dataset / "dataset.json", edit)


Members = list[tuple[str, bytes]]


def members(tar: Path) -> Members:
    with tarfile.open(tar) as opened:
        return [(member.name, opened.extractfile(member).read()) for member in opened]


def entry(name: str, data: bytes = b"", **header: Any) -> tuple[tarfile.TarInfo, bytes]:
    """A member with any header."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in header.items():
        setattr(info, key, value)
    return info, data


def write_tar(tar: Path, entries: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as opened:
        for info, data in entries:
            opened.addfile(info, io.BytesIO(data))
    replace(tar, buffer.getvalue())


def image_of(mode: str, side: int = 16, kind: str = "PNG") -> bytes:
    """Return the file of a black image."""
    buffer = io.BytesIO()
    Image.new(mode, (side, side)).save(buffer, kind)
    return buffer.getvalue()


def index_bytes(card: StoreCard) -> int:
    return 16 * card.frames_per_shard + 4


def rewrite_index(file: Path, card: StoreCard, entries: dict[int, tuple[int, int]]) -> None:
    """Change the (offset, length) of some frames in a shard's index, with a matching checksum."""
    data = file.read_bytes()
    index = bytearray(data[-index_bytes(card) : -4])
    for row, (offset, size) in entries.items():
        struct.pack_into("<QQ", index, 16 * row, offset, size)
    crc = struct.pack("<I", google_crc32c.value(bytes(index)))
    replace(file, data[: -index_bytes(card)] + bytes(index) + crc)


def lose_chunk(file: Path, card: StoreCard, row: int) -> None:
    rewrite_index(file, card, {row: (int(ABSENT), int(ABSENT))})


def stamps(folder: Path) -> dict[Path, tuple[int, int]]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


@dataclass(frozen=True)
class Copy:
    """A copy of an undisturbed store, to be damaged."""

    sample: Sample
    whole: Path
    path: Path
    dtype: str = "float16"

    @property
    def tokens(self) -> NDArray[np.float16]:
        return TokenStore.open(self.whole).gather(EVERY)

    @property
    def restored(self) -> bool:
        """Whether the copy has the bytes of the undisturbed store again."""
        return content(self.path) == content(self.whole) and verify(self.path).sound

    def shard(self, number: int) -> Path:
        return Path(str(shard_file(self.path, number)))

    def record(self, number: int) -> Path:
        return Path(str(record_file(self.path, number)))

    def extract(self) -> None:
        self.sample.extract(self.path, self.dtype)

    def repair(self) -> None:
        repair(self.path, device="cpu")

    def stamps(self, *, records: bool = True, without: int = -1) -> dict[Path, tuple[int, int]]:
        skipped = (self.shard(without), self.record(without)) if without >= 0 else ()
        return {
            file: stamp
            for file, stamp in stamps(self.path / "tokens").items()
            if file not in skipped and (file.name.startswith("c.") or (records and file.parent.name == "commits"))
        }

    def check_repair(self, shard: int) -> None:
        """Verification finds one damaged shard, and repair makes that shard again and no other."""
        found, others = verify(self.path), self.stamps(without=shard)
        assert [(fault.shard, fault.file) for fault in found.faults] == [(shard, str(self.shard(shard)))]
        assert (found.sound, found.shards_done) == (False, SHARDS - 1)
        self.repair()
        assert self.stamps(without=shard) == others
        assert self.restored


def vouch(path: Path) -> None:
    forge(path, lambda attributes: attributes.update(layout=sha256_of(path / "tokens" / "zarr.json")))


def vouch_for(checkpoint: Path) -> None:
    """Update the checksums in a checkpoint's state to those of its files."""

    def edit(state: dict[str, Any]) -> None:
        for name in state.get("sha256", {}):
            state["sha256"][name] = sha256_of(checkpoint / name)

    forge_record(checkpoint / "state.json", edit)


def is_refusal(error: UserError | str, *words: object) -> bool:
    """Return whether an error is one printable line that contains these paths, flags or names."""
    line = str(error)
    return line.isprintable() and len(line) < 1200 and all(str(word) in line for word in words)


# Run by child processes.


def with_little_memory(sample: Sample, memory: int, function: Callable[..., Any], *arguments: Any) -> None:
    """Run a function with a limit on additional memory."""
    # Libraries reserve memory for themselves at the first call.
    read_shard(sample.dataset, 1)
    open_and_gather(sample.store)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + memory, hard))
    function(*arguments)


def open_and_gather(path: str | Path) -> None:
    store = TokenStore.open(path)
    for shard in range(store.card.num_shards):
        store.gather(np.asarray(store.card.shard_frames(shard)))


def read_shard(dataset: Path, shard: int) -> None:
    FrameDataset.open(dataset).read_shard(shard)


def resume_run(store: Path, run: Path) -> None:
    """Resume a run with its own settings and more steps."""
    config = json.loads((run / "config.json").read_bytes())
    options = TrainOptions(**{key: config[key] for key in config if key not in ("cache", "shape")})
    train(store, run, dataclasses.replace(options, steps=options.steps + 1), resume=True)


def gather_around_a_cut(path: Path, shard: Path, size: int) -> None:
    """Read everything, cut a mapped file, and read everything again."""
    store = TokenStore.open(path)
    everything = np.arange(len(store))
    store.gather(everything)
    os.truncate(shard, size)
    store.gather(everything)
