"""Policies that learn from the cache: they train and resume as world models do, and recover actions from what they led to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_tools import Go, make_go, read_log, stopped_at, weights_of

from wmcache.cache import TokenStore
from wmcache.common.errors import UserError
from wmcache.trainer.models import DataShape, build
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.runs import load_model, load_trained
from wmcache.trainer.train import train

from ..conftest import write_tokens

KINDS = ("gcbc", "gc-idm")
CPU = torch.device("cpu")
SHAPE = DataShape(tokens=3, token_dim=5, proprio_dim=4, action_dim=10, history=3)


def make(name: str, shape: DataShape = SHAPE, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    sizes = {"tokens": shape.token_dim, "proprio": shape.proprio_dim, "action": shape.action_dim}
    statistics = {f"{part}_mean": torch.randn(size, generator=generator) for part, size in sizes.items()}
    statistics |= {f"{part}_std": torch.rand(size, generator=generator) + 0.5 for part, size in sizes.items()}
    torch.manual_seed(0)
    return build(name, shape, {"width": 16, "depth": 2, **options}, statistics).eval()


@pytest.fixture(scope="module", params=KINDS)
def go(request: pytest.FixtureRequest, store_path: Path, tiny: TrainOptions) -> Go:
    sizes = {"width": 16, "depth": 1, "dropout": 0.1}
    return make_go(store_path, replace(tiny, model=request.param, model_options=sizes))


def test_a_stopped_run_resumes_exactly(go: Go, tmp_path: Path) -> None:
    result = go(tmp_path / "straight")
    assert list(result) == ["explained"]
    with stopped_at(6):
        go(tmp_path / "stopped")
    assert go(tmp_path / "stopped") == result
    assert weights_of(tmp_path / "stopped") == weights_of(tmp_path / "straight")
    assert read_log(tmp_path / "stopped") == read_log(tmp_path / "straight")


@pytest.mark.parametrize("name", KINDS)
def test_data_without_proprio_is_recorded_and_earlier_runs_of_it_resume(
    name: str, lone_path: Path, tiny: TrainOptions, tmp_path: Path
) -> None:
    store = TokenStore.open(lone_path)
    columns = {"action": store.columns["action"]}
    card, tokens = replace(store.card, columns=columns), store.gather(np.arange(len(store)))
    steps = {part: store.column(part) for part in ("action", "episode", "step")}
    path = write_tokens(tmp_path / "store.zarr", tokens, card, store.identity, steps)
    options = replace(tiny, model=name, model_options={"width": 16, "depth": 1}, steps=4)
    train(path, tmp_path / "run", options)
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["model_options"]["proprio"] == "none"
    config["model_options"]["proprio"] = "raw"  # as before
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    assert train(path, tmp_path / "run", replace(options, steps=6), resume=True)


def test_a_command_for_world_models_refuses_its_run(go: Go, tmp_path: Path) -> None:
    go(tmp_path / "run", steps=1)
    with pytest.raises(UserError, match=str(tmp_path / "run")):
        load_model(tmp_path / "run", CPU)
    untrained = load_trained(tmp_path / "run", CPU, untrained=True).state_dict()
    trained = load_trained(tmp_path / "run", CPU).state_dict()
    assert torch.equal(untrained["tokens_mean"], trained["tokens_mean"])
    assert not torch.equal(untrained["network.0.weight"], trained["network.0.weight"])


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("options", [{}, {"proprio": "none"}])
def test_actions_depend_on_frame_goal_and_proprio_alone(name: str, options: dict[str, Any]) -> None:
    model = make(name, **options)
    generator = torch.Generator().manual_seed(1)
    tokens, goal = torch.randn(2, 4, 3, 5, generator=generator)
    proprio = torch.randn(4, 4, generator=generator)
    actions = model.act(tokens, proprio, goal)
    assert actions.shape == (4, 10)
    torch.testing.assert_close(model.act(tokens[1:2], proprio[1:2], goal[1:2]), actions[1:2])
    assert not torch.equal(model.act(tokens + 1, proprio, goal), actions)
    assert not torch.equal(model.act(tokens, proprio, goal + 1), actions)
    assert torch.equal(model.act(tokens, proprio + 1, goal), actions) == model.blind == bool(options)


@pytest.mark.parametrize("name", KINDS)
def test_tokens_of_large_frames_are_projected(name: str) -> None:
    large = replace(SHAPE, tokens=196, token_dim=384)
    model = make(name, large)
    assert sum(parameter.numel() for parameter in model.parameters()) < 200_000
    assert model.act(torch.zeros(2, 196, 384), torch.zeros(2, 4), torch.ones(2, 196, 384)).isfinite().all()


def test_gc_idm_recovers_the_actions_of_a_linear_system(planted_path: Path, tiny: TrainOptions, tmp_path: Path) -> None:
    # The latents are a linear map of position and velocity, and an action is a step of one env step.
    options = {"width": 64, "depth": 1, "goal_horizon": 1, "reach": 1}
    changed: dict[str, Any] = {
        "steps": 1200,
        "batch": 64,
        "learning_rate": 1e-2,
        "validate_every": 1200,
        "checkpoint_every": 1200,
    }
    go = make_go(planted_path, replace(tiny, model="gc-idm", model_options=options, frameskip=1, **changed))
    found = go(tmp_path / "run")["explained"]
    assert found is not None
    assert found > 0.95


def test_gc_idm_knows_the_number_of_steps(tmp_path: Path) -> None:
    model = make("gc-idm", goal_horizon=3, reach=2)
    tokens = torch.ones(1, 3, 5)
    one, two, three = (model.decide(tokens, torch.ones(1, 4), tokens, steps) for steps in (1, 2, 3))
    assert torch.equal(model.act(tokens, torch.ones(1, 4), tokens), two)
    assert not torch.equal(one, two)
    assert not torch.equal(two, three)
    with pytest.raises(UserError, match="--reach 4"):
        make("gc-idm", goal_horizon=3, reach=4)
