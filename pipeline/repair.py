"""Repair a store: write again exactly the shards that differ from what was written."""

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
from wmcache.common.paths import AnyPath, exists
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import COSINE_TOLERANCE, Encoder
from wmcache.pipeline.extract import extract, read_for
from wmcache.pipeline.frames import FrameDataset
from wmcache.pipeline.stores import open_frames

SAMPLED_FRAMES = 64


def repair(
    path: AnyPath, *, dataset: AnyPath | None = None, weights: Path | None = None, device: str = "auto", batch: int = 32
) -> Verification:
    """Repair a store, and finish an unfinished one; returns the faults before.

    A shard with the checksum that the store was declared complete with only gets its record again, from its tokens. Other faulty shards
    are encoded again. `dataset` and `weights` are paths of the frames and the encoder's weights, if they have moved.

    Raises:
        UserError: the store does not describe itself any more, or its frames or its encoder are not available.
    """
    found = verify(path)
    if found.sound:
        return found
    with exclusive(path.with_name(f".{path.name}.repair.lock"), path):
        found = verify(path)
        if found.sound:  # another process has repaired it meanwhile
            return found
        attributes = read_attributes(path)
        card, identity = read_card(attributes), Identity.from_json(attributes["identity"], str(path))
        bad = sorted({fault.shard for fault in found.faults if fault.shard is not None})
        whole = _tokens_without_record(Records(path, card, identity), card, bad)
        source = None
        if found.shards_done + len(whole) == found.shards and all(fault.shard is not None for fault in found.faults):
            writer = StoreWriter.resume(path, identity)
        else:
            # Before anything is dropped: without the frames and the encoder nothing could be encoded again.
            source = frames, _ = open_source(card, identity, dataset=dataset, weights=weights, device=device)
            if (frames.card.frames, frames.card.frames_per_shard) != (card.frames, card.frames_per_shard):
                raise DamagedError(f"{path / 'zarr.json'} does not fit its frames; {AGAIN}")
            writer = StoreWriter.create(path, card, identity, frames.steps.store_columns())
        writer.reopen([shard for shard in bad if shard not in whole])
        for shard, tokens in whole.items():
            with writer.claim(shard, wait=True):
                writer.record(shard, tokens)
        if source:
            extract(*source, path, dtype=card.dtype, batch=batch)
        else:
            writer.finish()
        return found


def _tokens_without_record(records: Records, card: StoreCard, bad: list[int]) -> dict[int, NDArray[np.float16]]:
    """Tokens of the shards that have the declared checksum, and lack only their records."""
    found: dict[int, NDArray[np.float16]] = {}
    if (declared := declared_shards(records.path)) is None:
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


def open_source(
    card: StoreCard, identity: Identity, *, dataset: AnyPath | None, weights: Path | None, device: str
) -> tuple[FrameDataset, Encoder]:
    """Open the frames and the encoder of a store; raises UserError if they are missing, or differ from its identity."""
    frames = open_frames(card, dataset)
    encoder = encoders.create_again(card.encoder, weights=weights, device=device)
    if different := "; ".join(identity.differences(encoder.identity(frames.card.fingerprint, identity.store_dtype))):
        raise UserError(f"the store is of other frames or weights ({different}); pass the right --dataset or --weights")
    return frames, encoder


def verify_deep(
    path: AnyPath, *, dataset: AnyPath | None = None, weights: Path | None = None, device: str = "auto"
) -> Verification:
    """Verify a store, and encode a sample of its frames again to compare the tokens; arguments and errors as of `repair`."""
    found = verify(path)
    if not found.sound:
        return found
    store = TokenStore.open(path)
    frames, encoder = open_source(store.card, store.identity, dataset=dataset, weights=weights, device=device)
    chosen = np.unique(np.linspace(0, len(store) - 1, SAMPLED_FRAMES).astype(int))
    drift = encoder.drift(read_for(encoder, frames, chosen), store.gather(chosen))
    faults = []
    if not drift["cosine"] > COSINE_TOLERANCE:
        cosine = f"smallest cosine {drift['cosine']:.4f}"
        faults.append(Fault(str(path), f"encoding {len(chosen)} of its frames again gives other tokens ({cosine})"))
    return replace(found, faults=faults, drift=drift)


def live_encoder(
    path: AnyPath, *, dataset: AnyPath | None = None, weights: Path | None = None, device: str = "auto"
) -> Callable[[int], Tensor]:
    """Load the store's encoder and frames, as a trainer without a cache uses it: n -> tokens float16 [n, N, D] of n decoded frames."""
    store = TokenStore.open(path)
    source, encoder = open_source(store.card, store.identity, dataset=dataset, weights=weights, device=device)
    frames = source.read_shard(0)
    return lambda count: encoder(frames[np.arange(count) % len(frames)])
