"""How many CPUs this process may use."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

from wmcache.cache.cgroups import control_groups


def available_cpus() -> int:
    """CPUs that this process may use: the least of its affinity, the quotas of its control groups and SLURM_CPUS_PER_TASK; at least 1.

    joblib's and Dask's functions look at one control group of those that hold, know nothing of SLURM, and take 0.2 s to import.
    """
    has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS
    counts = [len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1]
    counts += map(math.ceil, _quotas())
    asked = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if asked.isdecimal():
        counts.append(int(asked))
    return max(1, min(counts))


def _quotas() -> Iterator[float]:
    for version, folder in control_groups("cpu"):
        try:
            if version == 1:
                quota, period = (_read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
            else:
                quota, period = _read(folder / "cpu.max").split()
            if int(quota) > 0:
                yield int(quota) / int(period)
        except (OSError, ValueError, ZeroDivisionError):  # no such group, or "max": no limit
            continue


def _read(file: Path) -> str:
    return file.read_text().strip()
