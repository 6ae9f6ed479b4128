"""Is a store what it says it is? Everything that can be told without an encoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from wmcache.cache.identity import Identity
from wmcache.cache.layout import (
    DamagedError,
    StoreCard,
    check_columns,
    is_mappable,
    open_group,
    open_tokens,
    read_attributes,
    read_card,
    read_column,
    shard_file,
)
from wmcache.cache.reader import MappedReader
from wmcache.cache.records import IN_A_BLOCK, Records, commits, record_file
from wmcache.cache.store import MOST_FAULTS
from wmcache.common.errors import UnreadableError, UserError
from wmcache.common.files import seconds_between_updates, sha256_of
from wmcache.common.paths import MISSING, AnyPath, names_in, size_of, unreadable


@dataclass(frozen=True)
class Fault:
    """Something that is not as it was written.

    Attributes:
        file: where.
        reason: what is wrong, for people.
        shard: which has to be done again; None where the store's description is at fault.
    """

    file: str
    reason: str
    shard: int | None = None


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        path: the store.
        complete: whether it is declared so.
        shards, shards_done, frames: how many there are, and how many of the shards have a sound record.
        faults: what has to be repaired.
        leftovers: files that belong to nobody: of writers that died, or of other tools. They do no harm.
        drift: how far the tokens are from encoding a sample of frames anew; None where that was not asked for.
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
    """Compare the whole store with its records: description, columns, counts, sizes, and every byte of every shard.

    A shard that is not done in a store that is not complete is no fault.

    Raises:
        UnreadableError: the system cannot read a file of it, so nothing is known of that file.
        UserError: there is no store at `path`.
    """
    try:
        return _verify(path)
    except OSError as error:
        raise unreadable(path, error) from error


def _verify(path: AnyPath) -> Verification:
    try:
        attributes = read_attributes(path)
        card, identity = read_card(attributes), Identity.from_json(attributes["identity"], str(path))
    except DamagedError as error:
        return Verification(str(path), False, 0, 0, 0, [Fault(str(path / "zarr.json"), str(error))])
    complete = bool(attributes["complete"])
    faults, mappable = [], False
    try:
        group = open_group(path)
        mappable = is_mappable(open_tokens(group, card, attributes, path), card)
        check_columns(group, card, attributes["columns"], path, thoroughly=True)
    except DamagedError as error:
        faults.append(Fault(str(path), " ".join(str(error).split())))
    done, declared = 0, declared_shards(path)
    records = Records(path, card, identity)
    recorded = records.recorded() >= 0
    with tqdm(total=card.frames, desc="verify", unit=" frames", mininterval=seconds_between_updates()) as bar:
        for shard in range(card.num_shards):
            if complete or recorded[shard]:
                expected = None if declared is None else declared[shard].tobytes().hex()
                found = check_shard(records, shard, card, expected, mappable=mappable)
                faults += found
                if len(faults) >= MOST_FAULTS:
                    faults.append(Fault(str(path), f"shards from {shard + 1} on were not looked at"))
                    break
                done += not found
            bar.update(len(card.shard_frames(shard)))
    return Verification(
        str(path), complete, card.num_shards, done, card.frames, faults, [str(file) for file in leftovers(path, card)]
    )


def declared_shards(path: AnyPath) -> NDArray[np.uint8] | None:
    """The checksums, uint8 [shards, 32], that a store was declared complete with; None where it is not, or has lost them."""
    try:
        attributes = read_attributes(path)
        if attributes["complete"]:
            return read_column(open_group(path), read_card(attributes), "sha256", attributes["columns"], path)
    except DamagedError:
        pass
    return None


def check_shard(
    records: Records, shard: int, card: StoreCard, declared: str | None = None, *, mappable: bool
) -> list[Fault]:
    """What is wrong with a shard: its record, its size, its bytes, and, if those differ, which frames.

    `declared` is the checksum that a complete store has for it.
    """
    path = records.path
    file = shard_file(path, shard)
    try:
        record = records.read(shard)
    except UnreadableError:
        raise  # nothing is known of the shard
    except UserError as error:
        return [Fault(str(record_file(path, shard)), str(error), shard)]
    try:
        size = size_of(file)
        if size != record.bytes:
            return [Fault(str(file), f"it has {size} bytes instead of {record.bytes}", shard)]
        if sha256_of(file) == record.sha256:
            if declared in (None, record.sha256):
                return []
            return [Fault(str(file), "it is not the one that the store was declared complete with", shard)]
    except OSError as error:
        if error.errno not in MISSING:
            raise unreadable(file, error) from error
        return [Fault(str(file), "it does not exist", shard)]
    reason = "it differs from its checksum"
    if mappable and isinstance(path, Path):
        try:
            bad = MappedReader(path, card).scan(shard)[1]
            reason += f", in frames {', '.join(map(str, bad))}" if bad else ", though every frame is whole"
        except UnreadableError:
            raise
        except UserError as error:
            reason = str(error)
    return [Fault(str(file), reason, shard)]


def whole_tokens(path: AnyPath, shard: int, card: StoreCard) -> NDArray[np.float16] | None:
    """The shard's tokens if every frame of it equals its own checksum, and may so be tokens of this shard; else None.

    None for an int8 store too: what its steps are worth stood in the record. And for a store far away, whose files cannot be mapped.
    """
    if card.dtype != "float16" or not isinstance(path, Path):
        return None
    try:
        tokens, bad = MappedReader(path, card).scan(shard)
    except UnreadableError:
        raise
    except UserError:
        return None
    return None if bad or not np.isfinite(tokens).all() else tokens


def leftovers(path: AnyPath, card: StoreCard) -> Iterator[AnyPath]:
    """Files in the store that no part of it has written, or no longer needs."""
    blocks = card.num_shards // IN_A_BLOCK
    for name in names_in(commits(path)):
        number, dot, suffix = name.removeprefix("block-").partition(".")
        expected = (f"{number}.json", card.num_shards) if suffix == "json" else (f"block-{number}.safetensors", blocks)
        if not dot or not number.isdecimal() or name != expected[0] or int(number) >= expected[1]:
            yield commits(path) / name
    for name in names_in(path / "tokens"):
        number = name.removeprefix("c.").removesuffix(".0.0")
        ours = number.isdecimal() and name == f"c.{int(number)}.0.0" and int(number) < card.num_shards
        if name not in ("zarr.json", "commits") and not ours:
            yield path / "tokens" / name
