"""How much memory there is, by the tightest of the limits that hold for this process."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from wmcache.common.cgroups import control_groups

if TYPE_CHECKING:
    import torch


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on a device; for the CPU, of main memory."""
    if device.type == "cuda":
        import torch  # a reader of stores that asks for address space need not pay for it

        return int(torch.cuda.mem_get_info(device)[0])
    return available_ram()


def available_ram() -> int:
    """Bytes of main memory that this process can still get: of the machine, of its control group, and below its `ulimit -v`."""
    limits = [psutil.virtual_memory().available]
    if (group := _control_group()) is not None:
        limits.append(group)
    if (addresses := address_space_left()) is not None:
        limits.append(addresses)
    return max(0, min(limits))


def address_space_left() -> int | None:
    """Bytes below `ulimit -v`, which memory maps count against too; None where there is no limit."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else max(0, limit - psutil.Process().memory_info().vms)


def _control_group() -> int | None:
    """What a batch system or a container leaves of its limit; pages of files do not count as used, they make room."""
    found = []
    for version, folder in control_groups("memory"):
        if version == 1:
            limit, used, cached = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        else:
            limit, used, cached = "memory.max", "memory.current", ""
        found += _left(folder, limit, used, f"{cached}inactive_file", f"{cached}active_file")
    return min(found, default=None)


def _left(folder: Path, limit: str, used: str, *cached: str) -> list[int]:
    try:
        most = int((folder / limit).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        pages = sum(int(statistics.get(name, 0)) for name in cached)
        return [most - max(0, int((folder / used).read_text()) - pages)]
    except (OSError, ValueError):  # no such group, or "max": no limit
        return []
