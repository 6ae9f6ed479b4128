"""Batches of windows, read ahead of the training loop from the device, main memory, or the disk."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wmcache.cache.quantise import restore
from wmcache.cache.store import TokenStore
from wmcache.cache.windows import Windows, batch_windows, goal_draws
from wmcache.common.device import Transfer, is_cpu
from wmcache.common.errors import UserError
from wmcache.common.memory import available_ram, free_memory
from wmcache.common.space import human_bytes

RESIDENCES = ("device", "ram", "disk")
ROOM_TO_SPARE = 2.0  # free memory as a multiple of the tokens' size: the model and its activations need room too
STEPS_AHEAD = 2


def choose_residence(
    store: TokenStore, device: torch.device, wanted: str = "auto", sharing: int = 1
) -> tuple[str, str]:
    """Choose where to keep a store's tokens while training, and the reason for the log.

    Args:
        wanted: one of RESIDENCES, or `auto`: the first with room to spare.
        sharing: processes of this machine that each keep the tokens; each has its own device, and they share main memory.
    """
    if wanted not in ("auto", *RESIDENCES):
        raise UserError(f"no residence {wanted!r}; known are auto, {', '.join(RESIDENCES)}")
    size = store.card.token_bytes
    on_device = 0 if is_cpu(device) else free_memory(device)
    in_ram = available_ram() // sharing
    if wanted == "auto":
        fits = {"device": size * ROOM_TO_SPARE <= on_device, "ram": size * ROOM_TO_SPARE <= in_ram, "disk": True}
        wanted = next(residence for residence in RESIDENCES if fits[residence])
    free = "" if is_cpu(device) else f"{human_bytes(on_device)} free on {device.type}, "
    free += f"{human_bytes(in_ram)} of main memory free for each process"
    return wanted, f"{human_bytes(size)} of tokens {'in' if wanted == 'ram' else 'on'} {wanted} ({free})"


class Feed(AbstractContextManager["Feed"]):
    """Batches of steps `first`, `first` + 1, …; a thread reads the next one. `waited`: seconds of waiting for data so far."""

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
    ) -> None:
        """Start reading; raises UserError where the tokens do not fit into the residence.

        Args:
            batch: windows in each batch of all processes together.
            seed: of the order, which depends on it and the step alone.
            rank, world_size: the slice of each batch to read, see `batch_windows`.
        """
        self.waited = 0.0
        self.device = device
        self._store, self._windows, self._batch, self._seed = store, windows, batch, seed
        self._rank, self._world_size = rank, world_size
        self._transfer = Transfer(device)
        self._table: Tensor | None = None
        if residence == "ram" or (residence == "device" and is_cpu(device)):
            store.load(quiet=rank > 0)
        elif residence == "device":
            self._table = load_on_device(store, device)
        self._scale = None if store.scale is None else torch.from_numpy(store.scale).to(device)
        # The reader fills one buffer while the other is in use.
        shape = (batch // world_size * windows.gathered, *store.card.frame_shape)
        dtype = torch.float16 if is_cpu(device) else getattr(torch, store.card.dtype)
        self._buffers = [] if self._table is not None else [self._transfer.buffer(shape, dtype) for _ in range(2)]
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="feed")
        self._step = first
        self._next: Future[dict[str, Tensor]] = self._pool.submit(self._read, first)

    def next(self) -> dict[str, Tensor]:
        """Return the next batch, see `Windows.batch`, on the device; valid until the next call, which fills its buffer again."""
        start = time.perf_counter()
        batch = self._next.result()
        self.waited += time.perf_counter() - start
        self._step += 1
        self._next = self._pool.submit(self._read, self._step)
        self._transfer.hand_over(batch)
        return batch

    def _chosen(self, step: int) -> NDArray[np.int64]:
        return batch_windows(len(self._windows), self._seed, step, self._batch, self._rank, self._world_size)

    def _draws(self, step: int) -> NDArray[np.float64] | None:
        if self._windows.goals is None:
            return None
        return goal_draws(self._seed, step, self._batch, self._rank, self._world_size)

    def _read(self, step: int) -> dict[str, Tensor]:
        windows, chosen = self._windows, self._chosen(step)
        if self._table is None:
            ahead = step + STEPS_AHEAD
            following, _ = windows.with_goals(windows.frames(self._chosen(ahead)), self._draws(ahead))
            self._store.prefetch(following.ravel())
        with self._transfer:
            if is_cpu(self.device):
                data = windows.batch(chosen, self._buffers[step % 2].numpy(), self._draws(step))
                return {name: torch.from_numpy(value) for name, value in data.items()}
            frames = windows.frames(chosen)
            gathered, goal = windows.with_goals(frames, self._draws(step))
            rows = {**goal, **windows.steps(frames)}
            steps = {name: torch.from_numpy(value).to(self.device) for name, value in rows.items()}
            tokens = self._tokens(gathered.ravel(), step)
            return {**windows.split(tokens.view(*gathered.shape, *tokens.shape[1:])), **steps}

    def _tokens(self, frames: NDArray[np.int64], step: int) -> Tensor:
        """Read frames onto an accelerator and dequantise them there, float16 [n, N, D]."""
        if self._table is not None:
            stored = self._table.index_select(0, torch.from_numpy(frames).to(self.device))
        else:
            # Frames that windows share are read and sent once.
            unique, rows = np.unique(frames, return_inverse=True)
            buffer = self._buffers[step % 2][: len(unique)]
            self._store.gather_stored(unique, buffer.numpy())
            stored = self._transfer.send(buffer).index_select(0, torch.from_numpy(rows).to(self.device))
        if self._scale is None:
            return stored
        scale = self._scale[torch.from_numpy(self._store.shard_of(frames)).to(self.device)]
        return restore(stored, scale[:, 0], scale[:, 1]).to(torch.float16)

    def __exit__(self, *_: object) -> None:
        """Stop the reader."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def load_on_device(store: TokenStore, device: torch.device) -> Tensor:
    """Load all tokens of a store in its own dtype, [frames, N, D], by shards; raises UserError where they do not fit."""
    shape = (len(store), *store.card.frame_shape)
    try:
        table = torch.empty(shape, dtype=getattr(torch, store.card.dtype), device=device)
    except torch.OutOfMemoryError as error:
        size = human_bytes(store.card.token_bytes)
        raise UserError(f"{device.type} has no room for {size} of tokens; choose --residence ram or disk") from error
    for shard in range(store.card.num_shards):
        part = store.card.shard_frames(shard)
        table[part.start : part.stop] = torch.from_numpy(store.gather_stored(np.arange(part.start, part.stop)))
    return table
