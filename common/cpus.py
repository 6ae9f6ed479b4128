"""Available CPUs, and the threads that compute on them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress

from wmcache.common.cgroups import control_groups

SPINS = {"GOMP_SPINCOUNT": "1000"}
"""Waiting OpenMP threads spin for milliseconds by default, which delays other programs on the same CPUs (measured in docs/cluster.md).

The variable is for GNU's OpenMP, which is in PyTorch's wheels for Linux."""

_set_here: dict[str, str] = {}


def available_cpus() -> int:
    """Return the CPUs that affinity, the quotas of control groups and SLURM_CPUS_PER_TASK leave this process; at least 1.

    joblib's and Dask's functions read only one control group, ignore SLURM, and take 0.2 s to import.
    """
    counts = [_affinity(), *map(math.ceil, _quotas())]
    asked = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if asked.isdecimal():
        counts.append(int(asked))
    return max(1, min(counts))


def own_cpus() -> int:
    """Return the CPUs that this process may keep busy: the available ones, or fewer where OMP_NUM_THREADS says so, as in workers."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return min(available_cpus(), max(1, int(threads))) if threads.isdecimal() else available_cpus()


def limit_threads(processes: int = 1) -> None:
    """Set the number of threads of each of `processes` that share the CPUs, and how long waiting threads spin.

    Variables that the user has set are not changed. OpenMP reads them when it is loaded, so call this before torch is imported.
    """
    limits: dict[str, str] = {}
    if "OMP_WAIT_POLICY" not in os.environ:
        limits |= SPINS
    share = max(1, available_cpus() // processes)
    # By default torch uses the physical cores of the affinity. It ignores quotas and SLURM.
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
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if version == 1 else ("cpu.max",)
        with suppress(OSError, ValueError, ZeroDivisionError):  # no such group, or "max": no limit
            quota, period = map(int, " ".join((folder / name).read_text() for name in names).split())
            if quota > 0:
                yield quota / period
