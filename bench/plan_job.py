"""The resources of a large extraction, estimated before machines are requested: bytes, objects, GPU hours, and the cost of records.

Rates are measured on this machine, on a thousand shards without data; the rest is arithmetic. Figures are bytes and seconds unless the
name differs:

- shard_bytes, token_bytes: of a shard's file, and of all. record_bytes: of all records. objects: files of the store.
- step_bytes: of the step table in memory, in the process that creates the store and in each worker.
- frames_per_second: of a worker. worker_hours: of all workers together. hours: wall time.
- worker_memory: tokens and frames of the shards in flight, and the step table; encoder and libraries are not included.
- create, plan, finish, open: of the store, see `bench.scale`; upper bounds, since constant parts are multiplied too.
- commit_share: share of a shard's time for its claim and record.
- tasks_per_second: that the workers finish. scheduler_tasks_per_second: that a Dask scheduler of this machine starts.
- notes: problems, each with the setting that fixes it.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from wmcache.bench.scale import measure_scale
from wmcache.cache.arrays import ROWS_IN_A_CHUNK
from wmcache.cache.layout import STEP_COLUMNS, StoreCard
from wmcache.cache.records import IN_A_BLOCK
from wmcache.cluster.tasks import open_pool
from wmcache.common.jsonfiles import MOST_JSON_BYTES
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.extract import TASKS_IN_FLIGHT
from wmcache.pipeline.frames import FRAMES_PER_SHARD

MEASURED_SHARDS = IN_A_BLOCK
MEASURED_TASKS = 2000
TAR_RECORD_BYTES = 150
"""Of a tar in dataset.json."""
STEP_BYTES = 48
"""Of a frame in the step table, in memory: two actions, four states, episode, step."""
BUSY_SCHEDULER = 0.5
"""Share of a scheduler's tasks per second beyond which workers wait for it."""
MOST_SHARDS = MOST_JSON_BYTES // TAR_RECORD_BYTES


def plan_job(
    frames: int,
    *,
    token_grid: tuple[int, int],
    token_dim: int,
    image_size: int,
    workers: int,
    frames_per_second: float,
    frames_per_shard: int | None = None,
    dtype: str = "float16",
) -> dict[str, Any]:
    """Estimate an extraction.

    Args:
        image_size: of the dataset's frames.
        workers: at the same time.
        frames_per_second: of one of them.
        frames_per_shard: of the dataset; None takes as many as one dataset.json needs to list its tars.
    """
    if frames_per_shard is None:
        frames_per_shard = FRAMES_PER_SHARD
        while frames > frames_per_shard * MOST_SHARDS:
            frames_per_shard *= 2
    card = StoreCard({"name": "none"}, {"name": "none"}, token_grid, token_dim, frames, frames_per_shard, dtype)
    measured = measure_scale(MEASURED_SHARDS, tokens=card.tokens_per_frame, token_dim=token_dim)
    by_shard = card.num_shards / MEASURED_SHARDS
    shard_seconds = min(frames, frames_per_shard) / frames_per_second
    in_flight = TASKS_IN_FLIGHT * min(frames, frames_per_shard) * (card.frame_bytes + 3 * image_size**2)
    columns = len(STEP_COLUMNS) * -(-frames // ROWS_IN_A_CHUNK) + 1
    blocks, single = divmod(card.num_shards, IN_A_BLOCK)
    tasks, scheduler = workers / shard_seconds, measure_scheduler()
    return {
        "frames": frames,
        "frames_per_shard": frames_per_shard,
        "shards": card.num_shards,
        "shard_bytes": card.shard_bytes(0),
        "token_bytes": card.token_bytes,
        "step_bytes": STEP_BYTES * frames,
        "record_bytes": int(measured["metadata"] * by_shard),
        "objects": card.num_shards + blocks + single + columns + len(STEP_COLUMNS) + 3,
        "frames_per_second": frames_per_second,
        "worker_hours": frames / frames_per_second / 3600,
        "hours": -(-card.num_shards // workers) * shard_seconds / 3600,
        "worker_memory": in_flight + STEP_BYTES * frames,
        "create": measured["create"] * frames / measured["frames"],
        "plan": measured["plan_again"] * by_shard,
        "finish": measured["finish"] * by_shard,
        "open": measured["open"] * by_shard,
        "commit_share": (measured["claim_us"] + measured["commit_us"]) / 1e6 / shard_seconds,
        "tasks_per_second": tasks,
        "scheduler_tasks_per_second": scheduler,
        "notes": _notes(card, workers, in_flight, busy=tasks > BUSY_SCHEDULER * scheduler),
    }


def _notes(card: StoreCard, workers: int, in_flight: int, *, busy: bool) -> list[str]:
    notes = []
    if card.num_shards > MOST_SHARDS:
        least = -(-card.frames // MOST_SHARDS)
        notes.append(f"dataset.json cannot list {card.num_shards} tars: use --frames-per-shard {least} or more")
    if busy:
        notes.append("one scheduler is too few: use batch arrays (wmcache sbatch), or a larger --frames-per-shard")
    if workers > card.num_shards:
        notes.append(f"{workers - card.num_shards} workers would have no shard: use a smaller --frames-per-shard")
    if STEP_BYTES * card.frames > in_flight + 2**30:
        notes.append("the step table is most of a worker's memory: several smaller datasets take less")
    return notes


def measure_scheduler() -> float:
    """Measure the tasks per second that a Dask scheduler of this machine gives to a worker whose tasks are empty."""
    with open_pool("local:1", threads=64, label="measure", always_dask=True) as pool:
        done, start, waiting = 0, 0.0, MEASURED_TASKS
        while done < MEASURED_TASKS:
            batch = min(pool.room, waiting)
            pool.submit((None, int) for _ in range(batch))
            waiting -= batch
            done += len(pool.finished())
            start = start or time.perf_counter()  # the first result includes set-up
    return MEASURED_TASKS / (time.perf_counter() - start)


def measure_encoder(encoder: Encoder, batch: int = 32) -> float:
    """Measure frames per second, on random frames at the encoder's own size."""
    rng = np.random.default_rng(0)
    size = (batch, *((2,) if encoder.lag else ()), encoder.image_size, encoder.image_size, 3)
    frames = rng.integers(0, 256, size, np.uint8)
    encoder(frames)  # the first call includes set-up
    start, turns = time.perf_counter(), 0
    while turns < 2 or time.perf_counter() - start < 1.0:
        encoder(frames)
        turns += 1
    return turns * batch / (time.perf_counter() - start)
