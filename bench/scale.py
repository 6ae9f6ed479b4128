"""A store of any number of shards without data: what planning, claiming, committing, finishing and opening it cost.

The writer, the records and the opener are the real ones. What is made up is the work between them: shards are files without content, of
the size that they would have, and the records of all but the first thousands are written a block at a time.
"""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
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
"""Shards that are claimed, and whose records go to the disk, one after another."""


@dataclass(frozen=True)
class Scale:
    """What a store of so many shards costs beside its data; seconds, unless the name says otherwise.

    Attributes:
        shards, frames: counts.
        create: the store without tokens, its step table included.
        plan: which shards are to be done, of none done. plan_again: of all done.
        claim, commit: for a single shard, in microseconds: its lock; its record, with its share of the block.
        finish: statistics and checksums of all shards into the attributes.
        open: as training does.
        metadata: bytes beside the shards.
        peak_memory: bytes of the process that did all of it, libraries included.
    """

    shards: int
    frames: int
    create: float
    plan: float
    claim_us: float
    commit_us: float
    plan_again: float
    finish: float
    open: float
    metadata: int
    peak_memory: int


def measure_scale(
    shards: int, *, frames_per_shard: int = 512, tokens: int = 196, token_dim: int = 384, keep: Path | None = None
) -> Scale:
    """Make a store of so many shards in a temporary folder, in a process of its own, and delete it.

    Args:
        shards: how many, at least one.
        frames_per_shard, tokens, token_dim: of the store; DINOv2 ViT-S/14 at 196 px has 196 tokens of 384.
        keep: folder to make it in, and to leave it in.

    Raises:
        UserError: too little space.
    """
    with (
        tempfile.TemporaryDirectory(prefix="wmcache-scale-", dir=keep) as folder,
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process,
    ):
        place = keep or Path(folder)
        require_space(place, shards * (2 * 8 * token_dim + 1024), f"the records of {shards} shards")
        return process.submit(_measure, place / f"{shards}.zarr", shards, frames_per_shard, tokens, token_dim).result()


def _measure(path: Path, shards: int, frames_per_shard: int, tokens: int, token_dim: int) -> Scale:
    frames, side = shards * frames_per_shard, int(tokens**0.5)
    grid = (side, side) if side**2 == tokens else (1, tokens)
    card = StoreCard({"name": "none"}, {"name": "none"}, grid, token_dim, frames, frames_per_shard)
    identity = Identity("none", "none", "", "", "", 1, "", ((), ()), "float32", "float16", "none")
    rows = np.zeros((1, 4))
    steps: dict[str, NDArray[Any]] = {
        "action": np.broadcast_to(rows[:, :2].astype(np.float32), (frames, 2)),
        "state": np.broadcast_to(rows, (frames, 4)),
        "episode": np.broadcast_to(np.int32(0), (frames,)),
        "step": np.broadcast_to(np.int32(0), (frames,)),
    }
    writer, create = _timed(lambda: StoreWriter.create(path, card, identity, steps))
    pending, plan = _timed(writer.pending)
    if len(pending) != shards:
        raise UserError(f"{path} is not empty; choose another folder")
    for shard in tqdm(range(shards), desc="place shards", unit=" shards", disable=None):
        with Path(str(shard_file(path, shard))).open("wb") as file:
            file.truncate(card.shard_bytes(shard))
    sums = np.random.default_rng(0).random(token_dim)
    record = Record((0, 1), card.shard_bytes(0), "ab" * 32, identity.digest(), sums.tolist(), sums.tolist())
    records, tried = Records(path, card, identity), range(min(shards, COMMITTED))
    whole = shards - shards % IN_A_BLOCK

    def record_of(shard: int) -> Record:
        part = card.shard_frames(shard)
        return replace(record, frames=(part.start, part.stop))

    def claim() -> None:
        for shard in tried:
            with writer.claim(shard):
                pass

    def commit() -> None:
        for shard in tried:
            records.write(shard, record_of(shard))

    _, claims = _timed(claim)
    _, commits = _timed(commit)
    for shard in [*range(len(tried), min(whole, IN_A_BLOCK)), *range(max(whole, len(tried)), shards)]:
        # Not synced to the disk one by one, which is what takes long.
        Path(str(record_file(path, shard))).write_text(dump_json(seal(asdict(record_of(shard)))))
    _, folding = _timed(lambda: records.fold(0))
    for first in range(IN_A_BLOCK, whole, IN_A_BLOCK):
        records.write_block(Block.of(dict.fromkeys(range(first, first + IN_A_BLOCK), record)))
    left, plan_again = _timed(writer.pending)
    if left:
        raise UserError(f"{path} still lacks {len(left)} shards; this is a fault of wmcache")
    _, finish = _timed(writer.finish)
    _, opening = _timed(lambda: TokenStore.open(path))
    kept = (found for found in path.rglob("*") if not found.name.startswith("c.") and found.is_file())
    return Scale(
        shards=shards,
        frames=frames,
        create=create,
        plan=plan,
        claim_us=claims / len(tried) * 1e6,
        commit_us=(commits / len(tried) + folding / IN_A_BLOCK) * 1e6,
        plan_again=plan_again,
        finish=finish,
        open=opening,
        metadata=sum(found.stat().st_size for found in kept),
        peak_memory=_peak_memory(),
    )


def _peak_memory() -> int:
    """Bytes; what getrusage says on Linux begins with the parent's."""
    if not Path("/proc/self/status").exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _timed(work: Callable[[], Result]) -> tuple[Result, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start
