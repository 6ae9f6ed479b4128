"""Available memory, by the tightest limit of this process."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

import psutil

from wmcache.common.cgroups import control_groups

if TYPE_CHECKING:
    import torch


def free_memory(device: torch.device) -> int:
    """Return the free bytes on a device; for the CPU, of main memory."""
    if device.type == "cuda":
        import torch  # slow to import, and not needed to read stores

        return int(torch.cuda.mem_get_info(device)[0])
    return available_ram()


def available_ram() -> int:
    """Return the bytes of main memory that the machine, the control groups and `ulimit -v` leave this process."""
    limits = [psutil.virtual_memory().available, *_left_in_groups()]
    if (addresses := address_space_left()) is not None:
        limits.append(addresses)
    return max(0, min(limits))


def address_space_left() -> int | None:
    """Return the bytes below `ulimit -v`, which memory maps count against too; None where there is no limit."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else max(0, limit - psutil.Process().memory_info().vms)


def _left_in_groups() -> Iterator[int]:
    """Yield what the limits of a batch system or container leave; cached pages of files do not count as used."""
    for version, folder in control_groups("memory"):
        if version == 1:
            limit, used, prefix = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        else:
            limit, used, prefix = "memory.max", "memory.current", ""
        with suppress(OSError, ValueError):  # no such group, or "max": no limit
            most = int((folder / limit).read_text())
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cached = sum(int(statistics.get(f"{prefix}{name}_file", 0)) for name in ("inactive", "active"))
            yield most - max(0, int((folder / used).read_text()) - cached)
