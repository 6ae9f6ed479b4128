"""Copies to damage, and stores of made-up tokens."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from wmcache.cache import Identity, StoreCard, StoreWriter, TokenStore
from wmcache.pipeline import encoders
from wmcache.pipeline.extract import extract
from wmcache.pipeline.frames import FrameDataset


def contents(path: Path) -> dict[str, bytes]:
    """The files in a folder, with their content."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.fixture
def copied(dataset_path: Path, tmp_path: Path) -> Path:
    """A copy of the dataset, under the same name, to damage."""
    return Path(shutil.copytree(dataset_path, tmp_path / dataset_path.name))


@pytest.fixture(scope="session")
def write_tokens() -> Callable[..., Path]:
    """(path, tokens [n, N, D], card, identity, columns) -> a finished store of them."""

    def write(path: Path, tokens: NDArray[Any], card: StoreCard, identity: Identity, columns: dict[str, Any]) -> Path:
        card = dataclasses.replace(card, token_dim=tokens.shape[2], frames=len(tokens))
        writer = StoreWriter.create(path, card, identity, columns)
        for shard in writer.pending():
            rows = card.shard_frames(shard)
            writer.write_shard(shard, tokens[rows.start : rows.stop].astype(np.float16))
        writer.finish()
        return path

    return write


@pytest.fixture(scope="session")
def tcn_layers(dataset: FrameDataset, tcn_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """2 x 2 tokens of 64, 64 and 32 channels, no prefix."""
    path = tmp_path_factory.mktemp("stores") / "tcn-layers.zarr"
    extract(dataset, encoders.create("tcn-layers", weights=tcn_weights, device="cpu"), path)
    return TokenStore.open(path)
