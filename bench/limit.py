"""The limit of a machine, the rate of one large matrix product, and the operations of a call to compare with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from wmcache.bench.timing import seconds
from wmcache.common.device import is_cpu

CPU_SIZE, DEVICE_SIZE = 1024, 8192
"""Rows of the matrices, enough for the highest rate; an accelerator multiplies smaller ones in less time than a call takes."""
LEAST_SECONDS = 0.1


class MatmulLimit:
    """A large square matrix product in one precision, with the threads of this process; to be measured in turn with what it limits."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        """Create the matrices, and choose how many products a measurement has."""
        size = CPU_SIZE if is_cpu(device) else DEVICE_SIZE
        self._device, self._gflop = device, 2 * size**3 / 1e9
        self._factor = torch.randn(size, size, device=device, dtype=dtype)
        self._product = torch.empty_like(self._factor)
        self._repeats = 1
        _, once = self._seconds(), self._seconds()  # the first includes set-up
        self._repeats = max(1, round(LEAST_SECONDS / once))

    def gflops(self) -> float:
        """Measure GFLOP/s now."""
        return self._gflop * self._repeats / self._seconds()

    def _seconds(self) -> float:
        def multiply() -> None:
            for _ in range(self._repeats):
                torch.matmul(self._factor, self._factor, out=self._product)

        return seconds(multiply, device=self._device)


def count_flops(call: Callable[..., object], *args: Any) -> float:
    """Count the floating point operations of matrix products, convolutions and attention in a call, backward passes included."""
    with FlopCounterMode(display=False) as counter:
        call(*args)
    return float(counter.get_total_flops())
