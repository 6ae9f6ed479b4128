"""Frame dataset x encoders -> token stores: a task reads one tar shard and writes one Zarr shard of each store.

Several extractions may run into one store: a task claims its shard, and leaves those that another living process has claimed.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from wmcache.cache.change_maps import change_maps_path
from wmcache.cache.log_variances import log_variances_path
from wmcache.cache.writer import LackingError, StoreWriter
from wmcache.cluster.tasks import WorkerTask, log, parse_cluster, report, run_tasks
from wmcache.common.device import release_memory
from wmcache.common.errors import UserError
from wmcache.common.paths import AnyPath, absolute, exists, free_space
from wmcache.common.space import require_space
from wmcache.pipeline.encoders import Encoder, create, encode_together
from wmcache.pipeline.encoders.changes import changes_for
from wmcache.pipeline.frames import FrameDataset, Frames
from wmcache.pipeline.stores import StoreRecipe, create_store, default_store, has_work, store_card

TASKS_IN_FLIGHT = 2
"""One encodes while the other reads frames or writes tokens."""
SECONDS_BETWEEN_CHECKS = 0.5
MOST_MIXTURES = 5
"""Abort when shards that two writers have mixed up were extracted again this often."""


def extract(
    dataset: FrameDataset,
    encoder: Encoder,
    out: AnyPath,
    *,
    dtype: str = "float16",
    batch: int = 32,
    cluster: str = "local:1",
) -> bool:
    """Encode with one encoder, see `extract_together`; returns whether there was anything to do."""
    ((worked, _),) = extract_together(dataset, [(encoder, out)], dtype=dtype, batch=batch, cluster=cluster)
    return worked


def extract_together(
    dataset: FrameDataset,
    stores: Sequence[tuple[Encoder, AnyPath]],
    *,
    dtype: str = "float16",
    batch: int = 32,
    cluster: str = "local:1",
    device: str | None = None,
    part: tuple[int, int] = (0, 1),
) -> list[tuple[bool, list[int]]]:
    """Encode every frame of a dataset once; run again, it extracts only missing shards.

    Args:
        stores: encoders and their stores. Encoders on the same backbone share its pass.
        dtype: of the stored tokens, `float16` or `int8`.
        batch: frames per call of the encoders.
        device: of the encoders in other processes; None for that of the first encoder.
        part: (i, n) extracts the i-th of n slices of the shards. Several processes may extract the same slice.

    Returns:
        For each store whether there was anything to do, and the shards of other slices that it lacks.
    """
    needed = sum(store_card(dataset, encoder, dtype).token_bytes for encoder, out in stores if not exists(out))
    if needed:
        require_space(stores[0][1], needed, f"the stores of {dataset.card.frames} frames")
    writers = [create_store(dataset, encoder, out, dtype) for encoder, out in stores]
    wanted = slice_of(writers[0].card.num_shards, part)
    unfinished = [(encoder, writer) for (encoder, _), writer in zip(stores, writers, strict=True) if has_work(writer)]
    lacking: dict[AnyPath, list[int]] = {}
    if unfinished:
        device = device or str(stores[0][0].device)
        task = extraction_task(dataset, unfinished, device=device, batch=batch)
        label = f"extract {', '.join(encoder.spec.name for encoder, _ in stores)}"
        lacking = _extract_until_whole([writer for _, writer in unfinished], task, label, cluster, wanted)
    return [(writer.path in lacking, lacking.get(writer.path, [])) for writer in writers]


def with_log_variances(stores: Sequence[tuple[Encoder, AnyPath]]) -> list[tuple[Encoder, AnyPath]]:
    """Add the stores of log-variances, see `open_log_variances`, after those of encoders that have some: they share the pass."""
    made = []
    for encoder, out in stores:
        made.append((encoder, out))
        if name := encoder.spec.log_variance:
            recipe = {**encoder.recipe(), "name": name, "device": str(encoder.device)}
            made.append((create(**recipe), log_variances_path(out)))
    return made


def choose_stores(
    frames: FrameDataset,
    networks: Sequence[Encoder],
    out: AnyPath | None = None,
    *,
    dtype: str = "float16",
    change_maps: int | None = None,
) -> list[tuple[Encoder, AnyPath]]:
    """Return the encoders and paths of all stores of an extraction: first those of `networks`, then log-variances and change maps.

    Args:
        out: the store, or the folder of several stores; None takes the default paths.
        change_maps: env steps between the compared frames; None: none are made.
    """
    paths: list[AnyPath] = [default_store(frames.card.name, network, dtype) for network in networks]
    if out is not None:
        paths = [out] if len(networks) == 1 else [out / path.name for path in paths]
    tokens = list(zip(networks, paths, strict=True))
    stores = with_log_variances(tokens)
    if change_maps:
        stores += [
            (changes_for(network.token_grid, change_maps, device="cpu"), change_maps_path(path, change_maps))
            for network, path in tokens
        ]
    return stores


def extraction_task(
    dataset: FrameDataset, stores: Sequence[tuple[Encoder, StoreWriter]], *, device: str, batch: int
) -> ExtractShard:
    """Declare open stores incomplete; returns the task that extracts into them."""
    share_backbones([encoder for encoder, _ in stores])
    for _, writer in stores:
        writer.reopen([])
    recipes = tuple(StoreRecipe(it.recipe(), writer.identity, absolute(writer.path)) for it, writer in stores)
    task = ExtractShard(absolute(dataset.path), recipes, device, batch, uuid.uuid4().hex)
    return task.with_state(Extraction(dataset, stores))


def _extract_until_whole(
    writers: Sequence[StoreWriter], task: ExtractShard, label: str, cluster: str, wanted: range
) -> dict[AnyPath, list[int]]:
    """Extract the wanted shards, and declare whole stores complete; returns what each store lacks."""
    mixtures = 0
    while True:
        try:
            _extract_pending(writers, task, label, cluster, wanted)
        except UserError:
            with suppress(UserError):  # the first error matters more
                for writer in writers:
                    writer.try_finish()
            raise
        try:
            lacking = {writer.path: writer.try_finish() for writer in writers}
        except LackingError:
            mixtures += 1
            if mixtures == MOST_MIXTURES:
                raise
        else:
            # Without locks, another process may have started a shard again that was done.
            if not any(shard in wanted for shards in lacking.values() for shard in shards):
                return lacking


def _extract_pending(
    writers: Sequence[StoreWriter], task: ExtractShard, label: str, cluster: str, wanted: range
) -> None:
    """Extract all wanted shards that no other process has claimed, until none is left."""
    waiting = False
    while pending := [(writer, shard) for writer in writers for shard in writer.pending() if shard in wanted]:
        claimed = {writer.path: writer.claimed() for writer in writers}
        if unclaimed := [(writer, shard) for writer, shard in pending if shard not in claimed[writer.path]]:
            total = sum(len(writer.card.shard_frames(shard)) for writer, shard in unclaimed)
            shards = sorted({shard for _, shard in unclaimed})
            run_tasks(task, shards, cluster=cluster, threads=TASKS_IN_FLIGHT, total=total, label=label)
        else:
            if not waiting:
                log(f"{pending[0][0].path}: waiting for another extraction, which has claimed {len(pending)} shards")
            waiting = True
            time.sleep(SECONDS_BETWEEN_CHECKS)


@dataclass
class Extraction:
    """The state of `ExtractShard`."""

    dataset: FrameDataset
    stores: Sequence[tuple[Encoder, StoreWriter]]
    encoding: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class ExtractShard(WorkerTask[int, Extraction]):
    """Read the frames of a shard once, and write its tokens into each store."""

    dataset: str
    stores: tuple[StoreRecipe, ...]
    device: str
    batch: int
    key: str
    """Different for each extraction, so that a worker opens stores and datasets again that were replaced meanwhile."""

    def setup(self) -> Extraction:
        """Open the dataset and the stores, and load the encoders."""
        dataset = FrameDataset.open(self.dataset)
        if dataset.card.fingerprint != self.stores[0].identity.dataset_fingerprint:
            raise UserError(f"{self.dataset} is another dataset on this worker; use the same files on all workers")
        stores = [store.open(self.device) for store in self.stores]
        share_backbones([encoder for encoder, _ in stores])
        return Extraction(dataset, stores)

    def run(self, state: Extraction, item: int) -> int:
        """Extract a shard; returns the frames done in all stores, without shards that other processes have claimed."""
        done, mine = 0, []
        with ExitStack() as claims:
            for encoder, writer in state.stores:
                if not writer.is_done(item) and claims.enter_context(writer.claim(item)):
                    done += len(writer.card.shard_frames(item))
                    if not writer.is_done(item):  # done by another process before the claim
                        mine.append((encoder, writer))
            if mine:
                self._write(state, mine, item)
        return done

    def _write(self, state: Extraction, stores: Sequence[tuple[Encoder, StoreWriter]], shard: int) -> None:
        frames, numbers = state.dataset.read_shard(shard), np.asarray(state.dataset.card.shard_frames(shard))
        failures: list[str] = []
        for lag in dict.fromkeys(encoder.lag for encoder, _ in stores):
            networks, writers = zip(*[store for store in stores if store[0].lag == lag], strict=True)
            seen = with_earlier(state.dataset, frames, numbers, lag) if lag else frames
            with state.encoding:
                tokens = encode_frames(networks, seen, self.batch)
            for writer, values in zip(writers, tokens, strict=True):
                try:
                    writer.write_shard(shard, values)
                except UserError as error:
                    failures.append(f"{writer.path.name}: {error}")
        if failures:
            raise UserError("; ".join(failures))


def share_backbones(networks: Sequence[Encoder]) -> None:
    """Load the backbone of several encoders only once into memory."""
    first: dict[object, Encoder] = {}
    for encoder in networks:
        encoder.backbone = first.setdefault(encoder.backbone_key, encoder).backbone


def encode_frames(networks: Sequence[Encoder], frames: Frames, batch: int) -> list[NDArray[np.float16]]:
    """Encode frames to float16 [len(frames), N, D]; if the device runs out of memory, encoders keep a smaller batch from then on."""
    tokens = [np.empty((len(frames), *encoder.frame_shape), np.float16) for encoder in networks]
    start = 0
    while start < len(frames):
        size = min(batch, *(encoder.max_batch for encoder in networks))
        try:
            parts = encode_together(networks, frames[start : start + size])
        except torch.OutOfMemoryError:
            if size == 1:
                raise UserError("the device has no memory for a single frame; choose --device cpu") from None
            for encoder in networks:
                encoder.max_batch = size // 2
            release_memory(networks[0].device)
            log(f"the device has no memory for {size} frames at once, going on with {size // 2}")
            continue
        for whole, part in zip(tokens, parts, strict=True):
            whole[start : start + len(part)] = part.cpu().numpy()
        start += len(parts[0])
        report(len(parts[0]) * len(networks))
    return tokens


def read_for(encoder: Encoder, dataset: FrameDataset, numbers: NDArray[np.integer]) -> Frames:
    """Read frames of ascending numbers for an encoder: [n, S, S, 3], or with a lag [n, 2, S, S, 3], the earlier frame first."""
    frames = dataset.read_frames(numbers)
    return with_earlier(dataset, frames, numbers, encoder.lag) if encoder.lag else frames


def with_earlier(dataset: FrameDataset, frames: Frames, numbers: NDArray[np.integer], lag: int) -> Frames:
    """Pair frames of ascending numbers with those `lag` env steps before, or with the first of their episode, [n, 2, S, S, 3]."""
    earlier = numbers - np.minimum(lag, dataset.steps.step[numbers])
    known, before = np.isin(earlier, numbers), np.empty_like(frames)
    before[known] = frames[np.searchsorted(numbers, earlier[known])]
    before[~known] = dataset.read_frames(earlier[~known])
    return np.stack([before, frames], 1)


def slice_of(shards: int, part: tuple[int, int]) -> range:
    """Return the i-th of n contiguous slices of the shards, for `part` (i, n)."""
    number, count = part
    return range(number * shards // count, (number + 1) * shards // count)


@dataclass(frozen=True)
class Forecast:
    """What an extraction has to do, and an estimate of its seconds."""

    out: AnyPath
    shards: int
    frames: int
    bytes_needed: int
    bytes_free: int | None
    seconds: float


def forecast(
    dataset: FrameDataset,
    encoder: Encoder,
    out: AnyPath,
    *,
    dtype: str = "float16",
    batch: int = 32,
    cluster: str = "local:1",
    part: tuple[int, int] = (0, 1),
) -> Forecast:
    """Count what `extract_together` would do for one store, and estimate its time by encoding a batch now."""
    card = store_card(dataset, encoder, dtype)
    wanted = slice_of(card.num_shards, part)
    shards = list(wanted)
    if exists(out):
        pending = StoreWriter.resume(out, encoder.identity(dataset.card.fingerprint, dtype)).pending()
        shards = [shard for shard in pending if shard in wanted]
    frames = sum(len(card.shard_frames(shard)) for shard in shards)
    sample = dataset.read_shard(0)[:batch]
    encoder(sample)  # the first call is slower
    start = time.perf_counter()
    encoder(sample)
    seconds = (time.perf_counter() - start) / len(sample) * frames / max(1, parse_cluster(cluster).workers)
    return Forecast(out, len(shards), frames, card.token_bytes * frames // card.frames, free_space(out), seconds)
