"""Test modules import `model_tools` and others from this folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from reference_dino_wm import TINY, make_hydra, make_parts, make_store, write


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that does not exist yet."""
    return tmp_path / "run"


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store for DINO-WM's tiny checkpoint."""
    return make_store(tmp_path_factory.mktemp("stores") / "dinov2-28.zarr", TINY["side"], TINY["dim"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tiny checkpoint and its settings."""
    return write(tmp_path / "theirs", make_parts(1), make_hydra())
