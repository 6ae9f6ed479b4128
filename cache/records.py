"""Which shards of a store are done: a record for each, written after the shard, and a block for every thousand of them.

    tokens/commits/000012.json              the record of a shard, sealed
    tokens/commits/000012.lock              while a process works on that shard
    tokens/commits/block-000003.safetensors the records of shards 3000 to 3999, once all of them are done

A record beside a block is newer than the block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from wmcache.cache.identity import Identity
from wmcache.cache.layout import StoreCard
from wmcache.common.errors import MissingError, UnreadableError, UserError, command, reason
from wmcache.common.files import write_whole
from wmcache.common.jsonfiles import read_json, require_seal, seal, write_json
from wmcache.common.locks import exclusive
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
"""Shards whose numbers differ in the last three digits only."""
FETCHES = 16
"""Records that are fetched from an object store at once."""


@dataclass(frozen=True)
class Record:
    """A shard that is done.

    Attributes:
        frames: the first, and the one after the last.
        bytes, sha256, tag: of the shard's file; see `Found`.
        identity: digest of the store's.
        sum, sum_of_squares: of each channel over the shard's tokens.
        scale, middle: of each channel in an int8 store, see `quantise`.
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


NUMBERS = {
    "bytes": np.int64,
    "sum": np.float64,
    "sum_of_squares": np.float64,
    "scale": np.float32,
    "middle": np.float32,
}
"""Numbers of a record -> dtype of their column in a block."""


@dataclass(frozen=True)
class Block:
    """The records of some shards, a row for each, in ascending order.

    Attributes:
        sha256: [n, 32]. tag: [n, 16]; 0 where there is none.
        scale, middle: [n, D] as the sums; [n, 0] where the store is not int8.
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
        """Return the block of these records."""
        shards = sorted(rows)
        records = [rows[shard] for shard in shards]
        numbers: dict[str, Any] = {
            name: np.array([getattr(record, name) or [] for record in records], dtype)
            for name, dtype in NUMBERS.items()
        }
        digits = ("".join(record.sha256 for record in records), "".join(record.tag or "0" * 32 for record in records))
        sha256, tag = (np.frombuffer(bytes.fromhex(text), np.uint8).reshape(len(records), -1) for text in digits)
        return cls(shard=np.array(shards, np.int64), sha256=sha256, tag=tag, **numbers)

    def row(self, shard: int, card: StoreCard, identity: Identity) -> Record | None:
        """Return the record of a shard, if it is one of these."""
        if not len(found := np.flatnonzero(self.shard == shard)):
            return None
        row, frames = int(found[0]), card.shard_frames(shard)
        numbers: dict[str, Any] = {name: getattr(self, name)[row].tolist() or None for name in NUMBERS}
        return Record(
            frames=(frames.start, frames.stop),
            identity=identity.digest(),
            sha256=self.sha256[row].tobytes().hex(),
            tag=self.tag[row].tobytes().hex() if self.tag[row].any() else None,
            **numbers,
        )

    def take(self, rows: NDArray[np.bool_]) -> Block:
        """Return some of the rows."""
        return Block(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def _unpack(data: bytes, identity: Identity, shards: range) -> Block:
    """Read what `Records.write_block` wrote for some of these shards; raise ValueError, or a library's error, for anything else."""
    tensors = load_tensors(data)
    checksum, digest = tensors.pop("checksum"), tensors.pop("identity")
    block = Block(**tensors)
    is_whole = checksum.tolist() == [_crc(block, digest)]
    if not is_whole or digest.tobytes().hex() != identity.digest() or not set(block.shard.tolist()) <= set(shards):
        raise ValueError("it differs from its checksum, or is of another store or other shards")
    return block


def _crc(block: Block, identity: NDArray[np.uint8]) -> int:
    crc = google_crc32c.value(identity.tobytes())
    for field in fields(block):
        crc = google_crc32c.extend(crc, np.ascontiguousarray(getattr(block, field.name)).tobytes())
    return int(crc)


def commits(path: AnyPath) -> AnyPath:
    """Return the folder of a store's records and locks."""
    return path / "tokens" / "commits"


def record_file(path: AnyPath, shard: int) -> AnyPath:
    """Return where the record of a shard is until it is folded into a block."""
    return commits(path) / f"{shard:06d}.json"


def lock_file(path: AnyPath, shard: int) -> AnyPath:
    """Return the lock of the process that works on a shard."""
    return record_file(path, shard).with_suffix(".lock")


def block_file(path: AnyPath, shard: int) -> AnyPath:
    """Return where the record of a shard is once it is folded."""
    return commits(path) / f"block-{shard // IN_A_BLOCK:06d}.safetensors"


class Records:
    """The records of a store. Methods that read or write also raise OSError, or UnreadableError where a record cannot be read."""

    def __init__(self, path: AnyPath, card: StoreCard, identity: Identity) -> None:
        """Read nothing yet."""
        self.path, self._card, self._identity = path, card, identity
        self._hint = f"repair it with: {command('wmcache', 'repair', path)}"
        self._last: tuple[str, object, Block] | None = None

    def read(self, shard: int) -> Record:
        """Return the record of a shard; raise UserError where it is missing, damaged, or of another shard or identity."""
        try:
            return self._read_json(shard)
        except MissingError:
            block = self._read_block(shard)
            if block is None or (found := block.row(shard, self._card, self._identity)) is None:
                raise
            return found

    def write(self, shard: int, record: Record) -> None:
        """Write one, and fold its thousand if it was the last."""
        write_json(record_file(self.path, shard), seal(asdict(record)))
        self.fold(shard)

    def drop(self, shard: int) -> None:
        """Delete the record of a shard, if there is one."""
        remove(record_file(self.path, shard))
        with self._folding(shard):
            block = self._sound_block(shard)
            if block is None or not (block.shard == shard).any():
                return
            if len(block.shard) == 1:
                remove(block_file(self.path, shard))
            else:
                self.write_block(block.take(block.shard != shard))

    def fold(self, shard: int) -> None:
        """Fold the records of a shard's thousand into a block, if all of them exist."""
        wanted = self._thousand(shard)
        # Small stores, and the end of a larger one, keep readable records.
        if len(wanted) < IN_A_BLOCK or not self._can_fold(wanted):
            return
        with self._folding(shard):
            if not self._can_fold(wanted):
                return  # another process was faster
            rows = {number: record for number, record in self._read_all(wanted) if record is not None}
            if len(rows) == IN_A_BLOCK:  # else one is damaged: the process that does that shard again folds them
                self.write_block(Block.of(rows))
                remove_files([record_file(self.path, number) for number in wanted])

    def _can_fold(self, wanted: range) -> bool:
        # Whether there are records beside the block, and all of a thousand with those in it.
        single = set(self._single(wanted.start)) & set(wanted)
        if len(single) in (0, len(wanted)):
            return bool(single)
        block = self._sound_block(wanted.start)  # some shards were done again, or its writer was killed
        return block is not None and single | set(block.shard.tolist()) == set(wanted)

    def write_block(self, block: Block) -> None:
        """Write a thousand's records."""
        digest = np.frombuffer(bytes.fromhex(self._identity.digest()), np.uint8)
        tensors = {field.name: np.ascontiguousarray(getattr(block, field.name)) for field in fields(block)}
        tensors |= {"identity": digest, "checksum": np.array([_crc(block, digest)], np.int64)}
        write_whole(block_file(self.path, int(block.shard[0])), save_tensors(tensors))

    def recorded(self) -> NDArray[np.int64]:
        """Return the bytes of each shard's file by its record, int64 [shards]; -1 where there is none, or a damaged one."""
        found, single = np.full(self._card.num_shards, -1, np.int64), self._single()
        for first in self._block_starts():
            if (block := self._sound_block(first)) is not None:
                found[block.shard] = block.bytes
        for shard, record in self._read_all(single):
            found[shard] = -1 if record is None else record.bytes
        return found

    def count(self) -> int:
        """Return how many shards have a record, by the names of the files; shards dropped from a block count too."""
        known = np.zeros(self._card.num_shards, np.bool_)
        known[self._single()] = True
        for first in self._block_starts():
            known[first : first + IN_A_BLOCK] = True
        return int(known.sum())

    def thousands(self) -> Iterator[Block]:
        """Yield all records, a thousand at a time, folded where a kill prevented that; raise UserError where one is missing or damaged."""
        for first in range(0, self._card.num_shards, IN_A_BLOCK):
            wanted = self._thousand(first)
            self.fold(first)
            block = self._sound_block(first)
            if block is None or len(block.shard) < len(wanted):
                block = Block.of(
                    {shard: self.read(shard) if found is None else found for shard, found in self._read_all(wanted)}
                )
            yield block

    def claimed(self) -> list[int]:
        """Return the shards that have a lock file: of a process that works on them, or died there."""
        return self._numbers(".lock")

    def _read_all(self, shards: Iterable[int]) -> Iterator[tuple[int, Record | None]]:
        """Read records, from an object store several at once; None is a missing or damaged one."""

        def read(shard: int) -> tuple[int, Record | None]:
            try:
                return shard, self.read(shard)
            except UnreadableError:
                raise
            except UserError:
                return shard, None

        if is_local(self.path):
            yield from map(read, shards)
        else:
            with ThreadPoolExecutor(FETCHES, thread_name_prefix="records") as pool:
                yield from pool.map(read, shards)

    def _single(self, first: int | None = None) -> list[int]:
        """Return the shards that have a file of their own; of the thousand from `first`, or of all."""
        return self._numbers(".json", "" if first is None else f"{first:06d}"[: -len(str(IN_A_BLOCK - 1))])

    def _numbers(self, suffix: str, prefix: str = "") -> list[int]:
        names = (name.removesuffix(suffix) for name in names_in(commits(self.path), prefix) if name.endswith(suffix))
        return [number for name in names if name.isdecimal() and (number := int(name)) < self._card.num_shards]

    def _block_starts(self) -> Iterator[int]:
        for name in names_in(commits(self.path), "block-"):
            number = name.removeprefix("block-").removesuffix(".safetensors")
            if number.isdecimal() and (first := int(number) * IN_A_BLOCK) < self._card.num_shards:
                yield first

    def _thousand(self, shard: int) -> range:
        first = shard // IN_A_BLOCK * IN_A_BLOCK
        return range(first, min(first + IN_A_BLOCK, self._card.num_shards))

    def _folding(self, shard: int) -> AbstractContextManager[bool]:
        return exclusive(block_file(self.path, shard).with_suffix(".lock"), self.path)

    def _read_json(self, shard: int) -> Record:
        file, frames = record_file(self.path, shard), self._card.shard_frames(shard)
        values = require_seal(read_json(file, self._hint), file, self._hint)
        known = {name: value for name, value in values.items() if name != "checksum"}
        record = parse(Record, known, file, self._hint)
        lists = [record.sum, record.sum_of_squares]
        lists += [record.scale or [], record.middle or []] * (self._card.dtype == "int8")
        fits = all(len(values) == self._card.token_dim for values in lists)
        if not fits or (record.identity, record.frames) != (self._identity.digest(), (frames.start, frames.stop)):
            raise UserError(f"{file} is the record of another shard or store; {self._hint}")
        return record

    def _sound_block(self, shard: int) -> Block | None:
        """Return the block of a shard; None where there is none, or a damaged one."""
        try:
            return self._read_block(shard)
        except UnreadableError:
            raise
        except UserError:
            return None

    def _read_block(self, shard: int) -> Block | None:
        file = block_file(self.path, shard)
        try:
            now = stamp(file)
            if self._last is not None and self._last[:2] == (file.name, now):
                return self._last[2]
            data = read_bytes(file)
        except OSError as error:
            if error.errno in MISSING:
                return None
            raise unreadable(file, error) from error
        try:
            block = _unpack(data, self._identity, self._thousand(shard))
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file} is damaged ({reason(error)}); {self._hint}") from error
        self._last = file.name, now, block
        return block
