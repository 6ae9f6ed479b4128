"""How many CPUs this process may use, and how many threads compute on them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

from wmcache.common.cgroups import control_groups

SPINS = {"GOMP_SPINCOUNT": "1000"}
"""OpenMP threads spin while they wait, by default for milliseconds. Two programs on the same CPUs then wait for each other's idle threads.

docs/cluster.md has the measurements. The variable is that of GNU's OpenMP, which PyTorch's wheels for Linux contain."""

_set_here: dict[str, str] = {}


def available_cpus() -> int:
    """CPUs that this process may use: the least of its affinity, the quotas of its control groups and SLURM_CPUS_PER_TASK; at least 1.

    joblib's and Dask's functions look at one control group of those that hold, know nothing of SLURM, and take 0.2 s to import.
    """
    counts = [_affinity(), *map(math.ceil, _quotas())]
    asked = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if asked.isdecimal():
        counts.append(int(asked))
    return max(1, min(counts))


def limit_threads(processes: int = 1) -> None:
    """Set how many threads this process, or each process it starts, computes with, and how long they spin while they wait.

    Variables of the user stay as they are. OpenMP reads them when it is loaded, so call this before torch is imported.

    Args:
        processes: that share the available CPUs.
    """
    limits: dict[str, str] = {}
    if "OMP_WAIT_POLICY" not in os.environ:
        limits |= SPINS
    share = max(1, available_cpus() // processes)
    # Alone, torch counts by itself: physical cores, by affinity. It knows no quota and no SLURM.
    if processes > 1 or share < _affinity() or "OMP_NUM_THREADS" in _set_here:
        limits["OMP_NUM_THREADS"] = str(share)
    for name, value in limits.items():
        if os.environ.get(name) == _set_here.get(name):
            os.environ[name] = _set_here[name] = value


def _affinity() -> int:
    has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


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
