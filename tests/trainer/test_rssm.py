"""RSSM: its loss against slow independent code, which gradients its parts have, what it draws, and its runs."""

from __future__ import annotations

from dataclasses import fields, replace
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
)
from run_tools import Go, make_go, read_log, stopped_at, weights_of
from torch import Tensor
from torch.distributions import Categorical, Independent, Normal, kl_divergence

from wmcache.common.errors import UserError
from wmcache.trainer.models import DataShape, Dreams, build
from wmcache.trainer.models.rssm import RssmOptions
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.presets import PRESETS
from wmcache.trainer.runs import load_trained

STOCH, CLASSES, DETER = 4, 3, 6
FULL = replace(SHAPE, has_reward=True, has_end=True)
LENGTHS = (5, 2, 4)
each_latent = pytest.mark.parametrize("latent", ["categorical", "gaussian"])


def make_model(shape: DataShape = SHAPE, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"deter": DETER, "blocks": 2, "stoch": STOCH, "classes": CLASSES, "hidden": 8, "free_nats": 0.3}
    model = randomise(build("rssm", shape, sizes | options, make_statistics()))
    for module in model.modules():
        if isinstance(module, torch.nn.RMSNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


def make_episodes(*, whole: bool) -> dict[str, Tensor]:
    """Windows with reward and ends; or whole episodes of `LENGTHS` frames, padded to the longest."""
    batch = make_batch(batch=3, frames=5)
    batch |= {"reward": 9 * torch.rand(3, 5) - 4, "terminated": torch.zeros(3, 5, dtype=torch.bool)}
    batch["terminated"][0, 4] = batch["terminated"][1, 0] = True  # at the last frame, before it, and not at all
    if whole:
        weight = (torch.arange(5) < torch.tensor(LENGTHS)[:, None]).float()
        batch["weight"] = weight / weight.mean()
    return batch


def slow_memory(gru: Any, memory: Tensor, *inputs: Tensor) -> Tensor:
    """The equations of the GRU, block by block, of one episode."""
    seen = torch.cat([layer(value) for layer, value in zip(gru.project, (memory, *inputs), strict=True)])
    own = memory.chunk(gru.blocks)
    parts = [torch.cat([part, seen]) @ gru.mix.weight[k] + gru.mix.bias[k] for k, part in enumerate(own)]
    after = []
    for k, part in enumerate(F.silu(gru.norm(torch.cat(parts))).chunk(gru.blocks)):
        reset, value, update = (part @ gru.gates.weight[k] + gru.gates.bias[k]).chunk(3)
        keep = 1 - torch.sigmoid(update - 1)
        after.append((1 - keep) * torch.tanh(torch.sigmoid(reset) * value) + keep * own[k])
    return torch.cat(after)


def distribution(model: Any, parameters: Tensor) -> Independent:
    if model.options.latent == "gaussian":
        mean, raw = parameters.chunk(2, -1)
        return Independent(Normal(mean, 2 * torch.sigmoid(raw / 2) + 0.1), 1)
    shares = parameters.unflatten(-1, (STOCH, CLASSES)).softmax(-1)
    return Independent(Categorical(probs=0.99 * shares + 0.01 / CLASSES), 1)


def most_probable(model: Any, parameters: Tensor) -> Tensor:
    if model.options.latent == "gaussian":
        return parameters[:STOCH]
    return F.one_hot(parameters.view(STOCH, CLASSES).argmax(-1), CLASSES).flatten().float()


def cross_entropy_of_two_hot(bins: Tensor, logits: Tensor, target: Tensor) -> Tensor:
    log_shares = logits - logits.exp().sum().log()
    for k in range(len(bins) - 1):
        if bins[k] <= target <= bins[k + 1]:
            share = (target - bins[k]) / (bins[k + 1] - bins[k])
            return -(1 - share) * log_shares[k] - share * log_shares[k + 1]
    raise AssertionError


def slow_losses(model: Any, batch: dict[str, Tensor], lengths: tuple[int, ...], *, whole: bool) -> dict[str, Tensor]:
    """Sums over the frames and steps of all episodes, each frame after the one before."""
    tokens = ((batch["tokens"] - model.tokens_mean) / model.tokens_std).flatten(2)
    proprio = (batch["proprio"] - model.proprio_mean) / model.proprio_std
    actions = (batch["action"] - model.action_mean) / model.action_std
    names = ("tokens", "proprio", "dynamics", "representation", "reward", "end", "kl")
    total = {name: torch.zeros(()) for name in names}
    for episode, length in enumerate(lengths):
        memory, value, action = torch.zeros(DETER), torch.zeros(model.latent.size), torch.zeros(SHAPE.action_dim)
        for t in range(length + 1):
            memory = slow_memory(model.memory, memory, value, action)
            prior = model.prior(memory)
            if t < length:
                frame = torch.cat([tokens[episode, t], proprio[episode, t]])
                posterior = model.posterior(torch.cat([memory, model.encoder(frame)]))
                value, action = most_probable(model, posterior), actions[episode, t]
                kl = kl_divergence(distribution(model, posterior), distribution(model, prior))
                error = (model.decoder(torch.cat([memory, value])) - frame).square()
                total["tokens"] += error[: tokens.shape[2]].sum()
                total["proprio"] += error[tokens.shape[2] :].sum()
                total["kl"] += kl
                total["dynamics"] += model.options.dynamics_weight * kl.clamp_min(0.3)
                total["representation"] += model.options.representation_weight * kl.clamp_min(0.3)
            else:
                value = most_probable(model, prior)
            ended = batch["terminated"][episode, t - 1]
            if t and (t < length or not whole or ended):
                state = torch.cat([memory, value])
                reward = batch["reward"][episode, t - 1]
                found = cross_entropy_of_two_hot(model.two_hot.values, model.heads["reward"](state), reward)
                total["reward"] += model.options.reward_weight * found
                logit = model.heads["end"](state)[0]
                total["end"] -= F.logsigmoid(logit if ended else -logit)
    return total


@each_latent
@pytest.mark.parametrize("whole", [False, True])
def test_the_loss_is_that_of_each_frame_after_the_one_before(latent: str, whole: bool) -> None:
    weights = {"dynamics_weight": 0.8, "representation_weight": 0.2, "reward_weight": 2.0}
    model, batch = make_model(FULL, latent=latent, **weights), make_episodes(whole=whole)
    scale = batch["weight"].max() if whole else torch.ones(())
    sums = slow_losses(model, batch, LENGTHS if whole else (5, 5, 5), whole=whole)
    expected = {name: scale * value / 15 for name, value in sums.items()}
    losses = model.loss(batch)
    total = losses.pop("loss")
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(total, torch.stack([*expected.values()]).sum() - expected["kl"], rtol=1e-4, atol=1e-4)


@each_latent
def test_padding_changes_nothing(latent: str) -> None:
    model, batch = make_model(FULL, latent=latent), make_episodes(whole=True)
    padded = {name: value.clone() for name, value in batch.items()}
    for name in ("tokens", "proprio", "action", "reward", "terminated"):
        for row, length in enumerate(LENGTHS):
            padded[name][row, length:] = 0
    torch.testing.assert_close(model.loss(padded)["loss"], model.loss(batch)["loss"])


@each_latent
def test_each_divergence_trains_its_own_side(latent: str) -> None:
    batch = make_batch(batch=3, frames=1)  # no memory leads from one frame to the other

    def gradients(**options: Any) -> dict[str, list[Tensor]]:
        model = make_model(latent=latent, **{"free_nats": 0.0, "dynamics_weight": 1.0, **options})
        model.loss(batch)["loss"].backward()
        parts = {"prior": model.prior, "posterior": model.posterior}
        zero = torch.zeros(())
        return {name: [zero if p.grad is None else p.grad for p in part.parameters()] for name, part in parts.items()}

    both, other = gradients(), gradients(dynamics_weight=5.0)
    torch.testing.assert_close(both["posterior"], other["posterior"])
    torch.testing.assert_close([5 * one for one in both["prior"]], other["prior"])
    posterior_alone = gradients(dynamics_weight=0.0)
    assert not any(one.any() for one in posterior_alone["prior"])
    assert not torch.allclose(posterior_alone["posterior"][0], gradients(representation_weight=3.0)["posterior"][0])
    assert not any(one.any() for one in gradients(free_nats=1e4)["prior"])


@each_latent
def test_values_are_drawn_while_training_and_gradients_pass_them(latent: str) -> None:
    model, batch = make_model(latent=latent).train(), make_batch(batch=3, frames=4)
    torch.manual_seed(1)
    first, second = model.loss(batch), model.loss(batch)
    assert first["tokens"] != second["tokens"]
    torch.manual_seed(1)
    assert torch.equal(model.loss(batch)["loss"], first["loss"])
    first["loss"].backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.encoder.parameters())
    model.eval()
    assert torch.equal(model.loss(batch)["loss"], model.loss(batch)["loss"])


@each_latent
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("proprio", ["raw", "none"])
def test_a_step_is_one_of_those_that_it_imagines(latent: str, temperature: float, proprio: str) -> None:
    model = make_model(FULL, latent=latent, temperature=temperature, proprio=proprio)
    batch = make_batch(batch=2, frames=2 + IMAGINED)
    assert isinstance(model, Dreams)
    futures = make_futures(batch["action"][:, 2:], past=0)
    belief = remember(model, batch, frames=3)
    together = model.imagine(belief, futures, generators(1, 2))
    assert together.latents.shape == (2, 3, IMAGINED, SHAPE.tokens, SHAPE.token_dim)
    assert together.proprio.shape == (2, 3, IMAGINED, 4 if proprio == "raw" else 0)
    assert ((together.continues > 0) & (together.continues < 1)).all()
    for future in range(3):
        own, noise = belief, generators(1, 2)
        for t in range(IMAGINED):
            own, one = model.step(own, futures[:, future, t], noise)
            for name in ("latents", "proprio", "reward", "continues"):
                found, expected = getattr(one, name)[:, 0, 0], getattr(together, name)[:, future, t]
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            newest = (one.latents[:, 0, 0] - model.tokens_mean) / model.tokens_std
            torch.testing.assert_close(model.features(own)["latent"], newest.flatten(1), rtol=1e-4, atol=1e-4)
    assert model.features(own)["hidden"].shape == (2, DETER + model.latent.size)


@each_latent
def test_it_remembers_frames_before_the_newest(latent: str) -> None:
    model, batch = make_model(latent=latent), make_batch(batch=2, frames=4)
    before = remember(model, batch, frames=4)["memory"]
    for name in ("tokens", "proprio", "action"):
        other = {**batch, name: batch[name].clone()}
        other[name][:, 0] += 100  # a small change leaves classes as they are
        assert not torch.isclose(remember(model, other, frames=4)["memory"], before).all()
        last = {**batch, name: batch[name].clone()}
        last[name][:, 3] += 100  # neither the newest frame nor the action after it
        assert torch.equal(remember(model, last, frames=4)["memory"], before)


@each_latent
def test_what_an_episode_draws_depends_on_its_generator_alone(latent: str) -> None:
    require_noise_of_each_episode(make_model(latent=latent, temperature=0.7), make_batch(batch=2, frames=3))


@each_latent
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_have_the_distribution_of_the_temperature(latent: str, temperature: float) -> None:
    model, count = make_model(latent=latent, temperature=temperature), 4000
    batch = {name: value.expand(count, *value.shape[1:]) for name, value in make_batch(batch=1, frames=2).items()}
    belief = remember(model, batch, frames=1)
    after, _ = model.step(belief, batch["action"][:, 0], generators(*range(count)))
    drawn = model.features(after)["hidden"][:, DETER:]
    own = distribution(model, model.prior(after["memory"][0]))
    if latent == "gaussian":
        mean, variance = own.mean, temperature * own.variance
        torch.testing.assert_close(drawn.var(0), variance, rtol=0.2, atol=0)
    else:
        shares = own.base_dist.probs ** (1 / temperature)
        mean = (shares / shares.sum(-1, keepdim=True)).flatten()
        variance = mean * (1 - mean)
        assert (drawn.unflatten(1, (STOCH, CLASSES)).sum(-1) == 1).all()
    assert ((drawn.mean(0) - mean) / (variance / count).sqrt()).abs().max() < 5


@each_latent
def test_without_actions_it_predicts_the_same_whatever_is_done(latent: str) -> None:
    model, batch = make_model(FULL, latent=latent, actions="none"), make_batch(batch=2, frames=4)
    assert not model.takes_actions
    other = {**batch, "action": batch["action"] + 3}
    for found, expected in zip(remember(model, other, 4).values(), remember(model, batch, 4).values(), strict=True):
        assert torch.equal(found, expected)
    frames = {"reward": torch.rand(2, 4), "terminated": torch.zeros(2, 4, dtype=torch.bool)}
    assert torch.equal(model.loss(other | frames)["loss"], model.loss(batch | frames)["loss"])


def test_sizes_of_the_presets() -> None:
    known = {field.name for field in fields(RssmOptions)}
    found = {}
    for name in ("dreamer-v3", "diswm"):
        options = {flag.replace("-", "_"): value for flag, value in PRESETS[name].items()}
        model = build(
            PRESETS[name]["model"],
            SHAPE,
            {key: options[key] for key in known & options.keys()},
            make_statistics(),
        )
        assert {"latent", "deter", "hidden", "free_nats", "sequence"} <= known & options.keys()
        found[name] = model.features(model.start(1))["hidden"].shape[1]
    assert found == {"dreamer-v3": 2048 + 32 * 16, "diswm": 200 + 50}


def test_latents_are_drawn_while_training() -> None:
    model, batch = make_model(latents="drawn"), make_batch(batch=2, frames=3)
    assert (model.tokens_mean == 0).all()
    assert (model.tokens_std == 1).all()
    expected = model.loss(batch)
    assert torch.equal(model.loss({**batch, "logvar": torch.zeros_like(batch["tokens"])})["loss"], expected["loss"])
    model.train()
    found = []
    for logvar in (-50.0, 1.0):
        torch.manual_seed(1)
        found.append(model.loss({**batch, "logvar": torch.full_like(batch["tokens"], logvar)})["tokens"])
    torch.manual_seed(1)
    torch.randn_like(batch["tokens"])
    torch.testing.assert_close(found[0], model.loss(batch)["tokens"])
    assert found[1] > found[0]


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(UserError, match=r"196 x 384.*wmcache derive"):
        build("rssm", replace(SHAPE, tokens=196, token_dim=384), {}, make_statistics())
    with pytest.raises(UserError, match="--blocks 4"):
        make_model(blocks=4)


@pytest.fixture
def go(store_path: Path, tiny: TrainOptions) -> Go:
    sizes = {"deter": 8, "stoch": 4, "classes": 4, "hidden": 8, "sequence": 5}
    return make_go(store_path, replace(tiny, model="rssm", model_options=sizes))


@pytest.mark.parametrize("by_signal", [False, True])
@pytest.mark.parametrize("options", [{}, {"latent": "gaussian", "sequences": "episodes"}], ids=str)
def test_a_stopped_run_resumes_exactly(go: Go, tmp_path: Path, options: dict[str, Any], by_signal: bool) -> None:
    go(tmp_path / "straight", model_options=options)
    with stopped_at(6, by_signal=by_signal):
        go(tmp_path / "stopped", model_options=options)
    go(tmp_path / "stopped", model_options=options)
    assert weights_of(tmp_path / "stopped") == weights_of(tmp_path / "straight")
    assert read_log(tmp_path / "stopped") == read_log(tmp_path / "straight")


@each_latent
def test_it_learns_a_planted_linear_system(planted_path: Path, tiny: TrainOptions, run: Path, latent: str) -> None:
    sizes = {"latent": latent, "deter": 64, "hidden": 64, "stoch": 16, "classes": 8, "sequence": 6}
    sizes |= {"free_nats": 0.0, "representation_weight": 0.01}  # a frame has few values, and changes slowly
    base = replace(tiny, model="rssm", model_options=sizes, log_every=50, validate_every=300, checkpoint_every=300)
    skills = make_go(planted_path, base)(run, steps=300, batch=32, frameskip=5, learning_rate=3e-3)
    assert list(skills) == [f"skill_{k}" for k in range(1, 6)]
    assert min(skills[f"skill_{k}"] or 0.0 for k in range(2, 6)) > 0.1
    trained, untrained = (load_trained(run, torch.device("cpu"), untrained=random) for random in (False, True))
    assert torch.equal(trained.tokens_mean, untrained.tokens_mean)
    assert not any(
        torch.equal(one, other)
        for one, other in zip(trained.parameters(), untrained.parameters(), strict=True)
        if one.ndim > 1
    )
