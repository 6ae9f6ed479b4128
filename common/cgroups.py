"""The control groups of this process: limits that a batch system or a container sets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


def control_groups(controller: str) -> Iterator[tuple[int, Path]]:
    """The folders of this process's groups for a controller, each with its version (1 or 2); the limits of all of them hold.

    Inside a container the path of the group may be one that only the host knows. Its folder does not exist then, but those above it do.

    Args:
        controller: `memory` or `cpu`.
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
