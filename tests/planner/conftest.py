"""Fixtures of the planner's tests: costs with a known minimum, a run without proprio, and stores of known tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wmcache.cache import StoreCard, TokenStore
from wmcache.planner.base import Cost
from wmcache.trainer.models import DataShape, build

from ..conftest import IDENTITY, episodes_of, write_tokens

MakeStore = Callable[..., TokenStore]
TrainRun = Callable[..., Path]
SHAPE = (3, 4, 2)


class Recorded:
    """A cost that records the candidates it was given, and their costs."""

    def __init__(self, cost: Cost) -> None:
        self.cost = cost
        self.actions: list[Tensor] = []
        self.costs: list[Tensor] = []

    def __call__(self, actions: Tensor) -> Tensor:
        self.actions.append(actions.detach().clone().requires_grad_(actions.requires_grad))
        costs = self.cost(actions)
        self.costs.append(costs.detach())
        return costs


@pytest.fixture
def target() -> Tensor:
    """The minimum of `cost`, [3, 4, 2]."""
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(5)) * 1.8 - 0.9


@pytest.fixture
def cost(target: Tensor) -> Recorded:
    """The squared distance to the target."""
    return Recorded(lambda actions: (actions - target[:, None]).square().sum((2, 3)))


@pytest.fixture(scope="session")
def blind_run_path(store_path: Path, train_run: TrainRun) -> Path:
    """A run without proprio; read only."""
    return train_run(store_path, proprio="none")


@pytest.fixture(scope="session")
def make_store(tmp_path_factory: pytest.TempPathFactory) -> MakeStore:
    """(episodes of frames [length, d], states, dataset's card) -> a store of one token of d numbers a frame."""

    def make(
        episodes: Sequence[NDArray[Any]], state: NDArray[Any] | None = None, dataset: dict[str, Any] | None = None
    ) -> TokenStore:
        tokens = np.concatenate(episodes)[:, None].astype(np.float16)
        frames = len(tokens)
        card = StoreCard({}, dataset or {}, (1, 1), tokens.shape[2], frames=frames, frames_per_shard=frames)
        steps = {
            "action": np.zeros((frames, 2), np.float32),
            "state": np.zeros((frames, 4)) if state is None else state,
            **episodes_of([len(episode) for episode in episodes]),
        }
        path = tmp_path_factory.mktemp("stores") / "made-up.zarr"
        return TokenStore.open(write_tokens(path, tokens, card, IDENTITY, steps))

    return make


@pytest.fixture(scope="session")
def random_model() -> Callable[[DataShape], Any]:
    """Makes DINO-WM's model with large random weights, so that every input matters; in float64, so that rounding does not."""

    def make(shape: DataShape) -> Any:
        generator = torch.Generator().manual_seed(0)
        sizes = {"tokens": shape.token_dim, "proprio": shape.proprio_dim, "action": shape.action_dim}
        statistics = {f"{name}_mean": torch.randn(size, generator=generator) for name, size in sizes.items()}
        statistics |= {f"{name}_std": torch.rand(size, generator=generator) + 0.5 for name, size in sizes.items()}
        model = build("dino-wm", shape, {"width": 16, "depth": 1, "heads": 2, "dropout": 0.0}, statistics).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)
        return model.double()

    return make
