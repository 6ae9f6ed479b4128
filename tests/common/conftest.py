"""A machine whose control groups are files of a test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from wmcache.common import cgroups


@pytest.fixture
def enter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """(text of /proc/self/cgroup) -> the root of an empty control group file system."""
    proc, root = tmp_path / "cgroup", tmp_path / "fs"
    root.mkdir()

    def set_groups(text: str) -> Path:
        proc.write_text(text)
        return root

    monkeypatch.setattr(cgroups, "Path", lambda name: proc if name == "/proc/self/cgroup" else Path(name))
    monkeypatch.setattr(cgroups, "ROOT", root)
    return set_groups
