"""What the tests of the planner share: tiny trained runs, one brought to life, and stores of tokens that are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from wmcache.cache import Identity, StoreCard, StoreWriter, TokenStore
from wmcache.planner.evaluate import EvalContext
from wmcache.planner.options import PlanOptions
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.train import train

MakeStore = Callable[..., TokenStore]
TrainRun = Callable[..., Path]


@pytest.fixture(scope="session")
def train_run(tmp_path_factory: pytest.TempPathFactory) -> TrainRun:
    """(store, options of the model) -> a run."""

    def train_tiny(store: Path, **model: Any) -> Path:
        sizes = {"width": 16, "depth": 1, "heads": 2, "dropout": 0.0, **model}
        options = TrainOptions(
            model_options=sizes, steps=30, batch=8, learning_rate=3e-3, dtype="float32", device="cpu", log_every=5
        )
        path = tmp_path_factory.mktemp("runs") / "umaze-tcn"
        train(store, path, options)
        return path

    return train_tiny


@pytest.fixture(scope="session")
def run_path(store_path: Path, train_run: TrainRun) -> Path:
    """Read only, so copy it to change it."""
    return train_run(store_path)


@pytest.fixture(scope="session")
def blind_run_path(store_path: Path, train_run: TrainRun) -> Path:
    """A run without proprio; read only."""
    return train_run(store_path, proprio="none")


@pytest.fixture(scope="session")
def tiny_plan() -> PlanOptions:
    # The budget is no multiple of a chunk of 5 env steps.
    search = {"samples": 8, "elites": 3, "iterations": 2}
    return PlanOptions(episodes=3, budget=12, horizon=2, search=search, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def setting(run_path: Path, tiny_plan: PlanOptions) -> EvalContext:
    return EvalContext(run_path, tiny_plan)


@pytest.fixture(scope="session")
def make_store(tmp_path_factory: pytest.TempPathFactory) -> MakeStore:
    """(episodes of frames [length, d], states, dataset's card) -> a store of one token of d numbers a frame."""

    def make(
        episodes: Sequence[NDArray[Any]], state: NDArray[Any] | None = None, dataset: dict[str, Any] | None = None
    ) -> TokenStore:
        tokens = np.concatenate(episodes)[:, None].astype(np.float16)
        frames, lengths = len(tokens), [len(episode) for episode in episodes]
        card = StoreCard({}, dataset or {}, (1, 1), tokens.shape[2], frames=frames, frames_per_shard=frames)
        steps = {
            "action": np.zeros((frames, 2), np.float32),
            "state": np.zeros((frames, 4)) if state is None else state,
            "episode": np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
            "step": np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
        }
        identity = Identity(
            "made up", "file", "0", "norm", "patch", 8, "none", ((0.5,), (0.5,)), "float32", "float16", "0"
        )
        path = tmp_path_factory.mktemp("stores") / "made-up.zarr"
        writer = StoreWriter.create(path, card, identity, steps)
        writer.write_shard(0, tokens)
        writer.finish()
        return TokenStore.open(path)

    return make
