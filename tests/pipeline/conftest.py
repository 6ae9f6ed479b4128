"""Copies to damage, and stores of made-up tokens."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from wmcache.cache import TokenStore
from wmcache.pipeline import encoders
from wmcache.pipeline.extract import extract
from wmcache.pipeline.frames import FrameDataset


@pytest.fixture
def copied(dataset_path: Path, tmp_path: Path) -> Path:
    """A copy of the dataset, under the same name, to damage."""
    return Path(shutil.copytree(dataset_path, tmp_path / dataset_path.name))


@pytest.fixture(scope="session")
def tcn_layers(dataset: FrameDataset, tcn_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """2 x 2 tokens of 64, 64 and 32 channels, no prefix."""
    path = tmp_path_factory.mktemp("stores") / "tcn-layers.zarr"
    extract(dataset, encoders.create("tcn-layers", weights=tcn_weights, device="cpu"), path)
    return TokenStore.open(path)
