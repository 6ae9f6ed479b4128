"""Shared by the tests of encoders: frames, stores of layers, and fits on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from wmcache.cache import TokenStore
from wmcache.common.device import CPU
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import Encoder, FitOptions
from wmcache.pipeline.encoders.base import Features, Select
from wmcache.pipeline.encoders.fitting import FitData
from wmcache.pipeline.extract import extract
from wmcache.pipeline.fit import fit_adapter
from wmcache.pipeline.frames import FrameDataset

Fit = Callable[..., Encoder]
Frames = NDArray[np.uint8]


@pytest.fixture(scope="session")
def noise() -> Callable[..., Frames]:
    """(*shape, seed=0) -> random frames [*shape, 3]."""
    return lambda *shape, seed=0: np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def white_cells() -> Callable[[int, int], Frames]:
    """(side, cell) -> a black frame, then one with a single white cell for each of side x side, row by row."""

    def make(side: int, cell: int) -> Frames:
        frames = np.zeros((1 + side * side, side * cell, side * cell, 3), np.uint8)
        for i in range(side * side):
            row, column = divmod(i, side)
            frames[1 + i, row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] = 255
        return frames

    return make


@pytest.fixture(scope="session")
def most_changed() -> Callable[[torch.Tensor], list[int]]:
    """Tokens [1 + n, N, D] -> for each of the last n frames the token that differs most from the first frame's."""
    return lambda tokens: (tokens[1:].float() - tokens[0].float()).norm(dim=-1).argmax(1).tolist()


@pytest.fixture(scope="session")
def vit_layers(dataset: FrameDataset, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """A class token and 4 x 4 others of three times 192 channels."""
    path = tmp_path_factory.mktemp("stores") / "random-vit-layers.zarr"
    extract(dataset, encoders.create("random-vit-layers", device="cpu"), path)
    return TokenStore.open(path)


@pytest.fixture(params=["tcn_layers", "vit_layers"])
def layers(request: pytest.FixtureRequest) -> TokenStore:
    """Both stores in turn."""
    found: TokenStore = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def fitted(tmp_path: Path) -> Fit:
    """(store, name, options, dataset=None) -> the fitted adapter."""

    def fit_on_cpu(
        store: TokenStore, name: str, options: FitOptions, dataset: FrameDataset | None = None, *, out: str = "fit"
    ) -> Encoder:
        path = tmp_path / f"{out}.safetensors"
        weights = fit_adapter(store, name, path, options, dataset=dataset, max_frames=1000, device="cpu").weights
        return encoders.create(name, weights=weights, device="cpu")

    return fit_on_cpu


@pytest.fixture(scope="session")
def restored() -> Callable[[TokenStore, int], Features]:
    """(store, n) -> the float16 features of its first n frames."""

    def restore(store: TokenStore, frames: int) -> Features:
        head = encoders.create_again(store.card.encoder, device="cpu").head
        assert isinstance(head, Select)
        return head.restore(torch.from_numpy(store.gather(np.arange(frames))))

    return restore


@pytest.fixture(scope="session")
def fit_data() -> Callable[[TokenStore], FitData]:
    """(store) -> all its frames as a fit receives them."""

    def make(store: TokenStore) -> FitData:
        base = encoders.create_again(store.card.encoder, device="cpu")
        head = base.head
        assert isinstance(head, Select)

        def gather(rows: NDArray[np.integer]) -> Features:
            return head.restore(torch.from_numpy(store.gather(rows)).float())

        return FitData(store.episode, base.preprocess, CPU, None, base, gather)

    return make
