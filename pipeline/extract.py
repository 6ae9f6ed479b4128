"""Frame dataset x encoder -> token store: one task reads one tar shard and writes one Zarr shard.

Each process has two tasks in flight and one encoder behind a lock: while one task encodes, the other reads and decodes its frames or
writes its tokens. So reading, encoding and writing overlap, and memory holds two shards whatever the size of the dataset.

Several extractions may run into one store: a task claims its shard, and what somebody else has claimed is left to them, and done here
only if they die.
"""

from __future__ import annotations

import functools
import json
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm
from wmcache.cache.device import release_memory
from wmcache.cache.errors import UserError
from wmcache.cache.files import free_space, home, require_space
from wmcache.cache.identity import Identity
from wmcache.cache.layout import StoreCard
from wmcache.cache.writer import StoreWriter
from wmcache.pipeline import encoders
from wmcache.pipeline.cluster import run_tasks
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.frames import FrameDataset, Frames

TASKS_IN_FLIGHT = 2
SECONDS_BETWEEN_LOOKS = 0.5
_encoding = threading.Lock()


@dataclass(frozen=True)
class Forecast:
    """What an extraction would do.

    Attributes:
        shards, frames: still to do.
        bytes_needed, bytes_free: at the store's place.
        seconds: estimate from encoding one batch now.
    """

    out: Path
    shards: int
    frames: int
    bytes_needed: int
    bytes_free: int
    seconds: float


def default_store(dataset: FrameDataset, encoder: Encoder, dtype: str = "float16") -> Path:
    """`$WMCACHE_HOME/stores/<dataset>/<encoder>-<image size>.zarr`, with `-int8` where the tokens are."""
    suffix = "" if dtype == "float16" else f"-{dtype}"
    return home() / "stores" / dataset.card.name / f"{encoder.spec.name}-{encoder.image_size}{suffix}.zarr"


def extract(
    dataset: FrameDataset,
    encoder: Encoder,
    out: Path,
    *,
    dtype: str = "float16",
    batch: int = 32,
    workers: int = 1,
) -> None:
    """Encode every frame of a dataset once; run again, it does only the shards that are not there yet.

    Args:
        dataset: the frames.
        encoder: makes the tokens.
        out: the store's folder.
        dtype: what tokens are stored in, `float16` or `int8`.
        batch: frames in each call of the encoder.
        workers: processes; each loads the encoder once.

    Raises:
        UserError: a store with other settings is at `out`, too little space, or shards that failed.
    """
    card, identity = store_card(dataset, encoder, dtype), encoder.identity(dataset.card.fingerprint, dtype)
    if not out.exists():
        require_space(out, card.token_bytes, f"the store of {card.frames} frames")
    writer = StoreWriter.create(out, card, identity, dataset.steps.columns())
    task = functools.partial(
        extract_shard,
        dataset.path,
        json.dumps(encoder.recipe()),
        str(encoder.device),
        out,
        json.dumps(identity.to_json()),
        batch,
    )
    _remember_encoder(encoder)
    label = f"extract {encoder.spec.name}"
    if writer.pending():
        writer.reopen([])
    alone = True
    while pending := writer.pending():
        if unclaimed := [shard for shard in pending if not writer.is_claimed(shard)]:
            total = sum(len(card.shard_frames(shard)) for shard in unclaimed)
            run_tasks(task, unclaimed, workers=workers, threads=TASKS_IN_FLIGHT, total=total, label=label)
        else:
            if alone:
                tqdm.write(f"{out}: waiting for another extraction, which is at {len(pending)} shards", file=sys.stderr)
            alone = False
            time.sleep(SECONDS_BETWEEN_LOOKS)
    writer.finish()


def extract_shard(dataset: Path, recipe: str, device: str, out: Path, identity: str, batch: int, shard: int) -> int:
    """The task: read, encode and write one shard; returns its number of frames, 0 where somebody else is at it."""
    known = Identity.from_json(json.loads(identity), str(out))
    writer = _open_writer(out, known)
    with writer.claim(shard) as ours:
        if not ours:
            return 0
        if not writer.is_done(shard):
            frames = _open_dataset(dataset, known.dataset_fingerprint).read_shard(shard)
            encoder = _load_encoder(recipe, device)
            with _encoding:
                tokens = encode_frames(encoder, frames, batch)
            writer.write_shard(shard, tokens)
    return len(writer.card.shard_frames(shard))


def encode_frames(encoder: Encoder, frames: Frames, batch: int) -> NDArray[np.float16]:
    """Tokens float16 [len(frames), N, D]; on a lack of device memory the batch is halved, for good, and the work goes on."""
    tokens = np.empty((len(frames), *encoder.frame_shape), np.float16)
    start = 0
    while start < len(frames):
        size = min(batch, encoder.max_batch)
        try:
            part = encoder(frames[start : start + size])
        except torch.OutOfMemoryError:
            if size == 1:
                raise UserError("the device has no memory for a single frame; choose --device cpu") from None
            encoder.max_batch = size // 2
            release_memory(encoder.device)
            tqdm.write(
                f"the device has no memory for {size} frames at once, going on with {encoder.max_batch}",
                file=sys.stderr,
            )
            continue
        tokens[start : start + len(part)] = part.cpu().numpy()
        start += len(part)
    return tokens


def forecast(
    dataset: FrameDataset,
    encoder: Encoder,
    out: Path,
    *,
    dtype: str = "float16",
    batch: int = 32,
    workers: int = 1,
) -> Forecast:
    """What `extract` would do, with a time estimate from encoding one batch."""
    card = store_card(dataset, encoder, dtype)
    shards = list(range(card.num_shards))
    if out.exists():
        shards = StoreWriter.resume(out, encoder.identity(dataset.card.fingerprint, dtype)).pending()
    frames = sum(len(card.shard_frames(shard)) for shard in shards)
    sample = dataset.read_shard(0)[:batch]
    encoder(sample)  # the first call pays for set-up
    start = time.perf_counter()
    encoder(sample)
    seconds = (time.perf_counter() - start) / len(sample) * frames / workers
    return Forecast(out, len(shards), frames, card.token_bytes * frames // card.frames, free_space(out), seconds)


def store_card(dataset: FrameDataset, encoder: Encoder, dtype: str) -> StoreCard:
    """The card of the store of these frames' tokens."""
    card = dataset.card
    return StoreCard(
        encoder=encoder.recipe(),
        dataset={
            "name": card.name,
            "path": str(dataset.path.absolute()),
            "env": card.env,
            "maze": card.maze,
            "image_size": card.image_size,
            "policy": card.policy,
            "fps": card.fps,
        },
        token_grid=encoder.token_grid,
        token_dim=encoder.token_dim,
        frames=card.frames,
        frames_per_shard=card.frames_per_shard,
        dtype=dtype,
    )


# Each process opens the dataset and loads the encoder once, whatever the number of shards it does.
_encoders: dict[tuple[str, str], Encoder] = {}


def _remember_encoder(encoder: Encoder) -> None:
    _encoders.clear()
    _encoders[json.dumps(encoder.recipe()), str(encoder.device)] = encoder


def _load_encoder(recipe: str, device: str) -> Encoder:
    with _encoding:
        if (recipe, device) not in _encoders:
            _encoders[recipe, device] = encoders.create(**json.loads(recipe), device=device)
        return _encoders[recipe, device]


@functools.lru_cache(maxsize=1)
def _open_writer(out: Path, identity: Identity) -> StoreWriter:
    return StoreWriter.resume(out, identity)


@functools.lru_cache(maxsize=1)
def _open_dataset(path: Path, fingerprint: str) -> FrameDataset:  # noqa: ARG001 (a part of the cache's key)
    return FrameDataset.open(path)
