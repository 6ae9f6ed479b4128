"""Which shards of a store are done: a record for each, written after the shard, and a block for every thousand of them.

    tokens/commits/000012.json              the record of a shard, sealed
    tokens/commits/000012.lock              while somebody works on that shard
    tokens/commits/block-000003.safetensors the records of shards 3000 to 3999, once all of them are done

Whoever finishes the last shard of a thousand folds their records into a block and deletes them: a store of a million shards is known by
a thousand files. A record beside a block is younger than it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields

import google_crc32c
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from wmcache.cache.identity import Identity
from wmcache.cache.layout import StoreCard
from wmcache.common.errors import MissingError, UnreadableError, UserError, command
from wmcache.common.files import atomic_write, exclusive, read_json, require_seal, seal, write_json
from wmcache.common.paths import (
    MISSING,
    AnyPath,
    is_local,
    names_in,
    read_bytes,
    remove,
    remove_files,
    stamp,
    unreadable,
)
from wmcache.common.schema import Count, Finite, parse

IN_A_BLOCK = 1000
"""Shards: those whose numbers differ in the last three digits only."""
FETCHES = 16
"""Records that are asked of an object store at once."""


@dataclass(frozen=True)
class Record:
    """That a shard is done, written after the shard itself.

    Attributes:
        frames: the first, and the one after the last.
        bytes, sha256: of the shard's file.
        identity: digest of the identity that it was made with.
        sum, sum_of_squares: of each channel over the shard's tokens, for the statistics.
        scale, middle: int8 stores: token = scale * stored + middle, for each channel.
        tag: what the object store answered when the file was written, see `Found`.
    """

    frames: tuple[int, int]
    bytes: Count
    sha256: str
    identity: str
    sum: list[Finite]
    sum_of_squares: list[Finite]
    scale: list[Finite] | None = None
    middle: list[Finite] | None = None
    tag: str | None = None


@dataclass(frozen=True)
class Block:
    """The records of some shards, a row each, by ascending number.

    Attributes:
        shard, bytes: int64 [n].
        sha256: uint8 [n, 32]. tag: uint8 [n, 16]; 0 where there is none.
        sum, sum_of_squares: float64 [n, D].
        scale, middle: float32 [n, D]; without columns, [n, 0], where the store is not int8.
    """

    shard: NDArray[np.int64]
    bytes: NDArray[np.int64]
    sha256: NDArray[np.uint8]
    tag: NDArray[np.uint8]
    sum: NDArray[np.float64]
    sum_of_squares: NDArray[np.float64]
    scale: NDArray[np.float32]
    middle: NDArray[np.float32]

    @classmethod
    def of(cls, rows: Mapping[int, Record]) -> Block:
        """The block of these records."""
        shards = sorted(rows)
        records = [rows[shard] for shard in shards]
        count = len(records)
        return cls(
            shard=np.array(shards, np.int64),
            bytes=np.array([record.bytes for record in records], np.int64),
            sha256=_digits([record.sha256 for record in records], 32),
            tag=_digits([record.tag or "0" * 32 for record in records], 16),
            sum=np.array([record.sum for record in records], np.float64),
            sum_of_squares=np.array([record.sum_of_squares for record in records], np.float64),
            scale=np.array([record.scale or [] for record in records], np.float32).reshape(count, -1),
            middle=np.array([record.middle or [] for record in records], np.float32).reshape(count, -1),
        )

    def row(self, shard: int, card: StoreCard, identity: Identity) -> Record | None:
        """The record of a shard, if it is one of these."""
        if not len(found := np.flatnonzero(self.shard == shard)):
            return None
        row, frames, is_int8 = int(found[0]), card.shard_frames(shard), card.dtype == "int8"
        return Record(
            frames=(frames.start, frames.stop),
            bytes=int(self.bytes[row]),
            sha256=self.sha256[row].tobytes().hex(),
            identity=identity.digest(),
            sum=self.sum[row].tolist(),
            sum_of_squares=self.sum_of_squares[row].tolist(),
            scale=self.scale[row].tolist() if is_int8 else None,
            middle=self.middle[row].tolist() if is_int8 else None,
            tag=self.tag[row].tobytes().hex() if self.tag[row].any() else None,
        )

    def take(self, rows: NDArray[np.bool_]) -> Block:
        """Some of its rows."""
        return Block(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def commits(path: AnyPath) -> AnyPath:
    """The folder of a store's records and locks."""
    return path / "tokens" / "commits"


def record_file(path: AnyPath, shard: int) -> AnyPath:
    """Where the record of a shard is, until it is folded into a block."""
    return commits(path) / f"{shard:06d}.json"


def lock_file(path: AnyPath, shard: int) -> AnyPath:
    """The lock of whoever works on a shard."""
    return record_file(path, shard).with_suffix(".lock")


def block_file(path: AnyPath, shard: int) -> AnyPath:
    """Where the record of a shard is once it is folded."""
    return commits(path) / f"block-{shard // IN_A_BLOCK:06d}.safetensors"


class Records:
    """The records of a store."""

    def __init__(self, path: AnyPath, card: StoreCard, identity: Identity) -> None:
        """Args: the store's folder, card and identity."""
        self.path, self._card, self._identity = path, card, identity
        self._mend = f"hint it with: {command('wmcache', 'repair', path)}"
        self._last: tuple[str, object, Block] | None = None

    def read(self, shard: int) -> Record:
        """The record of a shard.

        Raises:
            UserError: it is missing, damaged, or of another shard or identity.
        """
        file = record_file(self.path, shard)
        try:
            return self._read_json(shard)
        except FileNotFoundError:
            pass
        try:
            found = self._read_block(shard).row(shard, self._card, self._identity)
        except FileNotFoundError:
            found = None
        if found is None:
            raise UserError(f"{file} does not exist; {self._mend}")
        return found

    def write(self, shard: int, record: Record) -> None:
        """Write one, whole or not at all, and fold its thousand if it was the last; raises UserError, or OSError."""
        write_json(record_file(self.path, shard), seal(asdict(record)))
        self.fold(shard)

    def drop(self, shard: int) -> None:
        """Forget that a shard is done; raises OSError, or UserError."""
        remove(record_file(self.path, shard))
        with self._folding(shard):
            block = self._block_or_none(shard)
            if block is None or not (block.shard == shard).any():
                return
            if len(block.shard) == 1:
                remove(block_file(self.path, shard))
            else:
                self.write_block(block.take(block.shard != shard))

    def fold(self, shard: int) -> None:
        """Fold the records of a shard's thousand into a block, if all of them are there; raises UserError, or OSError."""
        first = shard // IN_A_BLOCK * IN_A_BLOCK
        wanted = range(first, first + IN_A_BLOCK)
        # A store that small, or the end of a larger one, is easier to look at as it is.
        if wanted.stop > self._card.num_shards or not self._can_fold(wanted):
            return
        with self._folding(shard):
            if not self._can_fold(wanted):
                return  # somebody else was faster
            rows = {number: record for number, record in self._read_all(wanted) if isinstance(record, Record)}
            if len(rows) < IN_A_BLOCK:
                return  # one is unsound: whoever does that shard again folds them
            self.write_block(Block.of(rows))
            remove_files([record_file(self.path, number) for number in wanted])

    def _can_fold(self, wanted: range) -> bool:
        """Whether there are records beside the block, and with those in it they are all."""
        alone = set(self._alone(wanted.start)) & set(wanted)
        if len(alone) in (0, len(wanted)):
            return bool(alone)
        block = self._block_or_none(wanted.start)  # since it was written some were done again, or its writer was killed
        return block is not None and alone | set(block.shard.tolist()) == set(wanted)

    def write_block(self, block: Block) -> None:
        """Write a thousand's records, whole or not at all; raises UserError."""
        identity = np.frombuffer(bytes.fromhex(self._identity.digest()), np.uint8)
        tensors = {field.name: np.ascontiguousarray(getattr(block, field.name)) for field in fields(block)}
        tensors |= {"identity": identity, "checksum": np.array([_crc(block, identity)], np.int64)}
        with atomic_write(block_file(self.path, int(block.shard[0]))) as file:
            file.write(save_tensors(tensors))

    def recorded(self) -> NDArray[np.int64]:
        """Bytes of each shard's file, by the records that are sound; -1 where there is none. int64 [shards]."""
        found = np.full(self._card.num_shards, -1, np.int64)
        alone = self._alone()
        for block in self._blocks():
            found[block.shard] = block.bytes
        for shard, record in self._read_all(alone):
            found[shard] = -1 if isinstance(record, UserError) else record.bytes
        return found

    def _read_all(self, shards: Iterable[int]) -> Iterator[tuple[int, Record | UserError]]:
        """As `read`, wherever they are by now, for they may be folded meanwhile; from an object store several at once."""

        def read(shard: int) -> tuple[int, Record | UserError]:
            try:
                return shard, self.read(shard)
            except UnreadableError:
                raise  # a record that cannot be read is not one that is missing
            except UserError as error:
                return shard, error

        if is_local(self.path):
            yield from map(read, shards)
        else:
            with ThreadPoolExecutor(FETCHES, thread_name_prefix="records") as pool:
                yield from pool.map(read, shards)

    def count(self) -> int:
        """How many shards have a record, by the names of the files; what was dropped from a block counts until it is done again."""
        known = np.zeros(self._card.num_shards, np.bool_)
        known[self._alone()] = True
        for first in self._block_starts():
            known[first : first + IN_A_BLOCK] = True
        return int(known.sum())

    def thousands(self) -> Iterator[Block]:
        """All records, a thousand at a time, folded where a kill prevented that; raises UserError where one is missing or unsound."""
        for first in range(0, self._card.num_shards, IN_A_BLOCK):
            wanted = range(first, min(first + IN_A_BLOCK, self._card.num_shards))
            self.fold(first)
            block = self._block_or_none(first)
            if block is None or len(block.shard) < len(wanted):
                found = dict(self._read_all(wanted))
                for record in found.values():
                    if isinstance(record, UserError):
                        raise record
                block = Block.of({shard: record for shard, record in found.items() if isinstance(record, Record)})
            yield block

    def claimed(self) -> list[int]:
        """The shards that have a lock file: somebody is at them, or died there."""
        return self._numbers(".lock")

    def _alone(self, first: int | None = None) -> list[int]:
        """The shards that have a record of their own; of a thousand, or of all."""
        return self._numbers(".json", "" if first is None else f"{first:06d}"[: -len(str(IN_A_BLOCK - 1))])

    def _numbers(self, suffix: str, prefix: str = "") -> list[int]:
        names = (name.removesuffix(suffix) for name in names_in(commits(self.path), prefix) if name.endswith(suffix))
        return [number for name in names if name.isdecimal() and (number := int(name)) < self._card.num_shards]

    def _folding(self, shard: int) -> AbstractContextManager[bool]:
        return exclusive(block_file(self.path, shard).with_suffix(".lock"), self.path)

    def _read_json(self, shard: int) -> Record:
        """A shard's own record; raises FileNotFoundError where it has none, else as `read`."""
        file = record_file(self.path, shard)
        try:
            values = require_seal(read_json(file, self._mend), file, self._mend)
        except MissingError as error:
            raise FileNotFoundError(str(file)) from error
        known = {name: value for name, value in values.items() if name != "checksum"}
        record = parse(Record, known, file, self._mend)
        lists = [record.sum, record.sum_of_squares]
        lists += [record.scale or [], record.middle or []] * (self._card.dtype == "int8")
        if any(len(values) != self._card.token_dim for values in lists):
            raise UserError(f"{file} has statistics of another length; {self._mend}")
        frames = self._card.shard_frames(shard)
        if record.identity != self._identity.digest() or record.frames != (frames.start, frames.stop):
            raise UserError(f"{file} is the record of another shard or store; {self._mend}")
        return record

    def _blocks(self) -> Iterator[Block]:
        """The blocks that are sound."""
        for first in self._block_starts():
            block = self._block_or_none(first)
            if block is not None:
                yield block

    def _block_starts(self) -> Iterator[int]:
        for name in names_in(commits(self.path), "block-"):
            number = name.removeprefix("block-").removesuffix(".safetensors")
            if number.isdecimal() and (first := int(number) * IN_A_BLOCK) < self._card.num_shards:
                yield first

    def _block_or_none(self, shard: int) -> Block | None:
        try:
            return self._read_block(shard)
        except UnreadableError:
            raise
        except (FileNotFoundError, UserError):
            return None

    def _read_block(self, shard: int) -> Block:
        """Raises FileNotFoundError where there is none, UserError where it is unsound."""
        file = block_file(self.path, shard)
        try:
            now = stamp(file)
            if self._last is not None and self._last[:2] == (file.name, now):
                return self._last[2]
            data = read_bytes(file)
        except OSError as error:
            if error.errno in MISSING:
                raise FileNotFoundError(str(file)) from error
            raise unreadable(file, error) from error
        try:
            tensors = load_tensors(data)
            checksum, identity = tensors.pop("checksum"), tensors.pop("identity")
            block = Block(**tensors)
            _require(checksum.tolist() == [_crc(block, identity)], "it differs from its checksum")
            _require(identity.tobytes().hex() == self._identity.digest(), "it is another store's")
            first = shard // IN_A_BLOCK * IN_A_BLOCK
            width, count = self._card.token_dim, len(block.shard)
            scales = width if self._card.dtype == "int8" else 0
            shapes = [(count,), (count,), (count, 32), (count, 16), *[(count, width)] * 2, *[(count, scales)] * 2]
            _require([getattr(block, field.name).shape for field in fields(block)] == shapes, "its shapes are others")
            kinds = [np.int64, np.int64, np.uint8, np.uint8, np.float64, np.float64, np.float32, np.float32]
            _require([getattr(block, field.name).dtype for field in fields(block)] == kinds, "its types are others")
            in_order = (np.diff(block.shard) > 0).all()
            last = min(first + IN_A_BLOCK, self._card.num_shards)
            within = count == 0 or (block.shard[0] >= first and block.shard[-1] < last)
            _require(bool(in_order and within), "its shards are others")
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file} is damaged ({' '.join(str(error).split())[:160]}); {self._mend}") from error
        self._last = file.name, now, block
        return block


def _crc(block: Block, identity: NDArray[np.uint8]) -> int:
    crc = google_crc32c.value(identity.tobytes())
    for field in fields(block):
        crc = google_crc32c.extend(crc, np.ascontiguousarray(getattr(block, field.name)).tobytes())
    return int(crc)


def _digits(hexadecimal: list[str], width: int) -> NDArray[np.uint8]:
    return np.frombuffer(bytes.fromhex("".join(hexadecimal)), np.uint8).reshape(-1, width)


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise ValueError(reason)
