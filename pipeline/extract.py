"""Frame dataset x encoders -> token stores: one task reads one tar shard and writes one Zarr shard of each store.

Each process has two tasks in flight and its encoders behind a lock: while one task encodes, the other reads and decodes its frames or
writes its tokens. So reading, encoding and writing overlap, and memory holds two shards whatever the size of the dataset.

Several extractions may run into one store: a task claims its shard, and what somebody else has claimed is left to them, and done here
only if they die. Or each is told its slice of the shards; then whoever finds the store whole at its end declares it complete.
"""

from __future__ import annotations

import functools
import json
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from wmcache.cache.identity import Identity
from wmcache.cache.layout import StoreCard, read_attributes, read_card
from wmcache.cache.writer import LackingError, StoreWriter
from wmcache.cluster.tasks import Pool, open_pool, parse_cluster, report, run_tasks
from wmcache.common.device import choose_device, release_memory
from wmcache.common.errors import UserError, command, one_line
from wmcache.common.folders import home
from wmcache.common.paths import AnyPath, absolute, as_path, exists, free_space
from wmcache.common.space import require_space
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import Encoder, encode_together
from wmcache.pipeline.frames import FrameDataset, Frames

TASKS_IN_FLIGHT = 2
SECONDS_BETWEEN_LOOKS = 0.5
MOST_MIXTURES = 5
"""Times that what two writers have mixed up is done again; more are no accident."""
_encoding = threading.Lock()


@dataclass(frozen=True)
class Forecast:
    """What an extraction would do.

    Attributes:
        shards, frames: still to do.
        bytes_needed, bytes_free: at the store's place; an object store has no end, None.
        seconds: estimate from encoding one batch now.
    """

    out: AnyPath
    shards: int
    frames: int
    bytes_needed: int
    bytes_free: int | None
    seconds: float


def default_store(dataset: str, encoder: Encoder, dtype: str = "float16") -> Path:
    """`$WMCACHE_HOME/stores/<dataset>/<encoder>-<image size>.zarr`, with `-int8` where the tokens are."""
    suffix = "" if dtype == "float16" else f"-{dtype}"
    return home() / "stores" / dataset / f"{encoder.spec.name}-{encoder.image_size}{suffix}.zarr"


@dataclass(frozen=True)
class Job:
    """An encoder and the store of its tokens, as a task in another process needs to know them.

    Attributes:
        recipe: of the encoder, JSON.
        identity: of the store, JSON.
        out: its place, absolute: workers have working directories of their own.
        run: another one for each extraction: a process opens a store once in it.
    """

    recipe: str
    identity: str
    out: str
    run: str


def extract(
    dataset: FrameDataset,
    encoder: Encoder,
    out: AnyPath,
    *,
    dtype: str = "float16",
    batch: int = 32,
    cluster: str = "local:1",
) -> None:
    """`extract_together` for a single encoder."""
    extract_together(dataset, [(encoder, out)], dtype=dtype, batch=batch, cluster=cluster)


def extract_together(
    dataset: FrameDataset,
    stores: Sequence[tuple[Encoder, AnyPath]],
    *,
    dtype: str = "float16",
    batch: int = 32,
    cluster: str = "local:1",
    device: str | None = None,
    part: tuple[int, int] = (0, 1),
) -> list[list[int]]:
    """Encode every frame of a dataset once; run again, it does only the shards that are not there yet.

    Args:
        dataset: the frames; each is read and decoded once, whatever the number of encoders.
        stores: encoders, and the folders of their stores; encoders on the same backbone share its pass.
        dtype: what tokens are stored in, `float16` or `int8`.
        batch: frames in each call of the encoders.
        cluster: where, see `cluster.parse_cluster`; each process loads the encoders once.
        device: of the encoders, by a name that is looked up where a task runs; None takes that of the first.
        part: (i, n) does the i-th of n slices of the shards; any number of processes may be at any of them.

    Returns:
        For each store the shards that it lacks still: of other slices, so none where the slice is the whole.

    Raises:
        UserError: a store with other settings is there, too little space, or shards that failed.
    """
    card = store_card(dataset, stores[0][0], dtype)
    writers, jobs, run = [], [], uuid.uuid4().hex
    needed = sum(store_card(dataset, encoder, dtype).token_bytes for encoder, out in stores if not exists(out))
    if needed:
        require_space(stores[0][1], needed, f"the stores of {card.frames} frames")
    for encoder, out in stores:
        identity = encoder.identity(dataset.card.fingerprint, dtype)
        writers.append(StoreWriter.create(out, store_card(dataset, encoder, dtype), identity, dataset.steps.columns()))
        jobs.append(Job(json.dumps(encoder.recipe()), json.dumps(identity.to_json()), absolute(out), run))
    device = device or str(stores[0][0].device)
    task = functools.partial(extract_shard, absolute(dataset.path), jobs, device, batch)
    remember_encoders([encoder for encoder, _ in stores])
    label = f"extract {', '.join(encoder.spec.name for encoder, _ in stores)}"
    for writer in writers:
        if writer.pending():
            writer.reopen([])
    wanted, mixtures = slice_of(card.num_shards, part), 0
    while True:
        try:
            _extract_pending(writers, task, label, cluster, wanted)
        except UserError:
            # The stores that are whole are so although another has failed; what has failed is the thing to say.
            with suppress(UserError):
                _finish_whole(writers)
            raise
        # Without locks, somebody may have begun anew what was done when we looked.
        try:
            lacking = _finish_whole(writers)
        except LackingError:
            mixtures += 1
            if mixtures == MOST_MIXTURES:
                raise
        else:
            if not any(shard in wanted for shards in lacking for shard in shards):
                return lacking


def _finish_whole(writers: Sequence[StoreWriter]) -> list[list[int]]:
    """Declare the stores complete that are; returns what each lacks."""
    lacking = []
    for writer in writers:
        lacking.append(writer.pending())
        if not lacking[-1]:
            writer.finish()
    return lacking


def is_complete(path: AnyPath) -> bool:
    """Whether a store is complete, with all its shards: there is nothing to extract into it."""
    try:
        attributes = read_attributes(path)
        identity = Identity.from_json(attributes["identity"], str(path))
        return bool(attributes["complete"]) and not StoreWriter(path, read_card(attributes), identity).pending()
    except (UserError, OSError):  # which the extraction meets again, and reports
        return False


def finalize(path: AnyPath) -> StoreCard:
    """Declare a store complete that has all its shards; one that is complete is left alone.

    Raises:
        UserError: shards are missing, naming the command that makes them; or there is no store.
    """
    identity = Identity.from_json(read_attributes(path)["identity"], str(path))
    writer = StoreWriter.resume(path, identity)
    if missing := writer.pending():
        first = ", ".join(map(str, missing[:5])) + ", …" * (len(missing) > 5)
        raise UserError(
            f"{path} lacks {len(missing)} of {writer.card.num_shards} shards ({first}); make them with: {_command_for(writer)}"
        )
    writer.finish()
    return writer.card


def _command_for(writer: StoreWriter) -> str:
    """What extracts a store, whoever had begun it."""
    recipe, name, dataset = writer.card.encoder, writer.card.encoder.get("name"), writer.card.dataset.get("path")
    if not name or not dataset:
        return "the wmcache extract that began it"
    words = ["wmcache", "extract", "--dataset", dataset, "--encoder", name]
    # An adapter sees what its base does.
    seen = ("image_size", "normalisation", "filter", "lag") if encoders.get_entry(name).load else ()
    usual = encoders.get_spec(name)
    for setting in ("weights", "base_weights", *seen, "dtype"):
        if recipe.get(setting) not in (None, getattr(usual, setting, None)):
            words += [f"--{setting.replace('_', '-')}", recipe[setting]]
    if writer.card.dtype != "float16":
        words += ["--store-dtype", writer.card.dtype]
    return command(*words, "--out", writer.path)


def slice_of(shards: int, part: tuple[int, int]) -> range:
    """The i-th of n contiguous slices of so many shards, for `part` (i, n); the slices together are all of them."""
    number, count = part
    return range(number * shards // count, (number + 1) * shards // count)


def _extract_pending(
    writers: Sequence[StoreWriter], task: Callable[[int], int], label: str, cluster: str, wanted: range
) -> None:
    """Do all wanted shards that no other extraction is at, until none is left anywhere."""
    alone = True
    with ExitStack() as stack:
        pool: Pool | None = None
        while pending := [(writer, shard) for writer in writers for shard in writer.pending() if shard in wanted]:
            claimed = {writer.path: writer.claimed() for writer in writers}
            if unclaimed := [(writer, shard) for writer, shard in pending if shard not in claimed[writer.path]]:
                total = sum(len(writer.card.shard_frames(shard)) for writer, shard in unclaimed)
                shards = sorted({shard for _, shard in unclaimed})
                if pool is None:
                    threads, most = TASKS_IN_FLIGHT, len(shards)
                    pool = stack.enter_context(open_pool(cluster, threads=threads, most=most, label=label))
                run_tasks(task, shards, cluster=pool, total=total, label=label)
            else:
                if alone:
                    where = ", ".join(sorted({str(writer.path) for writer, _ in pending}))
                    tqdm.write(
                        one_line(f"{where}: waiting for another extraction, which is at {len(pending)} shards"),
                        file=sys.stderr,
                    )
                alone = False
                time.sleep(SECONDS_BETWEEN_LOOKS)


def extract_shard(dataset: str, jobs: Sequence[Job], device: str, batch: int, shard: int) -> int:
    """The task: read, encode and write one shard of each store; returns the frames done in all of them, without those that others are at.

    Raises:
        UserError: a shard could not be read or encoded; or not written, in which case those of the other stores were.
    """
    done = 0
    with ExitStack() as claims:
        ours: list[tuple[Job, StoreWriter]] = []
        for job in jobs:
            writer = open_writer(job)
            if not writer.is_done(shard) and claims.enter_context(writer.claim(shard)):
                done += len(writer.card.shard_frames(shard))
                if not writer.is_done(shard):  # somebody else may have done it meanwhile
                    ours.append((job, writer))
        if not ours:
            return done
        source = _open_dataset(dataset, ours[0][1].identity.dataset_fingerprint)
        frames = source.read_shard(shard)
        encoders_ = load_encoders([job for job, _ in ours], jobs, device)
        failures: list[str] = []
        for lag in dict.fromkeys(encoder.lag for encoder in encoders_):
            chosen = [number for number, encoder in enumerate(encoders_) if encoder.lag == lag]
            seen = with_earlier(source, frames, source.shard_frames(shard).start, lag) if lag else frames
            with _encoding:
                tokens = encode_frames([encoders_[number] for number in chosen], seen, batch)
            for number, part in zip(chosen, tokens, strict=True):
                try:
                    ours[number][1].write_shard(shard, part)
                except UserError as error:
                    failures.append(f"{ours[number][1].path.name}: {error}")
        if failures:
            raise UserError("; ".join(failures))
    return done


def read_for(encoder: Encoder, dataset: FrameDataset, numbers: NDArray[np.integer]) -> Frames:
    """Some frames as an encoder wants them: [n, S, S, 3], or with their earlier ones [n, 2, S, S, 3]."""
    frames = dataset.read_frames(numbers)
    if not encoder.lag:
        return frames
    return np.stack([dataset.read_frames(earlier_frames(dataset, numbers, encoder.lag)), frames], 1)


def earlier_frames(dataset: FrameDataset, numbers: NDArray[np.integer], lag: int) -> NDArray[np.integer]:
    """The frames `lag` env steps before some others; the first of its episode where that has not gone on for so long."""
    earlier: NDArray[np.integer] = numbers - np.minimum(lag, dataset.steps.step[numbers])
    return earlier


def with_earlier(dataset: FrameDataset, frames: Frames, start: int, lag: int) -> Frames:
    """Frames [n, S, S, 3], of which the first is number `start`, each with the one `lag` env steps before it, [n, 2, S, S, 3].

    Reads what lies in the shards before; see `earlier_frames` for the beginnings of episodes, where a planner has seen no more either.
    """
    earlier = earlier_frames(dataset, np.arange(start, start + len(frames)), lag)
    before = dataset.read_frames(earlier[earlier < start]) if (earlier < start).any() else frames[:0]
    at_hand = frames[earlier[earlier >= start] - start]
    return np.stack([np.concatenate([before, at_hand]), frames], 1)


def encode_frames(encoders_: Sequence[Encoder], frames: Frames, batch: int) -> list[NDArray[np.float16]]:
    """Each encoder's tokens, float16 [len(frames), N, D]; where the device lacks memory the batch is halved, for good."""
    tokens = [np.empty((len(frames), *encoder.frame_shape), np.float16) for encoder in encoders_]
    start = 0
    while start < len(frames):
        size = min(batch, *(encoder.max_batch for encoder in encoders_))
        try:
            parts = encode_together(encoders_, frames[start : start + size])
        except torch.OutOfMemoryError:
            if size == 1:
                raise UserError("the device has no memory for a single frame; choose --device cpu") from None
            for encoder in encoders_:
                encoder.max_batch = size // 2
            release_memory(encoders_[0].device)
            tqdm.write(
                f"the device has no memory for {size} frames at once, going on with {size // 2}",
                file=sys.stderr,
            )
            continue
        for whole, part in zip(tokens, parts, strict=True):
            whole[start : start + len(part)] = part.cpu().numpy()
        start += len(parts[0])
        report(len(parts[0]) * len(encoders_))
    return tokens


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
    """What `extract_together` would do for one store, with a time estimate from encoding one batch here."""
    card = store_card(dataset, encoder, dtype)
    shards = list(range(card.num_shards))
    if exists(out):
        shards = StoreWriter.resume(out, encoder.identity(dataset.card.fingerprint, dtype)).pending()
    wanted = slice_of(card.num_shards, part)
    shards = [shard for shard in shards if shard in wanted]
    frames = sum(len(card.shard_frames(shard)) for shard in shards)
    sample = dataset.read_shard(0)[:batch]
    encoder(sample)  # the first call pays for set-up
    start = time.perf_counter()
    encoder(sample)
    seconds = (time.perf_counter() - start) / len(sample) * frames / max(1, parse_cluster(cluster).workers)
    return Forecast(out, len(shards), frames, card.token_bytes * frames // card.frames, free_space(out), seconds)


def store_card(dataset: FrameDataset, encoder: Encoder, dtype: str) -> StoreCard:
    """The card of the store of these frames' tokens."""
    card = dataset.card
    return StoreCard(
        encoder=encoder.recipe(),
        dataset={
            "name": card.name,
            "path": absolute(dataset.path),
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


# Each process opens the dataset and the stores and loads the encoders once, whatever the number of shards it does.
_encoders: dict[tuple[str, str], Encoder] = {}


def remember_encoders(loaded: Sequence[Encoder]) -> None:
    """Have tasks in this process use these instead of loading them anew."""
    _encoders.clear()
    for encoder in loaded:
        _keep(json.dumps(encoder.recipe()), str(encoder.device), encoder)


def _keep(recipe: str, device: str, encoder: Encoder) -> None:
    for other in _encoders.values():
        if other.backbone_key == encoder.backbone_key:
            encoder.share(other)
            break
    _encoders[recipe, device] = encoder


def load_encoders(wanted: Sequence[Job], jobs: Sequence[Job], device: str) -> list[Encoder]:
    """The encoders of some of the jobs, loaded once in this process.

    Raises:
        UserError: one cannot be made here, or is another one here.
    """
    device = str(choose_device(device))
    found = []
    with _encoding:
        for job in wanted:
            known = Identity.from_json(json.loads(job.identity), job.out)
            key = (job.recipe, device)
            if key not in _encoders or _encoders[key].weights_sha256 != known.weights_sha256:
                # A worker may live longer than one extraction, and a file of weights be fitted again meanwhile.
                for other in set(_encoders) - {(other.recipe, device) for other in jobs} | {key}:
                    _encoders.pop(other, None)
                encoder = encoders.create(**json.loads(job.recipe), device=device)
                if different := known.differences(encoder.identity(known.dataset_fingerprint, known.store_dtype)):
                    raise UserError(
                        f"{encoder.spec.name} is another one where this task runs ({'; '.join(different)}); "
                        "see to it that all workers have the same files and packages"
                    )
                _keep(job.recipe, device, encoder)
            found.append(_encoders[key])
    return found


@functools.lru_cache(maxsize=64)
def open_writer(job: Job) -> StoreWriter:
    """The writer of a job's store, opened once in this process."""
    return StoreWriter.resume(as_path(job.out), Identity.from_json(json.loads(job.identity), job.out))


@functools.lru_cache(maxsize=1)
def _open_dataset(path: str, fingerprint: str) -> FrameDataset:  # noqa: ARG001 (a part of the cache's key)
    return FrameDataset.open(as_path(path))
