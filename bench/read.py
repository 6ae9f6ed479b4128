"""Reading windows: the store against a plain .npy file of the same bytes, the zarr API, and smaller formats of the same tokens."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from tqdm import tqdm
from zarr.codecs import BloscCodec, ZstdCodec

from wmcache.bench.timing import median_ratio, seconds
from wmcache.cache.identity import Identity
from wmcache.cache.layout import StoreCard
from wmcache.cache.reader import ZarrReader
from wmcache.cache.store import Tokens, TokenStore
from wmcache.cache.windows import Windows, batch_windows
from wmcache.cache.writer import StoreWriter
from wmcache.common.files import make_folder
from wmcache.common.paths import AnyPath
from wmcache.common.space import require_space

EPISODE = 100
FRAMES_PER_SHARD = 512
ROUNDS = 12
Read = Callable[[NDArray[np.int64], Tokens], object]
BATCHES = 6
"""In each round; the zarr API is so slow that it reads one."""


def bench_read(
    frames: int, *, tokens: int = 196, dim: int = 384, batch: int = 64, dtype: str = "float16", keep: Path | None = None
) -> dict[str, float]:
    """Read batches of random windows of 4 frames, 5 apart, from a store of random tokens [N, D] that is in the page cache.

    Contenders take turns, so that a drift of the machine affects all; ratios are medians over the turns. `keep` is a folder to leave the
    store (`bench.zarr`) and the plain file (`bench.npy`) in.

    Returns:
        Windows per second of `gather`; of `gather` on a store just opened, which maps the files and compares every checksum; of
        `numpy.take` from the memory-mapped file into the same buffer, in two modes; and of two methods of the zarr API; and ratios to
        them, for zarr to the faster one.
    """
    with nullcontext(keep) if keep else tempfile.TemporaryDirectory(prefix="wmcache-bench-") as name:
        folder = Path(name)
        make_folder(folder)
        card = StoreCard({}, {"name": "bench"}, (1, tokens), dim, frames, FRAMES_PER_SHARD, dtype)
        require_space(folder, 2 * card.token_bytes, "the benchmark")
        store = _make_store(folder / "bench.zarr", card)
        plain = _make_plain(folder / "bench.npy", store)
        return {"frames": frames, "windows_per_batch": batch, **_race(store, plain, batch)}


def _race(store: TokenStore, plain: NDArray[np.generic], batch: int) -> dict[str, float]:
    windows = store.windows(history=3, predict=1, frameskip=5)
    array = zarr.open_group(store.path, mode="r")["tokens"]
    assert isinstance(array, zarr.Array)
    out = np.empty((batch * windows.length, *store.card.frame_shape), store.card.dtype)
    fresh = store
    contenders: dict[str, Callable[[NDArray[np.int64]], object]] = {
        "gather": lambda frames: store.gather_stored(frames.ravel(), out),
        "first_gather": lambda frames: fresh.gather_stored(frames.ravel(), out),
        "memmap_take": lambda frames: np.take(plain, frames.ravel(), axis=0, out=out),
        # Frames out of range would be clipped; without that check numpy need not copy through a temporary.
        "memmap_take_clip": lambda frames: np.take(plain, frames.ravel(), axis=0, out=out, mode="clip"),
        "zarr_slices": lambda frames: [array[row[0] : row[-1] + 1 : windows.frameskip] for row in frames],
        "zarr_oindex": lambda frames: array.oindex[np.unique(frames)],
    }
    for part in np.array_split(np.arange(len(store)), -(-len(store) // len(out))):
        store.gather_stored(part, out[: len(part)])  # every page mapped, every checksum compared
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    step, names = 0, list(contenders)
    for turn in tqdm(range(ROUNDS), desc="bench read", unit=" rounds"):
        fresh = TokenStore.open(store.path)
        first = turn % len(names)
        for name in names[first:] + names[:first]:  # so that none always runs after the one that fills the caches
            batches = 1 if name.startswith("zarr") else BATCHES
            chosen = [_frames(windows, step + i, batch) for i in range(batches)]
            step += batches
            rates[name].append(batch * batches / seconds(list, map(contenders[name], chosen)))
    peers = {name: rates[name] for name in ("memmap_take", "memmap_take_clip")}
    peers["zarr"] = list(map(max, rates["zarr_slices"], rates["zarr_oindex"]))
    medians = {f"{name}_windows_per_second": statistics.median(values) for name, values in rates.items()}
    return medians | {f"ratio_to_{name}": median_ratio(rates["gather"], peer) for name, peer in peers.items()}


def _frames(windows: Windows, step: int, batch: int) -> NDArray[np.int64]:
    return windows.frames(batch_windows(len(windows), 0, step, batch))


def _make_store(path: Path, card: StoreCard) -> TokenStore:
    content = f"{card.frames} x {card.frame_shape}"
    known = ("bench", "none", "", "none", "patch", 0, "none", ((0.5,), (0.5,)), "float32")
    identity, frame = Identity(*known, card.dtype, content), np.arange(card.frames)
    steps: dict[str, NDArray[Any]] = {
        "action": np.zeros((card.frames, 2), np.float32),
        "state": np.zeros((card.frames, 4)),
        "episode": (frame // EPISODE).astype(np.int32),
        "step": (frame % EPISODE).astype(np.int32),
    }

    def tokens_of(part: range) -> Tokens:
        rng = np.random.default_rng(part.start // FRAMES_PER_SHARD)
        return rng.standard_normal((len(part), *card.frame_shape), dtype=np.float32).astype(np.float16)

    return _write(StoreWriter.create(path, card, identity, steps), tokens_of)


def _write(writer: StoreWriter, tokens_of: Callable[[range], Tokens]) -> TokenStore:
    for shard in tqdm(writer.pending(), desc="write", unit=" shards"):
        writer.write_shard(shard, tokens_of(writer.card.shard_frames(shard)))
    writer.finish()
    return TokenStore.open(writer.path)


def _make_plain(path: Path, store: TokenStore) -> NDArray[np.generic]:
    shape = (len(store), *store.card.frame_shape)
    plain = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(store.card.dtype), shape=shape)
    for shard in range(store.card.num_shards):
        part = store.card.shard_frames(shard)
        store.gather_stored(np.arange(part.start, part.stop), plain[part.start : part.stop])
    plain.flush()
    loaded: NDArray[np.generic] = np.load(path, mmap_mode="r")
    np.max(loaded.view(np.uint8))  # all of it into the page cache
    return loaded


def bench_codecs(path: AnyPath, *, frames: int = 2000, batch: int = 64) -> list[dict[str, Any]]:
    """Measure the size and the reading speed of a store's first frames in smaller formats.

    Returns:
        For each format: `size`, its share of plain float16's bytes; `speed`, windows of 4 frames per second as a share of plain float16's
        through memory maps; `relative_error`, the norm of the difference over that of the tokens.
    """
    source = TokenStore.open(path)
    count = min(frames, len(source))
    card = replace(source.card, frames=count, frames_per_shard=min(source.card.frames_per_shard, count))
    tokens = source.gather(np.arange(count))
    with tempfile.TemporaryDirectory(prefix="wmcache-bench-") as folder:
        readers, sizes = _make_formats(source, tokens, card, Path(folder))
        windows = TokenStore.open(Path(folder) / "float16.zarr").windows(history=3, predict=1, frameskip=5)
        out = np.empty((batch * windows.length, *card.frame_shape), np.float16)
        speeds: dict[str, list[float]] = {name: [] for name in readers}
        for turn in tqdm(range(ROUNDS), desc="bench codecs", unit=" rounds"):
            chosen = _frames(windows, turn, batch).ravel()
            for name, read in readers.items():
                speeds[name].append(batch / seconds(read, chosen, out))
        rows, found, wide = [], np.empty_like(tokens), tokens.astype(np.float32)
        for name, read in readers.items():
            read(np.arange(count), found)
            error = np.linalg.norm(found.astype(np.float32) - wide) / np.linalg.norm(wide)
            size, speed = sizes[name] / sizes["float16"], median_ratio(speeds[name], speeds["float16"])
            rows.append({"form": name, "size": size, "speed": speed, "relative_error": float(error)})
    return rows


def _make_formats(
    source: TokenStore, tokens: Tokens, card: StoreCard, folder: Path
) -> tuple[dict[str, Read], dict[str, int]]:
    """Write the tokens in every format; returns by name how to read it, and its bytes."""
    readers: dict[str, Read] = {}
    sizes: dict[str, int] = {}
    steps = {name: values[: card.frames] for name, values in source.step_columns().items()}
    for dtype in ("float16", "int8"):
        identity, stored = replace(source.identity, store_dtype=dtype), replace(card, dtype=dtype)
        writer = StoreWriter.create(folder / f"{dtype}.zarr", stored, identity, steps)
        store = _write(writer, lambda part: tokens[part.start : part.stop])
        readers[dtype], sizes[dtype] = store.gather, stored.token_bytes
    compressors = {"zstd": ZstdCodec(), "blosc lz4 shuffled": BloscCodec(cname="lz4", shuffle="shuffle")}
    for name, codec in compressors.items():
        array = zarr.create_array(
            folder / name,
            shape=tokens.shape,
            chunks=(1, *card.frame_shape),
            shards=(card.frames_per_shard, *card.frame_shape),
            dtype="float16",
            compressors=codec,
            fill_value=float("nan"),
        )
        array[:] = tokens
        readers[name], sizes[name] = ZarrReader(array, card, folder / name).gather, array.nbytes_stored()
    return readers, sizes
