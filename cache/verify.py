"""Is a store what it says it is? Everything that can be told without an encoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm
from wmcache.cache.errors import UserError
from wmcache.cache.files import seconds_between_updates, sha256_of
from wmcache.cache.identity import Identity
from wmcache.cache.layout import (
    DamagedError,
    StoreCard,
    is_mappable,
    open_group,
    open_tokens,
    read_attributes,
    read_card,
    read_columns,
    read_record,
    record_file,
    shard_file,
)
from wmcache.cache.reader import MappedReader
from wmcache.cache.store import MOST_FAULTS


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
        faults: what has to be mended.
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


def verify(path: Path) -> Verification:
    """Compare the whole store with its records: description, columns, counts, sizes, and every byte of every shard.

    A shard that is not done in a store that is not complete is no fault.

    Raises:
        UserError: there is no store at `path`.
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
        mappable = is_mappable(open_tokens(group, card, attributes, path), card)
        read_columns(group, card, attributes["columns"], path)
    except DamagedError as error:
        faults.append(Fault(str(path), " ".join(str(error).split())))
    done = 0
    with tqdm(total=card.frames, desc="verify", unit=" frames", mininterval=seconds_between_updates()) as bar:
        for shard in range(card.num_shards):
            if complete or record_file(path, shard).exists():
                declared = attributes["shards"][shard] if complete else None
                found = check_shard(path, shard, card, identity, declared, mappable=mappable)
                faults += found
                if len(faults) >= MOST_FAULTS:
                    faults.append(Fault(str(path), f"shards from {shard + 1} on were not looked at"))
                    break
                done += not found
            bar.update(len(card.shard_frames(shard)))
    return Verification(
        str(path), complete, card.num_shards, done, card.frames, faults, [str(file) for file in leftovers(path, card)]
    )


def check_shard(
    path: Path, shard: int, card: StoreCard, identity: Identity, declared: str | None = None, *, mappable: bool
) -> list[Fault]:
    """What is wrong with a shard: its record, its size, its bytes, and, if those differ, which frames.

    `declared` is the checksum that a complete store's attributes have for it.
    """
    file = shard_file(path, shard)
    try:
        record = read_record(path, shard, card, identity)
    except UserError as error:
        return [Fault(str(record_file(path, shard)), str(error), shard)]
    try:
        size = file.stat().st_size
        if size != record.bytes:
            return [Fault(str(file), f"it has {size} bytes instead of {record.bytes}", shard)]
        if sha256_of(file) == record.sha256:
            if declared in (None, record.sha256):
                return []
            return [Fault(str(file), "it is not the one that the store was declared complete with", shard)]
    except OSError as error:
        return [Fault(str(file), f"it cannot be read ({error.strerror or error})", shard)]
    reason = "it differs from its checksum"
    if mappable:
        try:
            bad = MappedReader(path, card).scan(shard)[1]
            reason += f", in frames {', '.join(map(str, bad))}" if bad else ", though every frame is whole"
        except UserError as error:
            reason = str(error)
    return [Fault(str(file), reason, shard)]


def whole_tokens(path: Path, shard: int, card: StoreCard) -> NDArray[np.float16] | None:
    """The shard's tokens if every frame of it equals its own checksum, and may so be tokens of this shard; else None.

    None for an int8 store too: what its steps are worth stood in the record.
    """
    if card.dtype != "float16":
        return None
    try:
        tokens, bad = MappedReader(path, card).scan(shard)
    except UserError:
        return None
    return None if bad or not np.isfinite(tokens).all() else tokens


def leftovers(path: Path, card: StoreCard) -> Iterator[Path]:
    """Files in the store that no part of it has written, or no longer needs."""
    known = {record_file(path, shard).name for shard in range(card.num_shards)}
    for file in sorted((path / "tokens" / "commits").glob("*")):
        if file.name not in known:
            yield file
    for folder in sorted((path / "tokens" / "c").glob("*")):
        shard = int(folder.name) if folder.name.isdecimal() else card.num_shards
        expected = shard_file(path, shard) if shard < card.num_shards else None
        yield from (file for file in sorted(folder.rglob("*")) if file.is_file() and file != expected)
