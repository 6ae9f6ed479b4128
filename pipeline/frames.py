"""The frame dataset: WebDataset tar shards of lossless frames, beside one Parquet table of steps.

    dataset.json         what it is, with a fingerprint; written last, so its presence means that the dataset is whole
    steps.parquet        one row a frame: episode, step, action, state
    frames-000000.tar    exactly `frames_per_shard` frames in global order (the last shard holds the rest), key EEEEEE-SSSSS

Tar i holds the frames that Zarr shard i of a token store holds: one extraction task reads one file and writes one file.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from typing_extensions import TypedDict

from wmcache.common.cpus import available_cpus
from wmcache.common.errors import MissingError, UserError, command
from wmcache.common.files import atomic_write, cannot_write, is_temporary, sha256_of, sweep
from wmcache.common.folders import did_you_mean
from wmcache.common.jsonfiles import read_json, write_json
from wmcache.common.memory import available_ram
from wmcache.common.paths import (
    MISSING,
    AnyPath,
    as_path,
    cause_outside,
    exists,
    is_local,
    names_in,
    open_to_read,
    read_bytes,
    remove,
    require_name,
    size_of,
    unreadable,
)
from wmcache.common.schema import Count, Name, Size, parse
from wmcache.common.space import human_bytes

FORMAT_VERSION = 1
FRAMES_PER_SHARD = 512
DECODERS = min(8, available_cpus())

Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class Steps:
    """The step table as arrays, one row a frame.

    Attributes:
        episode: int32 [frames], non-decreasing.
        step: int32 [frames], counting from 0 in each episode.
        action: float32 [frames, 2], taken at that frame.
        state: float64 [frames, 4], (x, y, vx, vy) of that frame; float64, so that the frame can be drawn again exactly.
    """

    episode: NDArray[np.int32]
    step: NDArray[np.int32]
    action: NDArray[np.float32]
    state: NDArray[np.float64]

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.episode)

    def in_order(self) -> bool:
        """Whether episodes and steps count up as they should, and every number is one."""
        new = np.diff(self.episode, prepend=-1)
        step = np.where(new == 1, 0, np.roll(self.step, 1) + 1)
        finite = np.isfinite(self.action).all() and np.isfinite(self.state).all()
        return bool(finite and np.isin(new, (0, 1)).all() and (self.step == step).all() and len(self) > 0)

    def columns(self) -> dict[str, NDArray[Any]]:
        """As a token store holds them."""
        return {"action": self.action, "state": self.state, "episode": self.episode, "step": self.step}

    def key(self, frame: int) -> str:
        """The frame's key in the tar shards."""
        return f"{self.episode[frame]:06d}-{self.step[frame]:05d}"

    def sha256(self) -> str:
        """Over the values, not over the Parquet file, whose bytes depend on pyarrow's version."""
        digest = hashlib.sha256()
        for array in (self.episode, self.step, self.action, self.state):
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def to_table(self) -> pa.Table:
        """The Parquet table."""
        columns = {"episode": pa.array(self.episode), "step": pa.array(self.step)}
        for name, array in (("action", self.action), ("state", self.state)):
            columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(array.ravel()), array.shape[1])
        return pa.table(columns)

    @classmethod
    def from_table(cls, table: pa.Table) -> Steps:
        """From the Parquet table; raises KeyError where a column is missing."""

        def matrix(name: str, dtype: type[np.generic]) -> NDArray[Any]:
            column = table[name].combine_chunks()
            return np.asarray(column.flatten(), dtype=dtype).reshape(len(table), -1)

        return cls(
            np.asarray(table["episode"], dtype=np.int32),
            np.asarray(table["step"], dtype=np.int32),
            matrix("action", np.float32),
            matrix("state", np.float64),
        )


class ShardRecord(TypedDict):
    """What `dataset.json` says of a tar: its name, its frames, its size and its SHA-256."""

    name: str
    frames: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class DatasetCard:
    """What `dataset.json` says.

    Attributes:
        name: the folder's name when it was made.
        env: environment id, or where the frames come from.
        maze: the layout's text grid, so that the environment can be built again anywhere.
        image_size: side of the square frames, in pixels.
        policy: behaviour policy that chose the actions.
        seed: of the whole dataset.
        episodes, frames, frames_per_shard, fps: counts, and env steps per simulated second.
        format_version: of this layout.
        shards: a record for each tar: name, frames, bytes, sha256.
        steps_sha256: over the values of the step table.
        fingerprint: over shards and steps; two datasets with equal fingerprints hold equal frames.
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
    format_version: int = FORMAT_VERSION
    shards: list[ShardRecord] = field(default_factory=list)
    steps_sha256: str = ""
    fingerprint: str = ""


class FrameDatasetWriter:
    """Writes a dataset shard by shard, from any number of processes: each shard and each table is whole or absent."""

    def __init__(self, path: AnyPath, card: DatasetCard, steps: Steps) -> None:
        """Start, or take up again, the dataset at `path`.

        Raises:
            UserError: there is a dataset with other settings, or something else.
        """
        self.path, self.card, self.steps = path, card, steps
        require_name(path)
        self._unfinished = path / "unfinished.json"
        with cannot_write(path):
            there = set(names_in(path))
            for name, kind in (("dataset.json", "finished"), ("unfinished.json", "unfinished")):
                if name in there:
                    self._compare(read_json(path / name, "restore it, or choose another --out"), kind)
                    break
            else:
                if any(not is_temporary(path / name) for name in there):
                    raise UserError(f"{path} exists and is not a dataset of ours; choose another --out")
                write_json(self._unfinished, asdict(card))
            sweep(path)
            if "steps.parquet" not in there:
                with atomic_write(path / "steps.parquet") as file:
                    pq.write_table(steps.to_table(), file)

    def _compare(self, there: dict[str, Any], kind: str) -> None:
        for name, value in asdict(self.card).items():
            if value not in ([], "") and there.get(name) != value:
                raise UserError(
                    f"{self.path} is a {kind} dataset with {name} {there.get(name)!r}, not {value!r}; "
                    "use the same settings, or choose another --out"
                )

    def shard_frames(self, shard: int) -> range:
        """Which frames the shard holds."""
        return shard_range(shard, self.card.frames, self.card.frames_per_shard)

    def pending(self) -> list[int]:
        """The shards that are not yet written."""
        count = -(-self.card.frames // self.card.frames_per_shard)
        with cannot_write(self.path):
            there = set(names_in(self.path, "frames-"))
        return [shard for shard in range(count) if shard_name(shard) not in there]

    def finish(self) -> DatasetCard:
        """Record the shards and write `dataset.json`; where that is done, compare the shards with their records.

        Raises:
            UserError: a shard is missing, or differs from its record.
        """
        if missing := self.pending():
            raise UserError(
                f"{self.path} lacks {len(missing)} shards, the first is {shard_name(missing[0])}; collect again"
            )
        with cannot_write(self.path):
            return self._finish()

    def _finish(self) -> DatasetCard:
        if exists(self.path / "dataset.json"):
            remove(self._unfinished)
            dataset = FrameDataset.open(self.path)
            for shard, record in enumerate(dataset.card.shards):
                if sha256_of(self.path / shard_name(shard)) != record["sha256"]:
                    raise UserError(
                        f"{self.path / shard_name(shard)} differs from its checksum; move it away, then run the same command again"
                    )
            return dataset.card
        shards: list[ShardRecord] = []
        for shard in range(-(-self.card.frames // self.card.frames_per_shard)):
            tar, frames = self.path / shard_name(shard), len(self.shard_frames(shard))
            shards.append({"name": tar.name, "frames": frames, "bytes": size_of(tar), "sha256": sha256_of(tar)})
        steps_sha256 = self.steps.sha256()
        values = asdict(self.card) | {"shards": shards, "steps_sha256": steps_sha256}
        card = DatasetCard(**values | {"fingerprint": fingerprint(steps_sha256, shards)})
        write_json(self.path / "dataset.json", asdict(card))
        remove(self._unfinished)
        return card


class FrameDataset:
    """A finished frame dataset, read defensively: counts, keys, sizes and checksums are compared with `dataset.json`."""

    def __init__(self, path: AnyPath, card: DatasetCard, steps: Steps) -> None:
        """Use `FrameDataset.open`."""
        self.path, self.card, self.steps = path, card, steps

    @classmethod
    def open(cls, path: str | AnyPath) -> FrameDataset:
        """Open the dataset in a folder, or at a URL.

        Raises:
            UserError: it is missing, unfinished or damaged.
        """
        path = as_path(path)
        hint = "make a dataset with: " + command("wmcache", "collect", "--out", path)
        try:
            if exists(path / "unfinished.json"):
                raise UserError(f"{path} is an unfinished dataset; finish it by running its wmcache collect again")
        except OSError as error:
            raise unreadable(path, error) from error
        try:
            values = read_json(path / "dataset.json", hint)
        except MissingError:
            raise no_dataset(path) from None
        card = parse(DatasetCard, values, path / "dataset.json", hint)
        if card.format_version != FORMAT_VERSION:
            raise UserError(
                f"{path} has format {card.format_version}, this wmcache reads {FORMAT_VERSION}; collect into another --out"
            )
        if reason := _absurdity(card):
            raise UserError(f"{path / 'dataset.json'} is damaged ({reason}); {hint}")
        steps = read_steps(path, card.frames)
        if steps.sha256() != card.steps_sha256 or not steps.in_order():
            raise UserError(f"{path / 'steps.parquet'} does not match dataset.json; {hint}")
        return cls(path, card, steps)

    @property
    def num_shards(self) -> int:
        """Number of tar shards."""
        return len(self.card.shards)

    def shard_frames(self, shard: int) -> range:
        """Which frames the shard holds."""
        return shard_range(shard, self.card.frames, self.card.frames_per_shard)

    def read_shard(self, shard: int) -> Frames:
        """All frames of a shard, uint8 [frames, image_size, image_size, 3], decoded from memory.

        Raises:
            UserError: the tar is missing or differs from its record in any way: checksum, count, order, image size.
        """
        tar = self.path / shard_name(shard)
        expected = self.shard_frames(shard)
        size = self.card.image_size
        needed, there = len(expected) * size * size * 3, available_ram()
        if needed > there:
            raise UserError(
                f"the {len(expected)} frames of {tar} need {human_bytes(needed)} of memory, {human_bytes(there)} are free; "
                "free some, or collect with a smaller --frames-per-shard"
            )
        most = 2 * size * size * 3 + 2**20  # PNG hardly ever grows
        try:
            if size_of(tar) > len(expected) * (most + 2048) + 20480:
                raise UserError(f"{tar} is larger than its frames can be; restore it or collect again")
            data = read_bytes(tar)
        except OSError as error:
            if is_local(tar) and error.errno in MISSING:
                raise UserError(f"{tar} does not exist; restore it or collect again") from error
            raise unreadable(tar, error) from error
        if hashlib.sha256(data).hexdigest() != self.card.shards[shard]["sha256"]:
            raise UserError(f"{tar} differs from its checksum in dataset.json; restore it or collect again")
        members: list[tuple[str, bytes]] = []
        for name, png in _members(tar, data, most):
            count = len(members)
            if count == len(expected) or name != f"{self.steps.key(expected[count])}.png":
                raise UserError(
                    f"{tar}: member {name[:80]!r} is not the expected frame {count}; restore it or collect again"
                )
            members.append((name, png))
        if len(members) != len(expected):
            raise UserError(
                f"{tar} holds {len(members)} frames instead of {len(expected)}; restore it or collect again"
            )
        frames = np.empty((len(expected), size, size, 3), np.uint8)

        def decode(row: int) -> None:
            name, png = members[row]
            frames[row] = decode_png(png, size, f"{tar}: {name}")

        # Pillow decodes without the interpreter's lock.
        with ThreadPoolExecutor(DECODERS) as pool:
            for _ in pool.map(decode, range(len(members))):
                pass
        return frames

    def read_frames(self, frames: Iterable[int]) -> Frames:
        """Some frames, uint8 [len(frames), image_size, image_size, 3], in the given order; reads each shard once."""
        wanted = np.fromiter(frames, dtype=np.int64)
        size = self.card.image_size
        out = np.empty((len(wanted), size, size, 3), np.uint8)
        shard_of = wanted // self.card.frames_per_shard
        for shard in np.unique(shard_of):
            here = np.flatnonzero(shard_of == shard)
            out[here] = self.read_shard(int(shard))[wanted[here] - self.shard_frames(int(shard)).start]
        return out


def no_dataset(path: AnyPath) -> MissingError:
    """The error of a dataset that is missing."""
    make = "make a dataset with: " + command("wmcache", "collect", "--out", path)
    return MissingError(f"{path / 'dataset.json'} does not exist; {did_you_mean(path, 'dataset', make)}")


def is_complete(path: AnyPath) -> bool:
    """Whether a dataset is finished, with all its shards: there is nothing to collect or import into it."""
    try:
        there = set(names_in(path))
        card = FrameDataset.open(path).card
    except (UserError, OSError):
        return False
    return {record["name"] for record in card.shards} <= there


def fingerprint(steps_sha256: str, shards: list[ShardRecord]) -> str:
    """Of a dataset: SHA-256 over the checksums of its parts."""
    known = json.dumps([FORMAT_VERSION, steps_sha256, [record["sha256"] for record in shards]])
    return hashlib.sha256(known.encode()).hexdigest()


def _absurdity(card: DatasetCard) -> str | None:
    """What cannot be true in a card that may be anybody's, before anything is allocated by its numbers."""
    if card.name in (".", ".."):
        return "a name that leads elsewhere"
    if len(card.shards) != -(-card.frames // card.frames_per_shard):
        return f"{len(card.shards)} shards for {card.frames} frames"
    for shard, record in enumerate(card.shards):
        frames = len(shard_range(shard, card.frames, card.frames_per_shard))
        if (record["name"], record["frames"]) != (shard_name(shard), frames):
            return f"another record in the place of {shard_name(shard)}"
    return None if fingerprint(card.steps_sha256, card.shards) == card.fingerprint else "another fingerprint"


def read_steps(path: AnyPath, frames: int | None = None) -> Steps:
    """The step table of the dataset in a folder.

    Raises:
        UserError: it is missing or damaged, or has not as many rows as there are `frames`.
    """
    try:
        with open_to_read(path / "steps.parquet") as file:
            table = pq.ParquetFile(file)
            if frames not in (None, rows := table.metadata.num_rows):
                raise UserError(
                    f"{path / 'steps.parquet'} has {rows} rows for {frames} frames; restore it, or make the dataset under another --out"
                )
            return Steps.from_table(table.read())
    except (OSError, KeyError, ValueError, TypeError, AttributeError, MemoryError, pa.ArrowException) as error:
        if outside := cause_outside(error):
            raise unreadable(path / "steps.parquet", outside) from error
        reason = " ".join(repr(str(error)[:160])[1:-1].split())
        raise UserError(
            f"{path / 'steps.parquet'} cannot be read ({reason}); restore it, or make the dataset under another --out"
        ) from error


def shard_name(shard: int) -> str:
    """`frames-000012.tar`."""
    return f"frames-{shard:06d}.tar"


def shard_range(shard: int, frames: int, frames_per_shard: int) -> range:
    """The global frame numbers of a shard."""
    return range(shard * frames_per_shard, min(frames, (shard + 1) * frames_per_shard))


def write_shard(path: AnyPath, shard: int, samples: Iterable[tuple[str, Frames]]) -> None:
    """Write one tar shard atomically; the same samples give the same bytes."""
    with (
        atomic_write(path / shard_name(shard)) as file,
        webdataset.TarWriter(file, encoder=False, user="wmcache", group="wmcache", mtime=0) as tar,
    ):
        for key, frame in samples:
            tar.write({"__key__": key, "png": encode_png(frame)})


def encode_png(frame: Frames) -> bytes:
    """Lossless; level 1 costs a few per cent of size on these frames and halves the time."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def decode_png(data: bytes, size: int, where: str) -> Frames:
    """A square RGB frame, decoded only after its declared size and mode are those expected.

    Raises:
        UserError: it is no such PNG; `where` names it.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=["PNG"])
        if image.size != (size, size) or image.mode != "RGB":
            raise UserError(
                f"{where} is {image.size} {image.mode}, not ({size}, {size}) RGB; restore it, or make the dataset under another --out"
            )
        return np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{where} is no readable PNG ({error}); restore it, or make the dataset under another --out"
        ) from error


def _members(tar: AnyPath, data: bytes, most: int) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of a tar's members: plain files of at most so many bytes each, nothing unpacked, nothing followed."""
    hint = "restore it or collect again"
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for member in archive:
                if not member.isreg() or member.issparse() or member.size > most:
                    raise UserError(f"{tar}: member {member.name[:80]!r} is no frame; {hint}")
                file = archive.extractfile(member)
                yield member.name, file.read() if file else b""
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise UserError(f"{tar} is a damaged tar file ({' '.join(str(error).split())[:160]}); {hint}") from error
