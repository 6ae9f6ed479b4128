"""What the tests of the write side share: copies to damage, and a way to see what changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

Snapshot = Callable[[Path], dict[str, bytes]]


@pytest.fixture
def copied(dataset_path: Path, tmp_path: Path) -> Path:
    """A dataset of one's own, under the same name, to be damaged at will."""
    return Path(shutil.copytree(dataset_path, tmp_path / dataset_path.name))


@pytest.fixture(scope="session")
def all_bytes() -> Snapshot:
    """(folder) -> the bytes of every file in it."""

    def read(path: Path) -> dict[str, bytes]:
        return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}

    return read
