"""What benchmarks share: a clock that waits for the device, and ratios of contenders that took turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from wmcache.common.device import CPU, synchronise


def seconds(call: Callable[..., object], *args: Any, device: torch.device = CPU) -> float:
    """Time a call, from and to an idle device."""
    synchronise(device)
    start = time.perf_counter()
    call(*args)
    synchronise(device)
    return time.perf_counter() - start


def median_ratio(rates: Sequence[float], others: Sequence[float]) -> float:
    """Return the median over the turns of one contender's rate divided by another's."""
    return statistics.median(a / b for a, b in zip(rates, others, strict=True))
