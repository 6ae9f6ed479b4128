"""The resources of a large extraction, estimated before machines are requested, from rates measured on stores without data.

Writer, records and opener are the real ones. Shards are empty files of the real size, and most records are written a block at a time.
"""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from wmcache.cache.arrays import ROWS_IN_A_CHUNK
from wmcache.cache.identity import Identity
from wmcache.cache.layout import STEP_COLUMNS, StoreCard, shard_file
from wmcache.cache.records import IN_A_BLOCK, Block, Record, Records, record_file
from wmcache.cache.store import TokenStore
from wmcache.cache.writer import StoreWriter
from wmcache.cluster.tasks import open_pool
from wmcache.common.errors import UserError
from wmcache.common.files import make_folder
from wmcache.common.jsonfiles import MOST_JSON_BYTES, dump_json, seal
from wmcache.common.space import require_space
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.extract import TASKS_IN_FLIGHT
from wmcache.pipeline.frames import FRAMES_PER_SHARD

Result = TypeVar("Result")

MEASURED_SHARDS = IN_A_BLOCK
MEASURED_TASKS = 2000
COMMITTED = 100
"""Shards that are claimed, and whose records are synced to the disk one by one."""
TAR_RECORD_BYTES = 150
"""Of a tar in dataset.json."""
STEP_BYTES = 48
"""Of a frame in the step table, in memory: two actions, four states, episode, step."""
BUSY_SCHEDULER = 0.5
"""Share of a scheduler's tasks per second beyond which workers wait for it."""
MOST_SHARDS = MOST_JSON_BYTES // TAR_RECORD_BYTES
IDENTITY = Identity("none", "none", "", "", "", 1, "", ((), ()), "float32", "float16", "none")


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
        frames_per_second: of one worker.
        frames_per_shard: None takes as many as one dataset.json needs to list its tars.

    Returns:
        Bytes and seconds unless the name differs. `objects`: files of the store. `step_bytes`: step table in memory, of each worker and of
        the process that creates the store. `worker_hours`: of all workers together. `hours`: wall time. `worker_memory`: shards in flight
        and the step table, without encoder and libraries. `create`, `plan`, `finish`, `open`: see `measure_scale`; upper bounds, since
        constant parts are multiplied too. `commit_share`: share of a shard's time for its claim and record. `notes`: problems, each with
        the setting that fixes it.
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
    least = -(-card.frames // MOST_SHARDS)
    notes = {
        f"dataset.json cannot list {card.num_shards} tars: use --frames-per-shard {least} or more": (
            card.num_shards > MOST_SHARDS
        ),
        "one scheduler is too few: use batch arrays (wmcache sbatch), or a larger --frames-per-shard": busy,
        f"only {card.num_shards} of {workers} workers would have a shard: use a smaller --frames-per-shard": (
            workers > card.num_shards
        ),
        "the step table is most of a worker's memory: several smaller datasets take less": (
            STEP_BYTES * card.frames > in_flight + 2**30
        ),
    }
    return [note for note, applies in notes.items() if applies]


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
    size = (batch, *((2,) if encoder.lag else ()), encoder.image_size, encoder.image_size, 3)
    frames = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    encoder(frames)  # the first call includes set-up
    start, turns = time.perf_counter(), 0
    while turns < 2 or time.perf_counter() - start < 1.0:
        encoder(frames)
        turns += 1
    return turns * batch / (time.perf_counter() - start)


def measure_scale(
    shards: int, *, frames_per_shard: int = 512, tokens: int = 196, token_dim: int = 384, keep: Path | None = None
) -> dict[str, float]:
    """Create a store of so many shards in a temporary folder, or in `keep`, by a process of its own.

    Returns:
        The cost beside the data, in seconds unless the name differs. `create`: the store without tokens, its step table included. `plan`,
        `plan_again`: list the pending shards, before and after all are written. `claim_us`: lock a shard. `commit_us`: write its record,
        and its share of the block. `finish`: statistics and checksums of all shards into the attributes. `open`: for training. `metadata`:
        bytes beside the shards. `peak_memory`: bytes of the process that did all of it, libraries included.

    Raises:
        UserError: too little space, or `keep` has such a store already.
    """
    if keep is not None:
        make_folder(keep)
    with (
        tempfile.TemporaryDirectory(prefix="wmcache-scale-", dir=keep) as folder,
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process,
    ):
        parent = keep or Path(folder)
        require_space(parent, shards * (2 * 8 * token_dim + 1024), f"the records of {shards} shards")
        side = int(tokens**0.5)
        grid = (side, side) if side**2 == tokens else (1, tokens)
        frames = shards * frames_per_shard
        card = StoreCard({"name": "none"}, {"name": "none"}, grid, token_dim, frames, frames_per_shard)
        return process.submit(_measure, parent / f"{shards}.zarr", card).result()


def _measure(path: Path, card: StoreCard) -> dict[str, float]:
    action = np.broadcast_to(np.float32(0), (card.frames, 2))
    state = np.broadcast_to(np.float64(0), (card.frames, 4))
    number = np.broadcast_to(np.int32(0), card.frames)
    steps: dict[str, Any] = {"action": action, "state": state, "episode": number, "step": number}
    found: dict[str, float] = {"shards": card.num_shards, "frames": card.frames}
    writer, found["create"] = _timed(lambda: StoreWriter.create(path, card, IDENTITY, steps))
    pending, found["plan"] = _timed(writer.pending)
    if len(pending) != card.num_shards:
        raise UserError(f"not empty: {path}; choose another folder")
    for shard in tqdm(range(card.num_shards), desc="place shards", unit=" shards", disable=None):
        with Path(str(shard_file(path, shard))).open("wb") as tokens:
            tokens.truncate(card.shard_bytes(shard))
    found["claim_us"], found["commit_us"] = _commit(path, card, writer)
    _, found["plan_again"] = _timed(writer.pending)
    _, found["finish"] = _timed(writer.finish)
    _, found["open"] = _timed(lambda: TokenStore.open(path))
    beside = (file for file in path.rglob("*") if not file.name.startswith("c.") and file.is_file())
    return {**found, "metadata": sum(file.stat().st_size for file in beside), "peak_memory": _peak_memory()}


def _commit(path: Path, card: StoreCard, writer: StoreWriter) -> tuple[float, float]:
    """Write the records of all shards; returns microseconds of a claim and of a commit."""
    sums = np.random.default_rng(0).random(card.token_dim).tolist()
    record = Record((0, 1), card.shard_bytes(0), "ab" * 32, IDENTITY.digest(), sums, sums)
    records, tried = Records(path, card, IDENTITY), range(min(card.num_shards, COMMITTED))
    whole = card.num_shards - card.num_shards % IN_A_BLOCK

    def record_of(shard: int) -> Record:
        frames = card.shard_frames(shard)
        return replace(record, frames=(frames.start, frames.stop))

    def claim(shard: int) -> None:
        with writer.claim(shard):
            pass

    _, claims = _timed(lambda: list(map(claim, tried)))
    _, commits = _timed(lambda: list(map(records.write, tried, map(record_of, tried))))
    for shard in [*range(len(tried), min(whole, IN_A_BLOCK)), *range(max(whole, len(tried)), card.num_shards)]:
        # Not synced one by one, which takes long.
        Path(str(record_file(path, shard))).write_text(dump_json(seal(asdict(record_of(shard)))))
    _, folding = _timed(lambda: records.fold(0))
    for first in range(IN_A_BLOCK, whole, IN_A_BLOCK):
        records.write_block(Block.of(dict.fromkeys(range(first, first + IN_A_BLOCK), record)))
    return claims / len(tried) * 1e6, (commits / len(tried) + folding / IN_A_BLOCK) * 1e6


def _peak_memory() -> int:
    """Return bytes; on Linux getrusage would start with the parent's."""
    if not Path("/proc/self/status").exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _timed(work: Callable[[], Result]) -> tuple[Result, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start
