"""RWM: its loss against slow independent code, gradients through the chain of predictions, what it draws, and its runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_tools import (
    IMAGINED,
    SHAPE,
    generators,
    make_batch,
    make_futures,
    make_statistics,
    randomise,
    remember,
    require_noise_of_each_episode,
    roll_out,
)
from run_tools import Go, make_go, read_log, stopped_at, weights_of
from torch import Tensor

from wmcache.common.errors import UserError
from wmcache.trainer.models import DataShape, Dreams, build
from wmcache.trainer.options import TrainOptions

VALUES = SHAPE.tokens * SHAPE.token_dim
OBSERVED, AHEAD = 3, 4
FULL = replace(SHAPE, has_reward=True, has_end=True)
INPUTS = ({}, {"proprio": "none"}, {"tokens": "none"})
each_input = pytest.mark.parametrize("inputs", INPUTS, ids=str)


def make_model(shape: DataShape = SHAPE, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden": 6, "head": 5, "observed_steps": OBSERVED, "forecast": AHEAD, "vary": False}
    return randomise(build("rwm", shape, sizes | options, make_statistics())).eval()


def make_certain(model: Any) -> Any:
    """Without noise, also in training."""
    for member in model.members:
        torch.nn.init.constant_(member.lowest, -50.0)
        torch.nn.init.constant_(member.log_range, -50.0)
    return model


def states_of(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Standardised states [B, T, S] and actions."""
    tokens = ((batch["tokens"] - model.tokens_mean) / model.tokens_std).flatten(2)
    proprio = (batch["proprio"] - model.proprio_mean) / model.proprio_std
    return torch.cat([tokens, proprio], 2), (batch["action"] - model.action_mean) / model.action_std


def slow_gru(weights: dict[str, Tensor], memory: list[Tensor], inputs: Tensor) -> list[Tensor]:
    """The two layers of a GRU, by the equations (arXiv 1406.1078, with the reset gate after the product)."""
    after = []
    for layer, hidden in enumerate(memory):
        found = [
            values @ weights[f"weight_{name}_l{layer}"].T + weights[f"bias_{name}_l{layer}"]
            for name, values in (("ih", inputs), ("hh", hidden))
        ]
        (reset, update, new), (own_reset, own_update, own_new) = (part.chunk(3, -1) for part in found)
        reset, update = torch.sigmoid(reset + own_reset), torch.sigmoid(update + own_update)
        inputs = (1 - update) * torch.tanh(new + reset * own_new) + update * hidden
        after.append(inputs)
    return after


def slow_errors(model: Any, batch: dict[str, Tensor], *, ahead: int = AHEAD, detach: bool = False) -> list[Tensor]:
    """Squared error of each sampled prediction, fed back; [steps]. Noise is drawn as the model does."""
    states, actions = states_of(model, batch)
    weights, head = dict(model.bases["hidden"].named_parameters()), model.members[0]
    memory = [torch.zeros(len(states), 6) for _ in range(2)]
    for t in range(OBSERVED):
        memory = slow_gru(weights, memory, torch.cat([states[:, t], actions[:, t]], 1))
    state, errors = states[:, OBSERVED - 1], []
    for k in range(ahead):
        if k:
            memory = slow_gru(weights, memory, torch.cat([state, actions[:, OBSERVED - 1 + k]], 1))
        highest = head.lowest + head.log_range.exp()
        raw = head.log_std(memory[1])
        log_std = head.lowest + F.softplus(highest - F.softplus(highest - raw) - head.lowest)
        state = state + head.mean(memory[1]) + log_std.exp() * torch.randn_like(state)
        errors.append((state - states[:, OBSERVED + k]).square().sum(1).mean())
        state = state.detach() if detach else state
    return errors


@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize("ahead", [1, AHEAD])
def test_the_loss_is_that_of_predictions_fed_back_with_gradients(ahead: int, weight: float) -> None:
    model = make_model(forecast=ahead, step_weight=weight)
    batch = make_batch(batch=3, frames=OBSERVED + ahead)
    parameters = [*model.bases.parameters(), *model.members.parameters()]

    def gradients(loss: Tensor) -> Sequence[Tensor]:
        return torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)

    def slow(*, detach: bool) -> Tensor:
        torch.manual_seed(5)
        found = slow_errors(model, batch, ahead=ahead, detach=detach)
        return sum(weight**k * error for k, error in enumerate(found)) / ahead + model.members[0].log_range.exp().mean()

    torch.manual_seed(5)
    losses = model.loss(batch)
    torch.testing.assert_close(losses["loss"], slow(detach=False), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(losses["state"] + losses["bound"], losses["loss"])
    own = gradients(losses["loss"])
    for mine, expected in zip(own, gradients(slow(detach=False)), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-3)
    cut = gradients(slow(detach=True))
    assert torch.allclose(own[0], cut[0], rtol=1e-3, atol=1e-3) == (ahead == 1)


@each_input
def test_it_imagines_what_it_is_trained_on(inputs: dict[str, Any]) -> None:
    model, batch = make_certain(make_model(**inputs)), make_batch(batch=3, frames=OBSERVED + AHEAD)
    found = model.imagine(remember(model, batch, OBSERVED), batch["action"][:, None, OBSERVED - 1 : -1])
    error = torch.zeros(())
    if found.latents.numel():
        wanted = (batch["tokens"][:, OBSERVED:] - found.latents[:, 0]) / model.tokens_std
        error = error + wanted.square().sum((2, 3)).mean()
    if found.proprio.numel():
        wanted = (batch["proprio"][:, OBSERVED:] - model.proprio_mean) / model.proprio_std - found.proprio[:, 0]
        error = error + wanted.square().sum(2).mean()
    torch.testing.assert_close(model.loss(batch)["state"], error, rtol=1e-4, atol=1e-4)


def test_batches_do_not_depend_on_those_before() -> None:
    model, batch = make_model(FULL, vary=True), make_batch(batch=3, frames=OBSERVED + AHEAD)
    batch |= {"reward": torch.rand(3, 7), "terminated": torch.rand(3, 7) > 0.5}
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(model.loss(batch)["loss"])
    assert torch.equal(*found)


def test_reward_and_end_are_predicted_from_real_frames_by_a_memory_of_their_own() -> None:
    model, batch = make_model(FULL), make_batch(batch=3, frames=OBSERVED + AHEAD)
    batch |= {"reward": torch.rand(3, 7), "terminated": torch.rand(3, 7) > 0.5}
    weights = dict(model.bases["auxiliary"].named_parameters())
    memory, outputs = [torch.zeros(3, 6) for _ in range(2)], []
    for state, action in zip(*(part.unbind(1) for part in states_of(model, batch)), strict=True):
        memory = slow_gru(weights, memory, torch.cat([state, action], 1))
        outputs.append(memory[1])
    reward, end = (head(torch.stack(outputs, 1))[..., 0] for head in model.heads.values())
    losses = model.loss(batch)
    torch.testing.assert_close(losses["reward"], (reward - batch["reward"]).square().mean(), rtol=1e-4, atol=1e-4)
    expected = F.binary_cross_entropy_with_logits(end, batch["terminated"].float())
    torch.testing.assert_close(losses["end"], expected, rtol=1e-4, atol=1e-4)
    found = model.imagine(remember(model, batch, 4), batch["action"][:, None, 3:4])
    torch.testing.assert_close(found.reward[:, 0, 0], reward[:, 3], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.continues[:, 0, 0], torch.sigmoid(-end[:, 3]), rtol=1e-4, atol=1e-4)


@each_input
@pytest.mark.parametrize("ensemble", [1, 3])
def test_a_step_is_one_of_those_that_it_imagines(inputs: dict[str, Any], ensemble: int) -> None:
    model, batch = make_model(FULL, ensemble=ensemble, temperature=1.0, **inputs), make_batch(batch=2, frames=7)
    assert isinstance(model, Dreams)
    futures = make_futures(batch["action"][:, 2:6], past=0)
    belief = remember(model, batch, 3)
    together = model.imagine(belief, futures, generators(1, 2))
    values = 0 if model.options.tokens == "none" else SHAPE.token_dim
    assert together.latents.shape == (2, 3, IMAGINED, SHAPE.tokens, values)
    assert together.proprio.shape == (2, 3, IMAGINED, 0 if model.options.proprio == "none" else 4)
    for future in range(3):
        own, noise = belief, generators(1, 2)
        for t in range(IMAGINED):
            own, one = model.step(own, futures[:, future, t], noise)
            for name in ("latents", "proprio", "reward", "continues"):
                found, expected = getattr(one, name)[:, 0, 0], getattr(together, name)[:, future, t]
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert all(len(value) == 2 and value.any() for value in model.features(belief).values())


@pytest.mark.parametrize("ensemble", [1, 3])
def test_what_an_episode_draws_depends_on_its_generator_alone(ensemble: int) -> None:
    require_noise_of_each_episode(make_model(temperature=0.7, ensemble=ensemble), make_batch(batch=2, frames=3))


def test_an_ensemble_predicts_the_mean_and_draws_one_of_its_heads() -> None:
    model, count = make_certain(make_model(ensemble=2, temperature=1.0)), 400
    batch = {name: value.expand(count, *value.shape[1:]) for name, value in make_batch(batch=1, frames=2).items()}
    belief, action = remember(model, batch, 1), batch["action"][:, None, :1]
    mean = model.imagine(belief, action).latents[0].flatten()
    drawn = model.imagine(belief, action, generators(*range(count))).latents.flatten(1)
    kinds, counts = drawn.round(decimals=3).unique(dim=0, return_counts=True)
    assert len(kinds) == 2
    assert counts.min() > 140
    torch.testing.assert_close(kinds.mean(0), mean, rtol=1e-2, atol=1e-2)


def test_members_of_an_ensemble_learn_from_other_windows() -> None:
    model = make_model(ensemble=2)
    model.members[1].load_state_dict(model.members[0].state_dict())
    model.loss(make_batch(batch=8, frames=OBSERVED + AHEAD))["loss"].backward()
    one, two = (next(member.parameters()).grad for member in model.members)
    assert not torch.isclose(one, two).all()


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(UserError, match=r"196 x 384.*wmcache derive"):
        build("rwm", replace(SHAPE, tokens=196, token_dim=384), {}, make_statistics())
    with pytest.raises(UserError, match="--proprio none"):
        make_model(tokens="none", proprio="none")
    assert make_model(tokens="none").values == 0


def test_a_rollout_returns_float32_of_the_stores_units() -> None:
    model, batch = make_model(), make_batch(batch=2, frames=5)
    for member in model.members:
        for value in member.mean[-1].parameters():
            torch.nn.init.zeros_(value)
    latents, _ = roll_out(model, batch["tokens"][:, :1].half(), batch["proprio"][:, :1], batch["action"][:, :3])
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, batch["tokens"][:, :1].half().float().expand(-1, 3, -1, -1))


@pytest.fixture
def go(store_path: Path, tiny: TrainOptions) -> Go:
    sizes = {"hidden": 8, "head": 8, "observed_steps": 3, "forecast": 2}
    return make_go(store_path, replace(tiny, model="rwm", model_options=sizes))


@pytest.mark.parametrize("by_signal", [False, True])
@pytest.mark.parametrize("options", [{"accumulate": 2}, {"model_options": {"ensemble": 2, "tokens": "none"}}], ids=str)
def test_a_stopped_run_resumes_exactly(go: Go, tmp_path: Path, options: dict[str, Any], by_signal: bool) -> None:
    go(tmp_path / "straight", **options)
    with stopped_at(6, by_signal=by_signal):
        go(tmp_path / "stopped", **options)
    go(tmp_path / "stopped", **options)
    assert weights_of(tmp_path / "stopped") == weights_of(tmp_path / "straight")
    assert read_log(tmp_path / "stopped") == read_log(tmp_path / "straight")


@pytest.mark.parametrize("tokens", ["all", "none"])
def test_it_learns_a_planted_linear_system(planted_path: Path, tiny: TrainOptions, run: Path, tokens: str) -> None:
    sizes = {"hidden": 64, "head": 64, "tokens": tokens}
    base = replace(tiny, model="rwm", model_options=sizes, log_every=50, validate_every=300, checkpoint_every=300)
    skills = make_go(planted_path, base)(run, steps=300, batch=32, frameskip=2, learning_rate=5e-3)
    assert list(skills) == [f"skill_{k}" for k in range(1, 6)]
    assert min(value for value in skills.values() if value is not None) > 0.5


def test_windows_longer_than_all_episodes_are_refused(go: Go, run: Path) -> None:
    with pytest.raises(UserError, match="65 frames"):
        go(run, model_options={"forecast": 10})  # of 60
    assert not run.exists()
