"""Loading a run for planning: encoder, store and options must match it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from wmcache.cache import StoreWriter, TokenStore
from wmcache.common.errors import UserError
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import Encoder
from wmcache.planner.context import EvalContext, live_drift
from wmcache.planner.evaluate import run_episodes
from wmcache.planner.options import PlanOptions

from ..conftest import columns_of, write_tokens


@pytest.fixture(scope="module")
def other_weights(tcn_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("encoders") / "other.safetensors"
    save_file({name: value + 0.3 * torch.randn_like(value) for name, value in load_file(tcn_weights).items()}, path)
    return path


def rewritten(run: Path, to: Path, file: str = "config.json", **changed: Any) -> Path:
    copy = copytree(run, to, symlinks=True)
    known = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps(known | changed))
    return copy


class TestEncoder:
    def test_other_weights_are_noticed_by_name_and_by_what_they_compute(
        self, run_path: Path, tiny_plan: PlanOptions, store: TokenStore, other_weights: Path
    ) -> None:
        with pytest.raises(UserError, match=r"weights_sha256.*--weights"):
            EvalContext(run_path, tiny_plan, weights=other_weights)
        with pytest.raises(UserError, match=r"0\.999"):
            live_drift(store, encoders.create("tcn", weights=other_weights, device="cpu"))

    def test_a_store_with_other_tokens_is_noticed(
        self, store: TokenStore, store_path: Path, encoder: Encoder, tmp_path: Path
    ) -> None:
        copy = copytree(store_path, tmp_path / "store.zarr")
        # The right tokens at the wrong frames, as after a shift of the step table.
        tokens = np.roll(store.gather(np.arange(64)), 20, axis=0)
        StoreWriter.resume(copy, store.identity).write_shard(0, tokens)
        with pytest.raises(UserError, match=r"store\.zarr"):
            live_drift(TokenStore.open(copy), encoder)


class TestFiles:
    def test_the_environment_is_of_the_kind_of_the_runs(self, run_path: Path, tiny_plan: PlanOptions) -> None:
        assert EvalContext(run_path, replace(tiny_plan, env="Medium")).env.spec.id == "wmcache/PointMaze-Medium-v0"
        pytest.importorskip("gym_pusht")
        with pytest.raises(UserError, match="--env PushT"):  # it has as many action values
            EvalContext(run_path, replace(tiny_plan, env="PushT"))

    def test_weights_and_store_may_have_moved(
        self, run_path: Path, store_path: Path, tcn_weights: Path, tiny_plan: PlanOptions, tmp_path: Path
    ) -> None:
        weights = tmp_path / "moved.safetensors"
        weights.write_bytes(tcn_weights.read_bytes())
        cache = copytree(store_path, tmp_path / "moved.zarr")
        context = EvalContext(run_path, tiny_plan, weights=weights, cache=cache)
        assert context.store.path == cache
        assert context.drift["cosine"] > 0.999

    def test_missing_stores_and_weights_are_named(self, run_path: Path, tiny_plan: PlanOptions, tmp_path: Path) -> None:
        run = rewritten(run_path, tmp_path / "run", cache=str(tmp_path / "gone.zarr"))
        for name, cache in (("gone", None), ("lost", tmp_path / "lost.zarr")):
            with pytest.raises(UserError, match=rf"{name}\.zarr.*--cache"):
                EvalContext(run, tiny_plan, cache=cache)
        card = json.loads((run_path / "identity.json").read_text())["card"]
        card["encoder"]["weights"] = str(tmp_path / "gone.safetensors")
        run = rewritten(run_path, tmp_path / "other", "identity.json", card=card)
        with pytest.raises(UserError, match=r"gone\.safetensors.*--weights"):
            EvalContext(run, tiny_plan)

    def test_a_model_that_is_not_registered_is_refused(
        self, run_path: Path, tiny_plan: PlanOptions, tmp_path: Path
    ) -> None:
        with pytest.raises(UserError, match="my-own"):
            EvalContext(rewritten(run_path, tmp_path / "run", model="my-own"), tiny_plan)

    def test_a_run_on_frames_without_an_environment_is_refused(
        self, store: TokenStore, train_run: Callable[..., Path], tiny_plan: PlanOptions, tmp_path: Path
    ) -> None:
        imported = replace(store.card, dataset={**store.card.dataset, "maze": [], "env": "frames of images"})
        tokens = store.gather(np.arange(len(store)))
        run = train_run(write_tokens(tmp_path / "store.zarr", tokens, imported, store.identity, columns_of(store)))
        for env in (None, "UMaze"):
            with pytest.raises(UserError, match=r"docs/import\.md"):
                EvalContext(run, replace(tiny_plan, env=env))


def test_proprio_is_the_models_and_frames_are_at_most_its_history(
    run_path: Path, blind_run_path: Path, tiny_plan: PlanOptions
) -> None:
    with pytest.raises(UserError, match=r"--alpha 0\.1"):
        EvalContext(blind_run_path, replace(tiny_plan, alpha=0.1))
    assert EvalContext(run_path, replace(tiny_plan, context=12)).context_frames == 3


def test_a_run_of_a_store_without_proprio_plans_from_frames_alone(
    store: TokenStore, train_run: Callable[..., Path], tiny_plan: PlanOptions, tmp_path: Path
) -> None:
    columns = {**store.columns, "state": replace(store.columns["state"], roles=("state",))}
    card = replace(store.card, columns=columns)
    tokens = store.gather(np.arange(len(store)))
    path = write_tokens(tmp_path / "blind.zarr", tokens, card, store.identity, store.step_columns())
    run = train_run(path)
    assert json.loads((run / "config.json").read_text())["model_options"]["proprio"] == "none"
    context = EvalContext(run, tiny_plan)
    assert (context.blind, context.model.shape.proprio_dim) == (True, 0)
    assert run_episodes(context, tiny_plan, range(2)).states.shape == (2, tiny_plan.budget, 4)
