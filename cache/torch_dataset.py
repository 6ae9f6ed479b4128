"""Windows as a `torch.utils.data.Dataset`, for training code of others."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from wmcache.cache.windows import Windows


class WindowDataset(Dataset[dict[str, Tensor]]):
    """Windows for a `DataLoader` with any number of workers, forked or spawned: each opens the store again.

    An item is what `Windows.batch` returns, of one window: tokens float16 [T, N, D], proprio float32 [T, P], action float32 [T, f * A],
    and where the store has them reward float32 [T] and terminated bool [T].

    Attributes:
        windows: in the order of the items.
    """

    def __init__(self, windows: Windows) -> None:
        """Take windows; raises ValueError where they have goals, which are drawn for each step of a training."""
        if windows.goals is not None:
            raise ValueError("a dataset of windows has no goals")
        self.windows, self._process = windows, os.getpid()

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.windows)

    def __getitem__(self, window: int) -> dict[str, Tensor]:
        """Read a window; raises IndexError where there is none, UserError as `TokenStore.gather`."""
        return self.__getitems__([window])[0]

    def __getitems__(self, windows: Sequence[int]) -> list[dict[str, Tensor]]:
        """Read several windows at once, as a `DataLoader` asks for a batch; raises as `__getitem__`."""
        wanted = np.asarray(windows, np.int64)
        if outside := [number for number in wanted.tolist() if not -len(self) <= number < len(self)]:
            raise IndexError(f"window {outside[0]} of {len(self)}")
        if self._process != os.getpid():  # open files and connections of the process that forked are its own
            self.windows = replace(self.windows, source=self.windows.source.open_again())
            self._process = os.getpid()
        batch = {name: torch.from_numpy(values) for name, values in self.windows.batch(wanted % len(self)).items()}
        return [{name: values[row] for name, values in batch.items()} for row in range(len(wanted))]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of another process; unpickling has opened the store here."""
        self.__dict__ |= {**state, "_process": os.getpid()}
