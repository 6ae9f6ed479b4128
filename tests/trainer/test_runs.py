"""Runs on disk: loaded as they were saved, on their own store only, by one writer. Damage is in tests/faults/test_damaged_runs.py."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from model_tools import SHAPE, SIZES, each_variant, make_batch, make_trained_model

from wmcache.common.errors import UserError
from wmcache.engine.checkpoint import Progress, save_checkpoint
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.runs import load_model, lock_run, open_store, read_identity
from wmcache.trainer.train import make_optimiser, train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def finished(store_path: Path, tmp_path_factory: pytest.TempPathFactory, tiny: TrainOptions) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    train(store_path, run, replace(tiny, steps=1))
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return copytree(finished, tmp_path / "run", symlinks=True)


@each_variant
def test_every_variant_is_loaded_as_it_was_saved(tmp_path: Path, variant: dict[str, Any]) -> None:
    options = {**variant, "standardise": variant["predict"] == "change"}
    model, batch = make_trained_model(**options), make_batch()
    save_checkpoint(tmp_path, Progress(1), model, make_optimiser(model, TrainOptions()))
    config = TrainOptions(model_options=SIZES | options)
    (tmp_path / "config.json").write_text(json.dumps({**asdict(config), "cache": "x", "shape": asdict(SHAPE)}))
    found = load_model(tmp_path, CPU)
    assert not any(parameter.requires_grad for parameter in found.parameters())
    for saved, loaded in zip(model.rollout(*batch.values()), found.rollout(*batch.values()), strict=True):
        assert torch.equal(saved, loaded)


def test_a_run_opens_its_own_store_only(run: Path, store_path: Path, planted_path: Path, tmp_path: Path) -> None:
    assert open_store(run).identity == read_identity(run)[1]
    moved = copytree(store_path, tmp_path / "moved.zarr")
    assert open_store(run, moved).path == moved
    with pytest.raises(UserError, match=rf"{planted_path}.*--cache"):
        open_store(run, planted_path)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "cache": str(tmp_path / "gone.zarr")}))
    with pytest.raises(UserError, match=r"gone\.zarr.*--cache"):
        open_store(run)


def test_a_run_has_one_writer(tmp_path: Path) -> None:
    with lock_run(tmp_path / "run"), pytest.raises(UserError, match=f"{tmp_path / 'run'}"), lock_run(tmp_path / "run"):
        pass
    with lock_run(tmp_path / "run"):
        pass
    assert list(tmp_path.iterdir()) == []
