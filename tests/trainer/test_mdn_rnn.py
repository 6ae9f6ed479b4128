"""MDN-RNN: its likelihood against slow independent code, what it remembers, what it draws, and its runs."""

from __future__ import annotations

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
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from wmcache.common.errors import UserError
from wmcache.trainer.models import DataShape, Dreams, build
from wmcache.trainer.options import TrainOptions

VALUES = SHAPE.tokens * SHAPE.token_dim
HIDDEN, MIXTURES = 6, 3
FULL = replace(SHAPE, has_reward=True, has_end=True)
each_mixture = pytest.mark.parametrize("mixture", ["dimension", "vector"])


def make_model(shape: DataShape = SHAPE, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden": HIDDEN, "mixtures": MIXTURES, "sequence": 4}
    return randomise(build("mdn-rnn", shape, sizes | options, make_statistics())).eval()


def slow_outputs(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of torch's own LSTM after each frame [B, T, hidden], and the standardised frames [B, T, …]."""
    tokens = ((batch["tokens"] - model.tokens_mean) / model.tokens_std).flatten(2)
    proprio = (batch["proprio"] - model.proprio_mean) / model.proprio_std
    action = (batch["action"] - model.action_mean) / model.action_std
    lstm = nn.LSTM(model.inputs.in_features, HIDDEN, batch_first=True)
    forget = torch.zeros(4, HIDDEN)
    forget[1] = 1
    values = (model.inputs.weight, model.recurrence.weight, model.inputs.bias, forget.flatten())
    with torch.no_grad():
        for own, value in zip(lstm.parameters(), values, strict=True):
            own.copy_(value)
    hidden, _ = lstm(torch.cat([tokens, proprio, action], 2))
    return hidden, tokens, proprio


@each_mixture
@pytest.mark.parametrize("predict", ["change", "frame"])
def test_the_loss_is_the_likelihood_of_a_mixture_and_that_of_the_heads(mixture: str, predict: str) -> None:
    model, batch = make_model(FULL, mixture=mixture, predict=predict), make_batch(batch=3, frames=5)
    batch |= {"reward": torch.rand(3, 5), "terminated": torch.rand(3, 5) > 0.5}
    hidden, tokens, proprio = slow_outputs(model, batch)
    changes = predict == "change"
    total = 0.0
    for episode in range(3):
        for t in range(4):
            logits, means, logs = (part(hidden[episode, t]).view(-1, MIXTURES) for part in model.mixture.values())
            sigmas = logs.exp().clamp_min(0.01)
            target = tokens[episode, t + 1] - (tokens[episode, t] if changes else 0)
            if mixture == "dimension":
                for value in range(VALUES):
                    one = MixtureSameFamily(Categorical(logits=logits[value]), Normal(means[value], sigmas[value]))
                    total -= one.log_prob(target[value]).item()
            else:
                joint = Independent(Normal(means.T, sigmas.T), 1)
                total -= MixtureSameFamily(Categorical(logits=logits[0]), joint).log_prob(target).item()
    moved = proprio[:, 1:] - (proprio[:, :-1] if changes else 0)
    ends = batch["terminated"].float()
    expected = {
        "nll": torch.tensor(total / (3 * 4 * VALUES)),
        "proprio": (model.heads["proprio"](hidden[:, :-1]) - moved).square().mean(),
        "reward": (model.heads["reward"](hidden)[..., 0] - batch["reward"]).square().mean(),
        "end": F.binary_cross_entropy_with_logits(model.heads["end"](hidden)[..., 0], ends),
    }
    losses = model.loss(batch)
    torch.testing.assert_close(losses.pop("loss"), torch.stack([*expected.values()]).sum(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)


@each_mixture
@pytest.mark.parametrize("predict", ["change", "frame"])
@pytest.mark.parametrize("proprio", ["raw", "none"])
def test_it_imagines_as_if_it_observed_what_it_imagined_step_by_step(mixture: str, predict: str, proprio: str) -> None:
    model = make_model(FULL, mixture=mixture, predict=predict, proprio=proprio)
    batch = make_batch(batch=2, frames=2 + IMAGINED)
    futures = make_futures(batch["action"][:, 2:], past=0)
    belief = remember(model, batch, frames=3)
    together = model.imagine(belief, futures)
    assert together.latents.shape == (2, 3, IMAGINED, SHAPE.tokens, SHAPE.token_dim)
    assert together.proprio.shape == (2, 3, IMAGINED, 4 if proprio == "raw" else 0)
    assert ((together.continues > 0) & (together.continues < 1)).all()
    for future in range(3):
        own = belief
        for t in range(IMAGINED):
            one = model.imagine(own, futures[:, future : future + 1, t : t + 1])
            for name in ("latents", "proprio", "reward", "continues"):
                found, expected = getattr(one, name)[:, 0, 0], getattr(together, name)[:, future, t]
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            known = (
                one.proprio[:, 0, 0] * model.proprio_std + model.proprio_mean if proprio == "raw" else torch.zeros(2, 4)
            )
            own = model.observe(own, one.latents[:, 0, 0], known, futures[:, future, t])


@each_mixture
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_steps_without_frames_are_what_it_imagines(mixture: str, temperature: float) -> None:
    model, batch = make_model(FULL, mixture=mixture, temperature=temperature), make_batch(batch=2, frames=2 + IMAGINED)
    assert isinstance(model, Dreams)
    belief, actions = remember(model, batch, frames=2), batch["action"][:, 1:]
    together = model.imagine(belief, actions[:, None], generators(1, 2))
    noise = generators(1, 2)
    for t in range(actions.shape[1]):
        before = belief
        belief, one = model.step(belief, actions[:, t], noise)
        for name in ("latents", "proprio", "reward", "continues"):
            assert torch.equal(getattr(one, name)[:, 0, 0], getattr(together, name)[:, 0, t])
        features = model.features(belief)
        newest = (one.latents[:, 0, 0] - model.tokens_mean) / model.tokens_std
        torch.testing.assert_close(features["latent"], newest.flatten(1), rtol=1e-4, atol=1e-4)
        assert features["hidden"].shape == features["cell"].shape == (2, HIDDEN)
        assert not torch.equal(features["hidden"], model.features(before)["hidden"])


def test_it_remembers_frames_before_the_newest() -> None:
    model, batch = make_model(), make_batch(batch=2, frames=4)
    action = batch["action"][:, None, 3:]
    before = model.imagine(remember(model, batch, frames=4), action).latents
    for name in ("tokens", "proprio", "action"):
        other = {**batch, name: batch[name].clone()}
        other[name][:, 0] += 1
        assert not torch.isclose(model.imagine(remember(model, other, frames=4), action).latents, before).all()


@each_mixture
def test_without_temperature_it_draws_nothing(mixture: str) -> None:
    model, batch = make_model(mixture=mixture), make_batch(batch=2, frames=3)
    belief, futures = remember(model, batch, frames=2), make_futures(batch["action"], past=0)
    expected = model.imagine(belief, futures).latents
    assert torch.equal(model.imagine(belief, futures, generators(1, 2)).latents, expected)
    warm = make_model(mixture=mixture, temperature=1.0)
    assert torch.equal(warm.imagine(belief, futures).latents, expected)
    assert not torch.isclose(warm.imagine(belief, futures, generators(1, 2)).latents, expected).all()


@each_mixture
def test_what_an_episode_draws_depends_on_its_generator_alone(mixture: str) -> None:
    require_noise_of_each_episode(make_model(mixture=mixture, temperature=0.7), make_batch(batch=2, frames=3))


@each_mixture
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_draws_have_the_distribution_of_the_temperature(mixture: str, temperature: float) -> None:
    model, count = make_model(mixture=mixture, temperature=temperature, predict="frame"), 4000
    batch = {name: value.expand(count, *value.shape[1:]) for name, value in make_batch(batch=1, frames=2).items()}
    belief = remember(model, batch, frames=1)
    drawn = model.imagine(belief, batch["action"][:, None, :1], generators(*range(count))).latents[:, 0, 0]
    drawn = ((drawn - model.tokens_mean) / model.tokens_std).flatten(1)
    hidden = slow_outputs(model, {name: value[:1] for name, value in batch.items()})[0][0, 0]
    logits, means, logs = (part(hidden).view(-1, MIXTURES) for part in model.mixture.values())
    sigmas = logs.exp().clamp_min(0.01) * temperature**0.5
    shares = (logits / temperature).softmax(-1)
    mean = (shares * means).sum(-1)
    variance = (shares * (sigmas.square() + means.square())).sum(-1) - mean.square()
    error = (drawn.mean(0) - mean) / (variance / count).sqrt()
    assert error.abs().max() < 5
    torch.testing.assert_close(drawn.var(0), variance, rtol=0.2, atol=0)


def test_the_gradient_reaches_every_action_that_was_taken() -> None:
    model, batch = make_model(temperature=1.0), make_batch(batch=2, frames=4)
    futures = make_futures(batch["action"], past=0).requires_grad_()
    loss = model.imagine(remember(model, batch, frames=2), futures, generators(1, 2)).latents.square().sum()
    assert torch.autograd.grad(loss, futures)[0].flatten(3).any(-1).all()


def test_a_rollout_returns_float32_of_the_stores_units() -> None:
    model, batch = make_model(predict="change"), make_batch(batch=2, frames=5)
    nn.init.zeros_(model.mixture["means"].weight)
    nn.init.zeros_(model.mixture["means"].bias)
    latents, _ = roll_out(model, batch["tokens"][:, :1].half(), batch["proprio"][:, :1], batch["action"][:, :3])
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, batch["tokens"][:, :1].half().float().expand(-1, 3, -1, -1))


def test_frames_of_too_many_values_are_refused() -> None:
    with pytest.raises(UserError, match=r"196 x 384.*wmcache derive"):
        build("mdn-rnn", replace(SHAPE, tokens=196, token_dim=384), {}, make_statistics())


@pytest.fixture
def go(store_path: Path, tiny: TrainOptions) -> Go:
    return make_go(store_path, replace(tiny, model="mdn-rnn", model_options={"hidden": 8, "sequence": 5}))


@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "model_options": {"mixture": "vector"}}], ids=str)
def test_a_stopped_run_resumes_exactly(go: Go, tmp_path: Path, options: dict[str, Any]) -> None:
    go(tmp_path / "straight", **options)
    with stopped_at(6):
        go(tmp_path / "stopped", **options)
    go(tmp_path / "stopped", **options)
    assert weights_of(tmp_path / "stopped") == weights_of(tmp_path / "straight")
    assert read_log(tmp_path / "stopped") == read_log(tmp_path / "straight")


def test_it_learns_a_planted_linear_system(planted_path: Path, tiny: TrainOptions, run: Path) -> None:
    sizes = {"hidden": 64, "sequence": 8}
    base = replace(tiny, model="mdn-rnn", model_options=sizes, log_every=50, validate_every=300, checkpoint_every=300)
    go = make_go(planted_path, base)
    skills = go(run, steps=300, batch=32, frameskip=2, learning_rate=5e-3)
    assert list(skills) == [f"skill_{k}" for k in range(1, 6)]
    assert min(value for value in skills.values() if value is not None) > 0.5


def test_sequences_longer_than_all_episodes_are_refused(go: Go, run: Path) -> None:
    with pytest.raises(UserError, match="65 frames"):
        go(run, model_options={"sequence": 13})  # of 60
    assert not run.exists()
