"""What the tests of the planner share: a tiny trained run, brought to life once."""

from __future__ import annotations

from pathlib import Path

import pytest
from wmcache.planner.evaluate import PlanOptions, Setting
from wmcache.trainer.loop import TrainOptions, train


@pytest.fixture(scope="session")
def run_path(store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only, so copy it to change it."""
    sizes = {"width": 16, "depth": 1, "heads": 2, "dropout": 0.0}
    options = TrainOptions(
        model_options=sizes, steps=30, batch=8, learning_rate=3e-3, dtype="float32", device="cpu", log_every=5
    )
    path = tmp_path_factory.mktemp("runs") / "umaze-tcn"
    train(store_path, path, options)
    return path


@pytest.fixture(scope="session")
def tiny_plan() -> PlanOptions:
    # The budget is no multiple of a chunk of 5 env steps.
    return PlanOptions(
        episodes=3, budget=12, horizon=2, samples=8, elites=3, iterations=2, device="cpu", dtype="float32"
    )


@pytest.fixture(scope="session")
def setting(run_path: Path, tiny_plan: PlanOptions) -> Setting:
    return Setting(run_path, tiny_plan)
