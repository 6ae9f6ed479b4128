"""The control groups of this process, with the limits of a batch system or container."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


def control_groups(controller: str) -> Iterator[tuple[int, Path]]:
    """Yield the version (1 or 2) and folder of each group of a controller, `memory` or `cpu`; all their limits apply.

    Inside a container the path of the group may exist on the host only. The folders above it exist in both.
    """
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controller in controllers.split(","):
            version, root = 1, ROOT / controller
        elif not controllers:
            version, root = 2, ROOT
        else:
            continue
        group = root / name.lstrip("/")
        yield from ((version, folder) for folder in (group, *group.parents) if folder.is_relative_to(root))
