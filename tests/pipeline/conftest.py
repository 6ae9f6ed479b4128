"""Copies to damage, and snapshots of their bytes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

Snapshot = Callable[[Path], dict[str, bytes]]


@pytest.fixture
def copied(dataset_path: Path, tmp_path: Path) -> Path:
    """A copy of the dataset, under the same name, to damage."""
    return Path(shutil.copytree(dataset_path, tmp_path / dataset_path.name))


@pytest.fixture(scope="session")
def all_bytes() -> Snapshot:
    """(folder) -> the bytes of every file in it."""

    def read(path: Path) -> dict[str, bytes]:
        return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}

    return read
