"""The frame dataset: WebDataset tar shards of lossless frames, beside one Parquet table of steps.

    dataset.json         description with a fingerprint; written last, so its presence means that the dataset is whole
    steps.parquet        one row per frame: episode, step, and the columns that dataset.json describes (default: action, state)
    README.md            a card of these facts, for readers and hubs; not part of the fingerprint
    frames-000000.tar    exactly `frames_per_shard` frames in global order (the last shard has the rest), key EEEEEE-SSSSS

Tar i has the frames of Zarr shard i of a token store: an extraction task reads one file and writes one file.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import numpy as np
import pyarrow.parquet as pq
import webdataset
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from typing_extensions import TypedDict

from wmcache.common.columns import Column, HasColumns
from wmcache.common.cpus import available_cpus
from wmcache.common.errors import MissingError, UserError, command, reason
from wmcache.common.files import atomic_write, cannot_write, is_temporary, sha256_of, sweep
from wmcache.common.folders import did_you_mean
from wmcache.common.jsonfiles import read_json, write_json
from wmcache.common.memory import available_ram
from wmcache.common.paths import (
    AnyPath,
    as_path,
    exists,
    is_local,
    names_in,
    read_bytes,
    readable,
    remove,
    require_name,
    size_of,
    unreadable,
)
from wmcache.common.readme import write_readme
from wmcache.common.schema import Count, Name, Size, parse
from wmcache.common.space import human_bytes
from wmcache.pipeline.readme import dataset_readme
from wmcache.pipeline.steps import Steps, read_steps

FORMAT_VERSION = 1
FRAMES_PER_SHARD = 512
DECODERS = min(8, available_cpus())
AGAIN = "restore it or collect again"

Frames = NDArray[np.uint8]


class ShardRecord(TypedDict):
    """A tar in `dataset.json`."""

    name: str
    frames: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class DatasetCard(HasColumns):
    """The content of `dataset.json`.

    Attributes:
        name: of the folder when it was made.
        env: environment id, or origin of the frames.
        maze: the `layout`, so that the environment can be built again anywhere.
        policy: behaviour policy that chose the actions.
        fps: env steps per simulated second.
        columns: of the step table; None until the table is known. Left out of the file where it is the default (`default_columns`).
        fingerprint: over shards and steps; equal fingerprints mean equal frames.
    """

    name: Name
    env: str
    maze: list[str]
    image_size: Annotated[Size, Field(le=8192)]
    policy: str
    seed: int
    episodes: Count
    frames: Count
    frames_per_shard: Count
    fps: Count
    columns: dict[str, Column] | None = None
    format_version: int = FORMAT_VERSION
    shards: list[ShardRecord] = field(default_factory=list)
    steps_sha256: str = ""
    fingerprint: str = ""

    @property
    def layout(self) -> tuple[str, ...]:
        """Lines of text that describe the environment beyond its id, see `EnvSpec`; `maze` in files."""
        return tuple(self.maze)

    @property
    def num_shards(self) -> int:
        """Number of tar shards."""
        return -(-self.frames // self.frames_per_shard)

    def shard_frames(self, shard: int) -> range:
        """Return the global numbers of the frames of a shard."""
        return range(shard * self.frames_per_shard, min(self.frames, (shard + 1) * self.frames_per_shard))


class FrameDatasetWriter:
    """Writes a dataset shard by shard, from any number of processes: each shard and each table is whole or absent."""

    def __init__(self, path: AnyPath, card: DatasetCard, steps: Steps) -> None:
        """Start or resume a dataset; raises UserError if the folder is a dataset with other settings, or something else."""
        self.path, self.card, self.steps = path, replace(card, columns=steps.described), steps
        require_name(path)
        self._unfinished = path / "unfinished.json"
        with cannot_write(path):
            known = self.card.to_json()
            known.setdefault("columns", None)  # last, because other differences are easier to read
            if not is_started(path, known):
                parse(DatasetCard, self.card.to_json(), path, "choose another --out", fault="cannot be written")
                write_json(self._unfinished, self.card.to_json())
            if is_local(path):
                sweep(path)
            if not exists(path / "steps.parquet"):
                with atomic_write(path / "steps.parquet") as file:
                    pq.write_table(steps.to_table(), file)
            elif read_steps(path, len(steps), steps.described).sha256() != steps.sha256():
                raise UserError(f"{path} was started with other steps; choose another --out")

    def pending(self) -> list[int]:
        """List the shards that are not written yet."""
        with cannot_write(self.path):
            names = set(names_in(self.path, "frames-"))
        return [shard for shard in range(self.card.num_shards) if shard_name(shard) not in names]

    def finish(self) -> DatasetCard:
        """Write `dataset.json`, or compare the shards with it; raises UserError if one is missing, or differs."""
        if missing := self.pending():
            raise UserError(f"{self.path} lacks {len(missing)} shards, such as {shard_name(missing[0])}; collect again")
        with cannot_write(self.path):
            if not exists(self.path / "dataset.json"):
                card = self._write_card()
                remove(self._unfinished)
                return card
            remove(self._unfinished)
            card = FrameDataset.open(self.path).card
            for record in card.shards:
                tar = self.path / record["name"]
                if sha256_of(tar) != record["sha256"]:
                    raise UserError(f"{tar} differs from its checksum; move it away, then run the same command again")
            return card

    def _write_card(self) -> DatasetCard:
        shards: list[ShardRecord] = []
        for shard in range(self.card.num_shards):
            tar, frames = self.path / shard_name(shard), len(self.card.shard_frames(shard))
            shards.append({"name": tar.name, "frames": frames, "bytes": size_of(tar), "sha256": sha256_of(tar)})
        steps_sha256 = self.steps.sha256()
        known = fingerprint(steps_sha256, shards)
        card = replace(self.card, shards=shards, steps_sha256=steps_sha256, fingerprint=known)
        write_readme(self.path, dataset_readme(card))
        write_json(self.path / "dataset.json", card.to_json())
        return card


class FrameDataset:
    """A finished frame dataset. Counts, keys, sizes and checksums are compared with `dataset.json` when they are read."""

    def __init__(self, path: AnyPath, card: DatasetCard, steps: Steps) -> None:
        """Use `FrameDataset.open`."""
        self.path, self.card, self.steps = path, card, steps

    @classmethod
    def open(cls, path: str | AnyPath) -> FrameDataset:
        """Open the dataset in a folder or at a URL; raises UserError if it is missing, unfinished or damaged."""
        path = as_path(path)
        hint = _collect_hint(path)
        with readable(path):
            if exists(path / "unfinished.json"):
                raise UserError(f"{path} is an unfinished dataset; finish it by running its wmcache collect again")
        try:
            values = read_json(path / "dataset.json", hint)
        except MissingError:
            raise no_dataset(path) from None
        card = parse(DatasetCard, values, path / "dataset.json", hint)
        if (found := card.format_version) != FORMAT_VERSION:
            raise UserError(f"{path} has format {found}, not {FORMAT_VERSION}; collect into another --out")
        if not _is_consistent(card):
            raise UserError(f"{path / 'dataset.json'} is damaged (its name, shards or fingerprint); {hint}")
        steps = read_steps(path, card.frames, card.columns)
        if steps.sha256() != card.steps_sha256 or not steps.in_order():
            raise UserError(f"{path / 'steps.parquet'} does not match dataset.json; {hint}")
        return cls(path, replace(card, columns=steps.described), steps)

    def read_shard(self, shard: int) -> Frames:
        """Decode all frames of a shard, uint8 [frames, image_size, image_size, 3]; raises UserError for a damaged tar."""
        tar, size, numbers = self.path / shard_name(shard), self.card.image_size, self.card.shard_frames(shard)
        needed, free = len(numbers) * size * size * 3, available_ram()
        if needed > free:
            memory = f"{human_bytes(needed)} of memory, {human_bytes(free)} are free"
            raise UserError(f"the {len(numbers)} frames of {tar} need {memory}; lower --frames-per-shard")
        try:
            if size_of(tar) > len(numbers) * (largest_png(size) + 2048) + 20480:
                raise UserError(f"{tar} is larger than its frames can be; {AGAIN}")
            data = read_bytes(tar)
        except FileNotFoundError as error:
            raise UserError(f"{tar} does not exist; {AGAIN}") from error
        except OSError as error:
            raise unreadable(tar, error) from error
        if hashlib.sha256(data).hexdigest() != self.card.shards[shard]["sha256"]:
            raise UserError(f"{tar} differs from its checksum in dataset.json; {AGAIN}")
        return decode_tar(data, [self.steps.key(number) for number in numbers], size, tar)

    def read_frames(self, frames: Iterable[int]) -> Frames:
        """Decode some frames, uint8 [len(frames), image_size, image_size, 3], in the given order; reads each shard once."""
        wanted = np.fromiter(frames, dtype=np.int64)
        size = self.card.image_size
        out = np.empty((len(wanted), size, size, 3), np.uint8)
        shard_of = wanted // self.card.frames_per_shard
        for shard in np.unique(shard_of).tolist():
            rows = np.flatnonzero(shard_of == shard)
            out[rows] = self.read_shard(shard)[wanted[rows] - self.card.shard_frames(shard).start]
        return out


def _collect_hint(path: AnyPath) -> str:
    return "make a dataset with: " + command("wmcache", "collect", "--out", path)


def no_dataset(path: AnyPath) -> MissingError:
    """Return the error for a missing dataset."""
    return MissingError(f"{path / 'dataset.json'} does not exist; {did_you_mean(path, 'dataset', _collect_hint(path))}")


def is_complete(path: AnyPath) -> bool:
    """Return whether a dataset is finished and has all its shards."""
    try:
        names = set(names_in(path))
        card = FrameDataset.open(path).card
    except (UserError, OSError):
        return False
    return {record["name"] for record in card.shards} <= names


def is_started(path: AnyPath, known: Mapping[str, Any]) -> bool:
    """Return whether a folder is a dataset, finished or not, with these values of its card; a value that is empty is not compared.

    Raises:
        UserError: it is a dataset with other values, or has other files.
    """
    names = set(names_in(path))
    started = next((name for name in ("dataset.json", "unfinished.json") if name in names), None)
    if started is None:
        if any(not is_temporary(path / name) for name in names):
            raise UserError(f"{path} exists and is not a wmcache dataset; choose another --out")
        return False
    found = read_json(path / started, "restore it, or choose another --out")
    for name, value in known.items():
        if value not in ([], "") and found.get(name) != value:
            differs = f"{name} {found.get(name)!r}, not {value!r}"
            raise UserError(f"{path} is a dataset with {differs}; use its settings, or another --out")
    return True


def fingerprint(steps_sha256: str, shards: list[ShardRecord]) -> str:
    """SHA-256 over the checksums of a dataset's parts."""
    known = json.dumps([FORMAT_VERSION, steps_sha256, [record["sha256"] for record in shards]])
    return hashlib.sha256(known.encode()).hexdigest()


def _is_consistent(card: DatasetCard) -> bool:
    """Compare the parts of a card, which may be another user's, before anything is allocated by its numbers."""
    if card.name in (".", "..") or len(card.shards) != card.num_shards:
        return False
    known = [(record["name"], record["frames"]) for record in card.shards]
    expected = [(shard_name(shard), len(card.shard_frames(shard))) for shard in range(card.num_shards)]
    return known == expected and fingerprint(card.steps_sha256, card.shards) == card.fingerprint


def shard_name(shard: int) -> str:
    """Return `frames-000012.tar`."""
    return f"frames-{shard:06d}.tar"


def write_shard(path: AnyPath, shard: int, samples: Iterable[tuple[str, Frames]]) -> None:
    """Write one tar shard atomically from (key, frame) pairs; equal samples give equal bytes."""
    with (
        atomic_write(path / shard_name(shard)) as file,
        webdataset.TarWriter(file, encoder=False, user="wmcache", group="wmcache", mtime=0) as tar,
    ):
        for key, frame in samples:
            tar.write({"__key__": key, "png": encode_png(frame)})


def largest_png(size: int) -> int:
    """Upper bound for the bytes of a frame: PNG hardly ever takes more than the pixels."""
    return 2 * size * size * 3 + 2**20


def encode_png(frame: Frames) -> bytes:
    """Encode losslessly; level 1 takes half the time of the default and a few percent more space."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def decode_png(data: bytes, size: int, where: str) -> Frames:
    """Decode a square RGB frame, after its declared size and mode were checked; `where` is for errors."""
    try:
        image = Image.open(io.BytesIO(data), formats=["PNG"])
        if image.size != (size, size) or image.mode != "RGB":
            raise UserError(f"{where} is {image.size} {image.mode}, not ({size}, {size}) RGB; {AGAIN}")
        return np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{where} is not a readable PNG ({reason(error)}); {AGAIN}") from error


def decode_tar(data: bytes, keys: Sequence[str], size: int, tar: AnyPath) -> Frames:
    """Decode all frames of a tar, uint8 [len(keys), size, size, 3]; raises UserError for other members or another order."""
    pngs: list[bytes] = []
    for name, png in _members(tar, data, largest_png(size)):
        if len(pngs) == len(keys) or name != f"{keys[len(pngs)]}.png":
            raise UserError(f"{tar}: member {name[:80]!r} is not the expected frame {len(pngs)}; {AGAIN}")
        pngs.append(png)
    if len(pngs) != len(keys):
        raise UserError(f"{tar} has {len(pngs)} frames instead of {len(keys)}; {AGAIN}")
    frames = np.empty((len(keys), size, size, 3), np.uint8)

    def decode(row: int) -> None:
        frames[row] = decode_png(pngs[row], size, f"{tar}: {keys[row]}.png")

    with ThreadPoolExecutor(DECODERS) as pool:  # Pillow decodes without the interpreter's lock
        list(pool.map(decode, range(len(keys))))
    return frames


def _members(tar: AnyPath, data: bytes, most: int) -> Iterator[tuple[str, bytes]]:
    """Yield names and bytes of the members: plain files of at most `most` bytes each."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for member in archive:
                if not member.isreg() or member.issparse() or member.size > most:
                    raise UserError(f"{tar}: member {member.name[:80]!r} is not a frame; {AGAIN}")
                file = archive.extractfile(member)
                yield member.name, file.read() if file else b""
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise UserError(f"{tar} is a damaged tar file ({reason(error)}); {AGAIN}") from error
