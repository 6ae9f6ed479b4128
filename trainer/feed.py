"""The next batch, ready before it is asked for."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from wmcache.cache.windows import Windows, batch_windows


class Feed:
    """Batches of steps `first`, `first` + 1, …, read by one thread while the model works on the batch before.

    Attributes:
        device: where the batches are.
        waited: seconds that the training loop has waited for data so far.
    """

    def __init__(self, windows: Windows, batch: int, seed: int, device: torch.device, first: int = 0) -> None:
        """Args: `batch` windows each; the order is a function of `seed` and the step alone; start at step `first`."""
        self.waited = 0.0
        self.device = device
        self._windows, self._batch, self._seed = windows, batch, seed
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="feed")
        self._step = first
        # Two buffers in turn: the reader fills one while the model uses the other.
        self._buffers: list[NDArray[np.float16] | None] = [None, None]
        self._next: Future[dict[str, Tensor]] = self._pool.submit(self._read, first)

    def next(self) -> dict[str, Tensor]:
        """The next batch, on the device; valid until the next call, which lets its buffer be filled again."""
        start = time.perf_counter()
        batch = self._next.result()
        self.waited += time.perf_counter() - start
        self._step += 1
        self._next = self._pool.submit(self._read, self._step)
        return batch

    def _read(self, step: int) -> dict[str, Tensor]:
        windows = batch_windows(len(self._windows), self._seed, step, self._batch)
        data: dict[str, NDArray[Any]] = self._windows.batch(windows, self._buffers[step % 2])
        self._buffers[step % 2] = data["tokens"].reshape(-1, *data["tokens"].shape[2:])
        return {name: torch.from_numpy(value).to(self.device, non_blocking=True) for name, value in data.items()}

    def __enter__(self) -> Feed:
        """For `with`."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the reader."""
        self._pool.shutdown(wait=True, cancel_futures=True)
