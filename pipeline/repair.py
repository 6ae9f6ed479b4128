"""Repair a store: exactly the shards that are not as they were written are made again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from wmcache.cache.identity import Identity
from wmcache.cache.layout import AGAIN, DamagedError, StoreCard, read_attributes, read_card, shard_file
from wmcache.cache.records import Records
from wmcache.cache.store import TokenStore
from wmcache.cache.verify import Fault, Verification, declared_shards, verify, whole_tokens
from wmcache.cache.writer import StoreWriter
from wmcache.common.errors import UserError
from wmcache.common.files import sha256_of
from wmcache.common.locks import exclusive
from wmcache.common.paths import AnyPath, as_path, exists
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import COSINE_TOLERANCE, Encoder
from wmcache.pipeline.extract import extract, read_for
from wmcache.pipeline.frames import FrameDataset

SAMPLED_FRAMES = 64


def repair(
    path: AnyPath, *, dataset: AnyPath | None = None, weights: Path | None = None, device: str = "auto", batch: int = 32
) -> Verification:
    """Find what is wrong with a store, and make exactly that again.

    A shard that is what the store was declared complete with, and only lacks its record, gets it from the tokens; every other one that is
    at fault is encoded again. A store whose extraction has not finished is finished.

    Args:
        path: the store.
        dataset, weights: where the frames and the encoder's weights are now, if not where they were.
        device, batch: of the encoder.

    Returns:
        What was found before anything was repaired.

    Raises:
        UserError: the store cannot say what it is; or its frames or its encoder are not to be had any more.
    """
    found = verify(path)
    if found.sound:
        return found
    with exclusive(path.with_name(f".{path.name}.repair.lock"), path):
        found = verify(path)  # somebody else may have repaired it meanwhile
        if not found.sound:
            _mend(path, found, dataset, weights, device, batch)
        return found


def _mend(
    path: AnyPath, found: Verification, dataset: AnyPath | None, weights: Path | None, device: str, batch: int
) -> None:
    attributes = read_attributes(path)
    card, identity = read_card(attributes), Identity.from_json(attributes["identity"], str(path))
    bad = sorted({fault.shard for fault in found.faults if fault.shard is not None})
    whole = _unrecorded(Records(path, card, identity), card, bad)
    if found.shards_done + len(whole) == found.shards and all(fault.shard is not None for fault in found.faults):
        writer = StoreWriter.resume(path, identity)
        source = None
    else:
        # Before anything is dropped: without the frames and the encoder nothing could be made again.
        source = open_source(card, identity, dataset=dataset, weights=weights, device=device)
        if (source[0].card.frames, source[0].card.frames_per_shard) != (card.frames, card.frames_per_shard):
            raise DamagedError(f"{path / 'zarr.json'} does not fit its frames; {AGAIN}")
        writer = StoreWriter.create(path, card, identity, source[0].steps.columns())
    writer.reopen([shard for shard in bad if shard not in whole])
    for shard, tokens in whole.items():
        with writer.claim(shard, wait=True):
            writer.record(shard, tokens)
    if source:
        extract(*source, path, dtype=card.dtype, batch=batch)
    else:
        writer.finish()


def _unrecorded(records: Records, card: StoreCard, bad: list[int]) -> dict[int, NDArray[np.float16]]:
    """Tokens of those shards that are what the store was declared complete with, and only lack their records."""
    found: dict[int, NDArray[np.float16]] = {}
    declared = declared_shards(records.path)
    if declared is None:
        return found
    for shard in bad:
        file = shard_file(records.path, shard)
        try:
            records.read(shard)
        except UserError:
            if exists(file) and sha256_of(file) == declared[shard].tobytes().hex():
                tokens = whole_tokens(records.path, shard, card)
                found.update({} if tokens is None else {shard: tokens})
    return found


def open_frames(card: StoreCard, dataset: AnyPath | None) -> FrameDataset:
    """The frames of a store, where it says, or where the user says; raises UserError where they are not there."""
    try:
        return FrameDataset.open(dataset or as_path(str(card.dataset.get("path")).replace("\0", "?")))
    except UserError as error:
        raise UserError(f"the store's frames are needed: {error}; or say where they are with --dataset") from error


def open_source(
    card: StoreCard, identity: Identity, *, dataset: AnyPath | None, weights: Path | None, device: str
) -> tuple[FrameDataset, Encoder]:
    """The frames and the encoder that a store was made with.

    Raises:
        UserError: they are not where they were, or are not the same any more, naming what differs.
    """
    frames = open_frames(card, dataset)
    encoder = encoders.create_again(card.encoder, weights=weights, device=device)
    if different := identity.differences(encoder.identity(frames.card.fingerprint, identity.store_dtype)):
        raise UserError(
            f"the store was made with other frames or another encoder ({'; '.join(different)}); pass the right --dataset or --weights"
        )
    return frames, encoder


def verify_deep(
    path: AnyPath, *, dataset: AnyPath | None = None, weights: Path | None = None, device: str = "auto"
) -> Verification:
    """As `verify`, and encode a sample of the frames anew to compare the tokens.

    Raises:
        UserError: as `verify`; or the frames or the encoder are not to be had.
    """
    found = verify(path)
    if not found.sound:
        return found
    store = TokenStore.open(path)
    frames, encoder = open_source(store.card, store.identity, dataset=dataset, weights=weights, device=device)
    chosen = np.unique(np.linspace(0, len(store) - 1, SAMPLED_FRAMES).astype(int))
    drift = encoder.drift(read_for(encoder, frames, chosen), store.gather(chosen))
    faults = list(found.faults)
    if not drift["cosine"] > COSINE_TOLERANCE:
        faults.append(
            Fault(
                str(path),
                f"encoding {len(chosen)} of its frames anew gives other tokens (smallest cosine {drift['cosine']:.4f})",
            )
        )
    return replace(found, faults=faults, drift=drift)


def live_encoder(
    path: AnyPath, *, dataset: AnyPath | None = None, weights: Path | None = None, device: str = "auto"
) -> Callable[[int], Tensor]:
    """The store's own encoder on its own frames, as a trainer without a cache uses it.

    Returns:
        n -> tokens float16 [n, N, D] of n frames that are decoded already, encoded at each call.

    Raises:
        UserError: the frames or the encoder are not to be had.
    """
    store = TokenStore.open(path)
    source, encoder = open_source(store.card, store.identity, dataset=dataset, weights=weights, device=device)
    frames = source.read_shard(0)
    return lambda count: encoder(frames[np.arange(count) % len(frames)])
