"""Comparing a store with its checksums, without an encoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from wmcache.cache.arrays import check_columns, is_mappable, open_group, open_tokens, read_column
from wmcache.cache.identity import Identity
from wmcache.cache.layout import DamagedError, StoreCard, read_attributes, read_card, shard_file, shard_number
from wmcache.cache.reader import MappedReader
from wmcache.cache.records import IN_A_BLOCK, Records, commits, record_file
from wmcache.common.errors import UnreadableError, UserError
from wmcache.common.files import sha256_of
from wmcache.common.paths import MISSING, AnyPath, is_local, names_in, readable, size_of, unreadable
from wmcache.common.progress import seconds_between_updates


@dataclass(frozen=True)
class Fault:
    """Something that differs from what was written; `shard` has to be done again, None for the store's metadata."""

    file: str
    reason: str
    shard: int | None = None


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        leftovers: files of writers that died, or of other programs. They do no harm.
        drift: how far the tokens are from encoding a sample of frames again; None where that was not asked for.
    """

    path: str
    complete: bool
    shards: int
    shards_done: int
    frames: int
    faults: list[Fault]
    leftovers: list[str] = field(default_factory=list)
    drift: dict[str, float] | None = None

    @property
    def sound(self) -> bool:
        """Whether the store can be trained on."""
        return self.complete and not self.faults


def verify(path: AnyPath) -> Verification:
    """Compare the whole store with its records: metadata, columns, counts, sizes, and every byte of every shard.

    A missing shard of an incomplete store is not a fault. Raise UserError where there is no store, or one that the system cannot read.
    """
    try:
        attributes = read_attributes(path)
        card, identity = read_card(attributes), Identity.from_json(attributes["identity"], str(path))
    except DamagedError as error:
        return Verification(str(path), False, 0, 0, 0, [Fault(str(path / "zarr.json"), str(error))])
    complete = bool(attributes["complete"])
    faults, mappable = [], False
    try:
        group = open_group(path)
        mappable = is_mappable(open_tokens(group, card, attributes, path), card) and is_local(path)
        check_columns(group, card, attributes["columns"], path, thorough=True)
    except DamagedError as error:
        faults.append(Fault(str(path), str(error)))
    done, declared, records = 0, declared_shards(path), Records(path, card, identity)
    with readable(path):
        recorded, others = records.recorded() >= 0, [str(file) for file in leftovers(path, card)]
    with tqdm(total=card.frames, desc="verify", unit=" frames", mininterval=seconds_between_updates()) as bar:
        for shard in range(card.num_shards):
            if complete or recorded[shard]:
                expected = None if declared is None else declared[shard].tobytes().hex()
                found = _check_shard(records, shard, card, expected, mappable=mappable)
                faults += found
                done += not found
            bar.update(len(card.shard_frames(shard)))
    return Verification(str(path), complete, card.num_shards, done, card.frames, faults, others)


def declared_shards(path: AnyPath) -> NDArray[np.uint8] | None:
    """Return the checksums, uint8 [shards, 32], that a store was declared complete with; None where it is not, or has lost them."""
    try:
        attributes = read_attributes(path)
        if attributes["complete"]:
            return read_column(open_group(path), read_card(attributes), "sha256", attributes["columns"], path)
    except DamagedError:
        pass
    return None


def _check_shard(records: Records, shard: int, card: StoreCard, declared: str | None, *, mappable: bool) -> list[Fault]:
    path, file = records.path, shard_file(records.path, shard)
    try:
        record = records.read(shard)
    except UnreadableError:
        raise
    except UserError as error:
        return [Fault(str(record_file(path, shard)), str(error), shard)]
    try:
        size = size_of(file)
        sha256 = sha256_of(file) if size == record.bytes else ""
    except OSError as error:
        if error.errno not in MISSING:
            raise unreadable(file, error) from error
        return [Fault(str(file), "it does not exist", shard)]
    if size != record.bytes:
        return [Fault(str(file), f"it has {size} bytes instead of {record.bytes}", shard)]
    if sha256 == record.sha256 and declared in (None, sha256):
        return []
    return [
        Fault(str(file), f"it differs from its checksum{_bad_frames(path, shard, card) if mappable else ''}", shard)
    ]


def _bad_frames(path: AnyPath, shard: int, card: StoreCard) -> str:
    try:
        bad = MappedReader(path, card).scan(shard)[1]
    except UnreadableError:
        raise
    except UserError as error:
        return f": {error}"
    return f", in frames {', '.join(map(str, bad))}" if bad else ""


def whole_tokens(path: AnyPath, shard: int, card: StoreCard) -> NDArray[np.float16] | None:
    """Return a local float16 shard's tokens if every frame matches its own checksum and is finite; else None."""
    if card.dtype != "float16" or not is_local(path):
        return None  # the scales of int8 are in the lost record
    try:
        tokens, bad = MappedReader(path, card).scan(shard)
    except UnreadableError:
        raise
    except UserError:
        return None
    return None if bad or not np.isfinite(tokens).all() else tokens


def leftovers(path: AnyPath, card: StoreCard) -> Iterator[AnyPath]:
    """Yield the files in a store that are not part of it, or are no longer needed."""
    blocks = card.num_shards // IN_A_BLOCK
    for name in names_in(commits(path)):
        number, dot, suffix = name.removeprefix("block-").partition(".")
        expected = (f"{number}.json", card.num_shards) if suffix == "json" else (f"block-{number}.safetensors", blocks)
        if not dot or not number.isdecimal() or name != expected[0] or int(number) >= expected[1]:
            yield commits(path) / name
    for name in names_in(path / "tokens"):
        if name not in ("zarr.json", "commits") and shard_number(name, card.num_shards) is None:
            yield path / "tokens" / name
