"""IRIS: its loss and rollouts against slow independent code, what sees what, what it draws, and its runs."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
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
)
from naive_iris import roll_out_iris, slow_losses
from run_tools import Go, make_go, read_log, stopped_at, weights_of
from torch import Tensor

from wmcache.common.device import autocast
from wmcache.common.errors import UserError
from wmcache.trainer.actor import train_actor
from wmcache.trainer.models import DataShape, Dreams, build
from wmcache.trainer.models.iris import IrisOptions
from wmcache.trainer.options import ActorOptions, TrainOptions
from wmcache.trainer.presets import PRESETS

VOCABULARY, DIM = 7, 3
FULL = replace(SHAPE, has_reward=True, has_end=True)
WHOLE, POOLED, SPLIT = ({"cells": cells, "cell_codes": each} for cells, each in ((8, 1), (4, 0), (4, 2)))
each_grid = pytest.mark.parametrize("grid", [WHOLE, POOLED, SPLIT], ids=str)
each_choice = pytest.mark.parametrize("choice", ["greedy", "expected"])


def make_model(shape: DataShape = FULL, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocabulary": VOCABULARY, "code_dim": DIM, "channels": 6, "width": 8, "depth": 2, "heads": 2}
    return randomise(build("iris", shape, sizes | options, make_statistics())).eval()


def make_windows(frames: int = 4) -> dict[str, Tensor]:
    batch = make_batch(batch=3, frames=frames)
    batch |= {"reward": 9 * torch.rand(3, frames) - 4, "terminated": torch.zeros(3, frames, dtype=torch.bool)}
    batch["terminated"][0, -1] = batch["terminated"][1, 0] = True
    return batch


@each_grid
def test_the_loss_is_that_of_one_code_after_the_other(grid: dict[str, int]) -> None:
    model, batch = make_model(**grid, commitment=0.3), make_windows()
    expected = slow_losses(model, batch)
    losses = model.loss(batch)
    total, used = losses.pop("loss"), losses.pop("used")
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(total, torch.stack([*expected.values()]).sum(), rtol=1e-4, atol=1e-4)
    assert 1 <= used <= VOCABULARY


@each_choice
@pytest.mark.parametrize(("observed", "context"), [(1, 1), (1, 2), (2, 3), (3, 3)])
def test_kept_keys_give_what_is_computed_again(choice: str, observed: int, context: int) -> None:
    model, batch = make_model(**SPLIT, plan_codes=choice), make_windows(frames=observed + IMAGINED)
    model.observed, model.context = observed, context
    actions = batch["action"][:, : observed - 1 + IMAGINED]
    found = model.imagine(remember(model, batch, observed), actions[:, None, observed - 1 :])
    latents, proprio = roll_out_iris(model, batch, observed, context, actions[0])
    torch.testing.assert_close(found.latents[0, 0], latents, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.proprio[0, 0], proprio, rtol=1e-3, atol=1e-3)


@each_grid
def test_a_code_is_predicted_from_those_before_it_alone(grid: dict[str, int]) -> None:
    model, batch = make_model(**grid), make_windows()
    entries = torch.randn(3, 4, model.codes, DIM)
    proprio = model.encode_proprio(batch["proprio"])
    inputs = {"entries": entries, "proprio": proprio, "actions": batch["action"]}
    logits, heads = model.predict(**inputs)
    for k in range(model.codes):
        other = entries.clone()
        other[:, 2, k] += 1
        changed, after = model.predict(other, proprio, batch["action"])
        assert torch.equal(changed[:, 0], logits[:, 0])
        assert torch.equal(changed[:, 1, : k + 1], logits[:, 1, : k + 1])
        assert not torch.isclose(changed[:, 1, k + 1 :], logits[:, 1, k + 1 :]).all(-1).any()
        assert not torch.isclose(changed[:, 2], logits[:, 2]).all(-1).any()
        for name, value in heads.items():
            assert torch.equal(after[name][:, :2], value[:, :2])
            assert not torch.isclose(after[name][:, 2:], value[:, 2:]).all(-1).any()
    for name in ("proprio", "actions"):
        other = inputs[name].clone()
        other[:, 1] += 1
        changed, after = model.predict(**{**inputs, name: other})
        assert torch.equal(changed[:, 0], logits[:, 0])
        assert not torch.isclose(changed[:, 1:], logits[:, 1:]).all(-1).any()
        assert torch.equal(after["end"][:, 0], heads["end"][:, 0])
        assert not torch.isclose(after["end"][:, 1:], heads["end"][:, 1:]).any()


@pytest.mark.parametrize("proprio", ["raw", "none"])
def test_the_loss_reaches_every_parameter(proprio: str) -> None:
    model = make_model(**POOLED, proprio=proprio)
    model.loss(make_windows())["loss"].backward()
    assert [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()] == []


def test_no_gradient_of_the_transformer_reaches_the_tokenizer() -> None:
    model, batch = make_model(**POOLED), make_windows()
    model.loss(batch)["loss"].backward()
    found = {name: value.grad.clone() for name, value in model.tokenizer.named_parameters()}
    model.zero_grad()
    with torch.no_grad():
        model.transformer.norm.weight.mul_(2)
    model.loss(batch)["loss"].backward()
    assert all(torch.equal(value.grad, found[name]) for name, value in model.tokenizer.named_parameters())


def test_the_loss_in_bfloat16_differs_by_rounding_alone() -> None:
    model, batch = make_model(**WHOLE), make_windows()
    loss = model.loss(batch)["loss"]
    with autocast(torch.device("cpu"), torch.bfloat16):
        rounded = model.loss(batch)["loss"]
    rounded.backward()
    torch.testing.assert_close(rounded, loss, rtol=0.05, atol=0)


def test_entries_become_those_of_the_data_in_training_alone() -> None:
    torch.manual_seed(0)
    model, batch = build("iris", SHAPE, {"vocabulary": 8, "code_dim": 4}, make_statistics()), make_batch(batch=16)
    model.eval().loss(batch)
    assert not any(book.entries.any() for book in model.tokenizer.books)
    model.train()
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    before = float(model.loss(batch)["tokens"])
    for _ in range(30):
        optimiser.zero_grad()
        losses = model.loss(batch)
        losses["loss"].backward()
        optimiser.step()
    assert losses["tokens"] < before / 2
    assert losses["used"] > 3


@each_choice
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("proprio", ["raw", "none"])
def test_a_step_is_one_of_those_that_it_imagines(choice: str, temperature: float, proprio: str) -> None:
    model = make_model(**POOLED, temperature=temperature, proprio=proprio, plan_codes=choice)
    batch = make_windows(frames=3 + IMAGINED)
    assert isinstance(model, Dreams)
    futures, belief = make_futures(batch["action"][:, 2:], past=0), remember(model, batch, frames=3)
    together = model.imagine(belief, futures, generators(1, 2, 3))
    assert together.latents.shape == (3, 3, IMAGINED + 1, SHAPE.tokens, SHAPE.token_dim)
    assert together.proprio.shape == (3, 3, IMAGINED + 1, 4 if proprio == "raw" else 0)
    assert ((together.continues > 0) & (together.continues < 1)).all()
    for future in range(3):
        own, noise = belief, generators(1, 2, 3)
        for t in range(IMAGINED):
            own, one = model.step(own, futures[:, future, t], noise)
            for name in ("latents", "proprio", "reward", "continues"):
                found, expected = getattr(one, name)[:, 0, 0], getattr(together, name)[:, future, t]
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            newest = (one.latents[:, 0, 0] - model.tokens_mean) / model.tokens_std
            torch.testing.assert_close(model.features(own)["latent"], newest.flatten(1), rtol=1e-4, atol=1e-4)


def test_beliefs_of_different_numbers_of_frames_can_be_joined() -> None:
    model, batch = make_model(**POOLED), make_windows()
    beliefs = [remember(model, batch, frames) for frames in (1, 2, 4)]
    joined = {name: torch.cat([belief[name] for belief in beliefs]) for name in beliefs[0]}
    action = batch["action"][:, 3]
    found, _ = model.step(joined, action.repeat(3, 1))
    for number, belief in enumerate(beliefs):
        alone, _ = model.step(belief, action)
        for name, value in model.features(alone).items():
            torch.testing.assert_close(model.features(found)[name][3 * number : 3 * number + 3], value)


def test_a_belief_depends_on_the_frames_that_are_observed() -> None:
    model, batch = make_model(**WHOLE), make_windows()
    found = []
    for model.observed in (1, 2):
        before = model.features(remember(model, batch, frames=4))["hidden"]
        found.append(set())
        for frame in range(4):
            for name in ("tokens", "proprio", "action"):
                other = {**batch, name: batch[name].clone()}
                other[name][:, frame] += 100  # a small change leaves codes as they are
                if not torch.equal(model.features(remember(model, other, frames=4))["hidden"], before):
                    found[-1].add((name, frame))
    newest = {("tokens", 3), ("proprio", 3)}
    assert found[0] == newest
    assert newest | {("tokens", 2), ("proprio", 2), ("action", 2)} <= found[1] <= {*found[1]} - {("action", 3)}


def test_what_an_episode_draws_depends_on_its_generator_alone() -> None:
    require_noise_of_each_episode(make_model(**SPLIT, temperature=1.5), make_batch(batch=2, frames=3))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_have_the_distribution_of_the_temperature(temperature: float) -> None:
    model, count = make_model(cells=1, cell_codes=1, temperature=temperature), 4000
    batch = make_batch(batch=1, frames=2)
    many = {name: value.expand(count, *value.shape[1:]) for name, value in batch.items()}
    _, imagined = model.step(remember(model, many, 1), many["action"][:, 0], generators(*range(count)))
    entries = model.tokenizer.books[0].entries
    each = model.tokenizer.decode(entries[:, None]) * model.tokens_std + model.tokens_mean
    numbers = torch.cdist(imagined.latents[:, 0, 0].flatten(1), each.flatten(1)).argmin(1)
    proprio = model.encode_proprio(batch["proprio"])
    seen = model.tokenizer.encode((batch["tokens"][:, 0] - model.tokens_mean) / model.tokens_std)
    logits, _ = model.predict(seen[:, None].expand(-1, 2, -1, -1), proprio, batch["action"])
    shares = (logits[0, 0, 0] / temperature).softmax(0)
    found = torch.bincount(numbers, minlength=VOCABULARY) / count
    assert ((found - shares) / (shares * (1 - shares) / count).sqrt()).abs().max() < 5


@each_choice
def test_gradients_reach_the_actions_of_a_plan(choice: str) -> None:
    model, batch = make_model(**POOLED, plan_codes=choice, proprio="none"), make_windows()
    actions = torch.rand(3, 2, 4, SHAPE.action_dim).requires_grad_()
    model.imagine(remember(model, batch, 2), actions).latents.square().sum().backward()
    assert actions.grad is not None
    assert actions.grad.any(-1).all()


def test_sizes_of_the_preset() -> None:
    known = {field.name for field in fields(IrisOptions)}
    options = {flag.replace("-", "_"): value for flag, value in PRESETS["iris"].items()}
    shape = replace(SHAPE, tokens=196, columns=14, history=options["history"])
    model = build("iris", shape, {name: options[name] for name in known & options.keys()}, make_statistics())
    assert known - options.keys() == {"proprio", "plan_codes"}
    assert (model.codes, model.start(1)["keys"].shape) == (16, (1, 10, 4, 19 * 17 - 1, 64))


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(UserError, match=r"--width 12 .*--heads 4"):
        make_model(width=12, heads=4)


@pytest.fixture
def go(store_path: Path, tiny: TrainOptions) -> Go:
    sizes = {"vocabulary": 8, "code_dim": 4, "channels": 8, "width": 8, "depth": 1, "heads": 2, "dropout": 0.1}
    return make_go(store_path, replace(tiny, model="iris", model_options=sizes))


@pytest.mark.parametrize("by_signal", [False, True])
def test_a_stopped_run_resumes_exactly(go: Go, tmp_path: Path, by_signal: bool) -> None:
    go(tmp_path / "straight")
    with stopped_at(6, by_signal=by_signal):
        go(tmp_path / "stopped")
    go(tmp_path / "stopped")
    assert weights_of(tmp_path / "stopped") == weights_of(tmp_path / "straight")
    assert read_log(tmp_path / "stopped") == read_log(tmp_path / "straight")


@pytest.mark.parametrize("gradient", ["reinforce", "dynamics"])
def test_an_actor_trains_in_its_imagination(go: Go, tmp_path: Path, store_path: Path, gradient: Any) -> None:
    go(tmp_path / "run", steps=2)
    sizes: dict[str, Any] = {"steps": 3, "batch": 4, "observed": 2, "horizon": 2, "units": 8, "device": "cpu"}
    found = train_actor(
        tmp_path / "run", tmp_path / "actor", ActorOptions(**sizes, gradient=gradient), cache=store_path
    )
    assert found["return"] < 0
    assert found["step"] == 3


def test_it_learns_a_planted_linear_system(planted_path: Path, tiny: TrainOptions, run: Path) -> None:
    sizes = {"vocabulary": 64, "code_dim": 4, "channels": 32, "width": 32, "depth": 2, "heads": 2}
    base = replace(tiny, model="iris", model_options=sizes, log_every=50, validate_every=300, checkpoint_every=300)
    skills = make_go(planted_path, base)(run, steps=300, batch=32, frameskip=5, learning_rate=3e-3)
    assert list(skills) == [f"skill_{k}" for k in range(1, 6)]
    assert min(skills[f"skill_{k}"] or 0.0 for k in range(2, 6)) > 0.1
