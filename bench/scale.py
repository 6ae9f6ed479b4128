"""The cost of planning, claiming, committing, finishing and opening a store of any number of shards, measured without data.

The writer, the records and the opener are the real ones. Shards are empty files of the real size, and the records of all but the first
thousand shards are written a block at a time.
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

from wmcache.cache.identity import Identity
from wmcache.cache.layout import StoreCard, shard_file
from wmcache.cache.records import IN_A_BLOCK, Block, Record, Records, record_file
from wmcache.cache.store import TokenStore
from wmcache.cache.writer import StoreWriter
from wmcache.common.errors import UserError
from wmcache.common.jsonfiles import dump_json, seal
from wmcache.common.space import require_space

Result = TypeVar("Result")

COMMITTED = 100
"""Shards that are claimed, and whose records are synced to the disk one by one."""
IDENTITY = Identity("none", "none", "", "", "", 1, "", ((), ()), "float32", "float16", "none")


def measure_scale(
    shards: int, *, frames_per_shard: int = 512, tokens: int = 196, token_dim: int = 384, keep: Path | None = None
) -> dict[str, float]:
    """Create a store of so many shards, at least one, in a temporary folder and a process of its own, then delete it.

    Args:
        tokens, token_dim: DINOv2 ViT-S/14 at 196 px has 196 of 384.
        keep: folder to create it in and to leave it in.

    Returns:
        The cost beside the data, in seconds unless the name differs. `create`: the store without tokens, its step table included. `plan`,
        `plan_again`: list the pending shards, before and after all are written. `claim_us`: lock a shard. `commit_us`: write its record,
        and its share of the block. `finish`: statistics and checksums of all shards into the attributes. `open`: for training. `metadata`:
        bytes beside the shards. `peak_memory`: bytes of the process that did all of it, libraries included.

    Raises:
        UserError: too little space, or `keep` has such a store already.
    """
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
    writer, create = _timed(lambda: StoreWriter.create(path, card, IDENTITY, steps))
    pending, plan = _timed(writer.pending)
    if len(pending) != card.num_shards:
        raise UserError(f"not empty: {path}; choose another folder")
    for shard in tqdm(range(card.num_shards), desc="place shards", unit=" shards", disable=None):
        with Path(str(shard_file(path, shard))).open("wb") as file:
            file.truncate(card.shard_bytes(shard))
    claim_us, commit_us = _commit(path, card, writer)
    _, plan_again = _timed(writer.pending)
    _, finish = _timed(writer.finish)
    _, opening = _timed(lambda: TokenStore.open(path))
    beside = (found for found in path.rglob("*") if not found.name.startswith("c.") and found.is_file())
    return {
        "shards": card.num_shards,
        "frames": card.frames,
        "create": create,
        "plan": plan,
        "claim_us": claim_us,
        "commit_us": commit_us,
        "plan_again": plan_again,
        "finish": finish,
        "open": opening,
        "metadata": sum(found.stat().st_size for found in beside),
        "peak_memory": _peak_memory(),
    }


def _commit(path: Path, card: StoreCard, writer: StoreWriter) -> tuple[float, float]:
    """Write the records of all shards; returns microseconds of a claim and of a commit."""
    sums = np.random.default_rng(0).random(card.token_dim).tolist()
    record = Record((0, 1), card.shard_bytes(0), "ab" * 32, IDENTITY.digest(), sums, sums)
    records, tried = Records(path, card, IDENTITY), range(min(card.num_shards, COMMITTED))
    whole = card.num_shards - card.num_shards % IN_A_BLOCK

    def record_of(shard: int) -> Record:
        frames = card.shard_frames(shard)
        return replace(record, frames=(frames.start, frames.stop))

    def commit(shard: int) -> None:
        records.write(shard, record_of(shard))

    def claim(shard: int) -> None:
        with writer.claim(shard):
            pass

    _, claims = _timed(lambda: list(map(claim, tried)))
    _, commits = _timed(lambda: list(map(commit, tried)))
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
