"""The next batch, ready before it is asked for, from wherever the tokens are kept.

Tokens reside on the device where they fit there with room to spare, else in main memory, else they stay on disk: then the frames of the
batches to come are asked of the operating system two steps ahead, and memory holds no more than two batches.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wmcache.cache.store import TokenStore
from wmcache.cache.windows import Windows, batch_windows
from wmcache.common.device import Transfer, is_cpu
from wmcache.common.errors import UserError
from wmcache.common.memory import available_ram, free_memory
from wmcache.common.space import human_bytes

RESIDENCES = ("device", "ram", "disk")
ROOM_TO_SPARE = 2.0
"""Tokens move in only where there is this many times their size: the model, its activations and others need room too."""
STEPS_AHEAD = 2


def choose_residence(
    store: TokenStore, device: torch.device, wanted: str = "auto", sharing: int = 1
) -> tuple[str, str]:
    """Where to keep a store's tokens while training.

    Args:
        store: whose tokens.
        device: that trains.
        wanted: `auto`, or the answer.
        sharing: processes of this machine that keep tokens for themselves: each has a device of its own, main memory is for all.

    Returns:
        `device`, `ram` or `disk`; and a line for people that says why.

    Raises:
        UserError: an unknown residence.
    """
    if wanted not in ("auto", *RESIDENCES):
        raise UserError(f"no residence {wanted!r}; known are auto, {', '.join(RESIDENCES)}")
    size = store.card.token_bytes
    on_device = 0 if is_cpu(device) else free_memory(device)
    in_ram = available_ram() // sharing
    if wanted == "auto":
        fits = {"device": size * ROOM_TO_SPARE <= on_device, "ram": size * ROOM_TO_SPARE <= in_ram, "disk": True}
        wanted = next(residence for residence in RESIDENCES if fits[residence])
    free = f"{human_bytes(in_ram)} of main memory free{' for each process' if sharing > 1 else ''}"
    if not is_cpu(device):
        free = f"{human_bytes(on_device)} free on {device.type}, " + free
    return wanted, f"{human_bytes(size)} of tokens {'in' if wanted == 'ram' else 'on'} {wanted} ({free})"


class Feed:
    """Batches of steps `first`, `first` + 1, …, made by one thread while the model works on the batch before.

    Attributes:
        device: where the batches are.
        waited: seconds that the training loop has waited for data so far.
    """

    def __init__(
        self,
        store: TokenStore,
        windows: Windows,
        batch: int,
        seed: int,
        device: torch.device,
        first: int = 0,
        residence: str = "disk",
        rank: int = 0,
        world_size: int = 1,
        changes: TokenStore | None = None,
    ) -> None:
        """Start reading.

        Args:
            store: the tokens. windows: of that store.
            batch: windows in each batch of all processes together.
            seed: of the order, which depends on it and the step alone.
            device: where batches go.
            first: number of the first step.
            residence: as `choose_residence` answers.
            rank, world_size: which slice of each batch is ours, see `batch_windows`.
            changes: the change maps of the store, where batches shall have them.

        Raises:
            UserError: the tokens do not fit where they shall be.
        """
        self.waited = 0.0
        self.device = device
        self._store, self._windows, self._batch, self._seed = store, windows, batch, seed
        self._rank, self._world_size, self._changes = rank, world_size, changes
        self._transfer = Transfer(device)
        self._table: Tensor | None = None
        if residence == "ram" or (residence == "device" and is_cpu(device)):
            store.load(quiet=rank > 0)
        elif residence == "device":
            self._table = load_on_device(store, device)
        self._scale = None if store.scale is None else torch.from_numpy(store.scale).to(device)
        # Two buffers in turn: the reader fills one while the other is in use.
        shape = (batch // world_size * windows.length, *store.card.frame_shape)
        dtype = torch.float16 if is_cpu(device) else getattr(torch, store.card.dtype)
        self._buffers = [] if self._table is not None else [self._transfer.buffer(shape, dtype) for _ in range(2)]
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="feed")
        self._step = first
        self._next: Future[dict[str, Tensor]] = self._pool.submit(self._read, first)

    def next(self) -> dict[str, Tensor]:
        """The next batch, on the device, keyed as `Windows.batch`; valid until the next call, which lets its buffer be filled again."""
        start = time.perf_counter()
        batch = self._next.result()
        self.waited += time.perf_counter() - start
        self._step += 1
        self._next = self._pool.submit(self._read, self._step)
        self._transfer.hand_over(batch)
        return batch

    def _frames(self, step: int) -> NDArray[np.int64]:
        return self._windows.frames(
            batch_windows(len(self._windows), self._seed, step, self._batch, self._rank, self._world_size)
        )

    def _read(self, step: int) -> dict[str, Tensor]:
        frames = self._frames(step)
        if self._table is None:
            self._store.prefetch(self._frames(step + STEPS_AHEAD).ravel())
        with self._transfer:
            data = {
                name: torch.from_numpy(value).to(self.device) for name, value in self._windows.steps(frames).items()
            }
            if self._changes is not None:
                data["changes"] = torch.from_numpy(gather_changes(self._changes, frames)).to(self.device)
            tokens = self._tokens(frames.ravel(), step)
            return {"tokens": tokens.view(*frames.shape, *tokens.shape[1:]), **data}

    def _tokens(self, frames: NDArray[np.int64], step: int) -> Tensor:
        """float16 [n, N, D] on the device."""
        if is_cpu(self.device):
            tokens = self._buffers[step % 2]
            self._store.gather(frames, tokens.numpy())
            return tokens
        if self._table is not None:
            stored = self._table.index_select(0, torch.from_numpy(frames).to(self.device))
        else:
            # What windows share is read and sent once, and copied to its places over there.
            unique, places = np.unique(frames, return_inverse=True)
            buffer = self._buffers[step % 2][: len(unique)]
            self._store.gather_stored(unique, buffer.numpy())
            stored = self._transfer.send(buffer).index_select(0, torch.from_numpy(places).to(self.device))
        if self._scale is None:
            return stored
        scale = self._scale[torch.from_numpy(frames // self._store.card.frames_per_shard).to(self.device)]
        return (stored * scale[:, :1] + scale[:, 1:]).to(torch.float16)

    def __enter__(self) -> Feed:
        """For `with`."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the reader."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def gather_changes(changes: TokenStore, frames: NDArray[np.int64]) -> NDArray[np.float16]:
    """Change maps of the frames [B, T] of some windows, [B, T, N, 4]."""
    return changes.gather(frames.ravel()).reshape(*frames.shape, *changes.card.frame_shape)


def load_on_device(store: TokenStore, device: torch.device) -> Tensor:
    """All tokens of a store, in its own dtype, [frames, N, D]; main memory holds a shard at a time.

    Raises:
        UserError: they do not fit.
    """
    try:
        table = torch.empty(
            (len(store), *store.card.frame_shape), dtype=getattr(torch, store.card.dtype), device=device
        )
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{device.type} has no room for {human_bytes(store.card.token_bytes)} of tokens; choose --residence ram or disk"
        ) from error
    for shard in range(store.card.num_shards):
        part = store.card.shard_frames(shard)
        table[part.start : part.stop] = torch.from_numpy(store.gather_stored(np.arange(part.start, part.stop)))
    return table
