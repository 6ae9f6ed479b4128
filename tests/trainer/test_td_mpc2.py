"""TD-MPC2: its loss against slow independent code, what each part learns from, its rollouts, costs and proposals, and its runs."""

from __future__ import annotations

import math
from collections import Counter
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
)
from run_tools import Go, make_go, read_log, stopped_at, weights_of
from torch import Tensor
from torch.distributions import Normal

from wmcache.common.errors import UserError
from wmcache.engine.checkpoint import FILES, last_checkpoint, load_tensors
from wmcache.trainer.models import DataShape, Dreams, Proposes, build
from wmcache.trainer.models.td_mpc2.parts import SimNorm
from wmcache.trainer.options import TrainOptions

LATENT, AHEAD, ROWS, DISCOUNT, ACTIONS = 8, 3, 6, 0.9, SHAPE.action_dim
RICH = replace(SHAPE, has_reward=True)
FULL = replace(RICH, has_end=True)
BINS = torch.linspace(-10, 10, 101)
each_reward = pytest.mark.parametrize("reward", ["goal", "data", "none"])


def make_model(shape: DataShape = FULL, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"latent": LATENT, "simplex": 4, "encoder_width": 6, "hidden": 7, "critics": 3, "discount": DISCOUNT}
    model = randomise(build("td-mpc2", shape, sizes | options, make_statistics())).eval()
    if model.agent is not None:
        model.agent.range.ends.copy_(torch.tensor([-1.0, 3.0]))
        model.agent.range.weight.fill_(1.0)
    return model


def make_windows() -> dict[str, Tensor]:
    """Windows with goals, rewards, and ends after the last frame of some."""
    batch = make_batch(batch=ROWS, frames=AHEAD + 1)
    noise = torch.Generator().manual_seed(4)
    batch["goal_tokens"] = torch.randn(ROWS, SHAPE.tokens, SHAPE.token_dim, generator=noise)
    batch["reward"] = 9 * torch.rand(ROWS, AHEAD + 1, generator=noise) - 4
    batch["terminated"] = torch.zeros(ROWS, AHEAD + 1, dtype=torch.bool)
    batch["terminated"][::2, -1] = True
    return batch


def mean_of(logits: Tensor) -> Tensor:
    small = (logits.softmax(-1) * BINS).sum()
    return small.sign() * (small.abs().exp() - 1)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    small = target.sign() * (target.abs() + 1).log()
    above = int((small >= BINS).sum())
    share = (small - BINS[above - 1]) / (BINS[above] - BINS[above - 1])
    logs = logits.log_softmax(-1)
    return -(1 - share) * logs[above - 1] - share * logs[above]


def choose(model: Any, state: Tensor) -> tuple[Tensor, Tensor]:
    """The most probable action and its log-density before it is scaled."""
    mean, raw = model.agent.policy.network(state).chunk(2)
    log_std = -10 + 6 * (raw.tanh() + 1)
    logs = Normal(mean, log_std.exp()).log_prob(mean).sum() - (1 - mean.tanh() ** 2 + 1e-6).log().sum()
    return math.sqrt(3) * mean.tanh(), logs


def slow_losses(model: Any, batch: dict[str, Tensor], reward: str, *, ends: bool) -> Counter[str]:
    """One row and one step after the other, with the first two critics."""
    tokens = ((batch["tokens"] - model.tokens_mean) / model.tokens_std).flatten(2)
    later = ((batch["goal_tokens"] - model.tokens_mean) / model.tokens_std).flatten(1)
    proprio = (batch["proprio"] - model.proprio_mean) / model.proprio_std
    actions = (batch["action"] - model.action_mean) / model.action_std
    total: Any = Counter()
    for row in range(ROWS):
        frames = [torch.cat([tokens[row, t], proprio[row, t]]) for t in range(AHEAD + 1)]
        seen = [model.encoder(frame) for frame in frames]
        latents = seen[:1]
        for t in range(AHEAD):
            latents.append(model.dynamics(torch.cat([latents[t], actions[row, t]])))
            total["consistency"] += 20 * 0.5**t * F.mse_loss(latents[-1], seen[t + 1]) / (ROWS * AHEAD)
        for t in range(AHEAD + 1):
            shares = ROWS * (AHEAD + 1)
            total["decoder"] += F.mse_loss(model.decoder(latents[t]), frames[t]) / shares
            total["goal"] += 20 * F.mse_loss(model.goal_encoder(tokens[row, t]), seen[t]) / shares
        if reward == "none":
            continue
        goal = [tokens[row, 1 + row // 4 % AHEAD], later[row - 1], later[row], later[row]][row % 4]
        aim = model.goal_encoder(goal) if reward == "goal" else tokens[row, 0, :0]
        states = [torch.cat([one, aim]) for one in latents]
        following = [*seen[1:], model.dynamics(torch.cat([seen[-1], actions[row, -1]]))]
        steps = AHEAD + ends
        for t in range(steps):
            state = torch.cat([following[t], aim])
            known, ahead = torch.cat([states[t], actions[row, t]]), torch.cat([state, choose(model, state)[0]])
            value = min(mean_of(critic(ahead)) for critic in model.agent.slow.members[:2])
            going = DISCOUNT * (1 - float(ends and batch["terminated"][row, t]))
            own = batch["reward"][row, t]
            if reward == "goal":
                own = -((tokens[row, t + 1] - goal) ** 2).mean().sqrt()
            scale = 0.5**t / (ROWS * steps)
            total["reward"] += 0.1 * scale * cross_entropy(model.agent.reward(known), own)
            for critic in model.agent.critics.members:
                total["value"] += 0.1 * scale * cross_entropy(critic(known), own + going * value) / 3
            if ends:
                logit = model.agent.end(known)[0]
                total["end"] -= scale * F.logsigmoid(logit if batch["terminated"][row, t] else -logit)
        for t, state in enumerate(states):
            action, logs = choose(model, state)
            values = [mean_of(critic(torch.cat([state, action]))) for critic in model.agent.critics.members[:2]]
            gain = sum(values) / 2 / 4 - 1e-4 * ACTIONS * logs
            total["policy"] -= 0.5**t * gain / (ROWS * (AHEAD + 1))
    return total


@pytest.mark.parametrize(("reward", "shape"), [("goal", FULL), ("data", RICH), ("data", FULL), ("none", FULL)], ids=str)
def test_the_loss_is_that_of_each_step_after_the_one_before(reward: str, shape: DataShape) -> None:
    model, batch = make_model(shape, reward=reward), make_windows()
    expected = slow_losses(model, batch, reward, ends=reward == "data" and shape.has_end)
    losses = model.loss(batch)
    total = losses.pop("loss")
    torch.testing.assert_close(losses, dict(expected), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(total, torch.stack([*expected.values()]).sum(), rtol=1e-4, atol=1e-4)


def test_simnorm_makes_each_group_probabilities() -> None:
    values = 3 * torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    found = SimNorm(4)(values)
    for index in torch.cartesian_prod(torch.arange(2), torch.arange(5), torch.arange(3)).tolist():
        batch, row, group = index
        one = [math.exp(value) for value in values[batch, row, 4 * group : 4 * group + 4].tolist()]
        expected = torch.tensor([value / sum(one) for value in one])
        torch.testing.assert_close(found[batch, row, 4 * group : 4 * group + 4], expected)


def gradients_of(model: Any, *parts: str) -> dict[str, list[Tensor]]:
    """The gradients of the loss in parts of a model, and of its agent."""
    model.zero_grad()
    model.loss(make_windows())["loss"].backward()
    owners = {name: getattr(model, name, None) or getattr(model.agent, name) for name in parts}
    return {
        name: [torch.zeros(()) if p.grad is None else p.grad.clone() for p in owner.parameters()]
        for name, owner in owners.items()
    }


@each_reward
def test_the_decoder_trains_itself_alone(reward: str) -> None:
    model, others = make_model(reward=reward), ["encoder", "goal_encoder", "dynamics"]
    first = gradients_of(model, "decoder", *others)
    assert all(any(one.any() for one in found) for found in first.values())
    with torch.no_grad():
        model.decoder[-1].weight.mul_(3.0)
    second = gradients_of(model, "decoder", *others)
    assert not torch.allclose(first.pop("decoder")[0], second.pop("decoder")[0])
    torch.testing.assert_close(first, second)


def test_the_policy_does_not_train_what_judges_it() -> None:
    model = make_model(reward="goal")
    judges = ["encoder", "goal_encoder", "dynamics", "critics", "reward"]
    first = gradients_of(model, "policy", *judges)
    model.agent.range.ends[1] = 99.0  # what its gain is divided by
    second = gradients_of(model, "policy", "slow", *judges)
    assert not torch.allclose(first.pop("policy")[0], second.pop("policy")[0])
    assert not any(one.any() for one in second.pop("slow"))
    torch.testing.assert_close(first, second)


def test_the_slow_critics_follow() -> None:
    model = make_model(reward="goal")
    pairs = list(zip(model.agent.slow.parameters(), model.agent.critics.parameters(), strict=True))
    expected = [0.99 * slow + 0.01 * fast for slow, fast in pairs]
    model.after_step()
    torch.testing.assert_close([slow for slow, _ in pairs], expected)
    trained = {id(one) for group in model.parameter_groups() for one in group["params"]}
    assert not trained & {id(slow) for slow, _ in pairs}
    assert trained | {id(slow) for slow, _ in pairs} == {id(one) for one in model.parameters()}


def test_values_are_of_drawn_actions_while_training() -> None:
    model, batch = make_model(reward="goal").train(), make_windows()
    torch.manual_seed(1)
    first, second = model.loss(batch), model.loss(batch)
    assert first["policy"] != second["policy"]
    assert first["consistency"] == second["consistency"]
    model.eval()
    state = torch.get_rng_state()
    assert torch.equal(model.loss(batch)["loss"], model.loss(batch)["loss"])
    assert torch.equal(torch.get_rng_state(), state)


@each_reward
@pytest.mark.parametrize("proprio", ["raw", "none"])
def test_a_rollout_that_goes_on_from_a_kept_latent_is_the_same(reward: str, proprio: str) -> None:
    model, batch = make_model(reward=reward, proprio=proprio), make_batch(batch=2, frames=2 + IMAGINED)
    assert not isinstance(model, Dreams)
    assert model.blind == (proprio == "none")
    belief, futures = remember(model, batch, frames=2), make_futures(batch["action"][:, 2:], past=0)
    together = model.imagine(belief, futures)
    assert together.latents.shape == (2, 3, IMAGINED, SHAPE.tokens, SHAPE.token_dim)
    assert together.proprio.shape == (2, 3, IMAGINED, 0 if proprio == "none" else SHAPE.proprio_dim)
    assert (together.reward is None) == (together.value is None) == (reward != "data")
    for future in range(3):
        kept = belief
        for t in range(IMAGINED):
            one = model.imagine(kept, futures[:, future : future + 1, t : t + 1])
            kept = {"latent": one.state[:, 0, 0, -LATENT:]}
            for name in ("latents", "proprio", "state", "reward", "continues"):
                if getattr(one, name) is not None:
                    found, expected = getattr(one, name)[:, 0, 0], getattr(together, name)[:, future, t]
                    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        if together.value is not None:
            torch.testing.assert_close(one.value[:, 0, 0], together.value[:, future, 0], rtol=1e-4, atol=1e-4)


def test_a_step_sees_no_later_action_and_no_earlier_frame() -> None:
    model, batch = make_model(reward="data"), make_batch(batch=2, frames=2 + IMAGINED)
    actions = batch["action"][:, None, 2:]
    usual = model.imagine(remember(model, batch, frames=2), actions)
    for t in range(IMAGINED):
        other = actions.clone()
        other[:, :, t] += 1.0
        found = model.imagine(remember(model, batch, frames=2), other)
        assert torch.equal(found.latents[:, :, :t], usual.latents[:, :, :t])
        assert not torch.isclose(found.latents[:, :, t], usual.latents[:, :, t]).all()
    earlier = {**batch, "tokens": batch["tokens"].clone()}
    earlier["tokens"][:, 0] += 1.0
    assert torch.equal(model.imagine(remember(model, earlier, frames=2), actions).latents, usual.latents)
    earlier["tokens"][:, 1] += 1.0
    assert not torch.isclose(model.imagine(remember(model, earlier, frames=2), actions).latents, usual.latents).all()


@pytest.mark.parametrize("pessimism", [0.0, 0.7])
def test_costs_are_the_negative_return(pessimism: float) -> None:
    model, batch = make_model(reward="goal", pessimism=pessimism), make_batch(batch=2, frames=2 + IMAGINED)
    imagined = model.imagine(remember(model, batch, frames=2), make_futures(batch["action"][:, 2:], past=0))
    goal = batch["tokens"][:, 0]
    found = model.cost(imagined, goal)
    assert found.shape == (2, 3, IMAGINED)
    for episode in range(2):
        aim = model.goal_encoder(((goal[episode] - model.tokens_mean) / model.tokens_std).flatten())
        for future in range(3):
            total = torch.zeros(())
            for t in range(IMAGINED):
                before, move, after = imagined.state[episode, future, t].split([LATENT, ACTIONS, LATENT])
                total += DISCOUNT**t * mean_of(model.agent.reward(torch.cat([before, aim, move])))
            state = torch.cat([after, aim])
            last = torch.cat([state, choose(model, state)[0]])
            values = torch.stack([mean_of(critic(last)) for critic in model.agent.critics.members])
            total += DISCOUNT**IMAGINED * (values.mean() - pessimism * values.std())
            torch.testing.assert_close(-found[episode, future].sum(), total, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reward", ["data", "none"])
def test_without_rewards_of_goals_costs_are_distances_of_latents(reward: str) -> None:
    model, batch = make_model(reward=reward, proprio="none"), make_batch(batch=2, frames=3)
    belief = remember(model, batch, frames=2)
    imagined = model.imagine(belief, batch["action"][:, None, 1:])
    found = model.cost(imagined, batch["tokens"][:, 0])
    expected = (imagined.state[..., -LATENT:] - remember(model, batch, frames=1)["latent"][:, None, None]) ** 2
    torch.testing.assert_close(found, expected.mean(-1))


def test_proposals_are_the_policys_and_each_episodes_own() -> None:
    model, batch = make_model(reward="goal"), make_batch(batch=2, frames=2)
    assert isinstance(model, Proposes)
    belief, goal = remember(model, batch, frames=2), batch["tokens"][:, 0]
    found = model.propose(belief, generators(1, 2), goal=goal, horizon=3, count=4)
    assert found.shape == (2, 4, 3, ACTIONS)
    bound = math.sqrt(3) * model.action_std + 1e-5
    assert ((found - model.action_mean).abs() <= bound).all()
    for episode in range(2):
        own = {"latent": belief["latent"][episode : episode + 1]}
        aim = model.goal_encoder(((goal[episode] - model.tokens_mean) / model.tokens_std).flatten())
        (noise,) = generators(episode + 1)
        alone = model.propose(own, generators(episode + 1), goal=goal[episode : episode + 1], horizon=3, count=4)
        torch.testing.assert_close(alone[0], found[episode], rtol=1e-4, atol=1e-5)
        mean, raw = model.agent.policy.network(torch.cat([own["latent"][0], aim])).chunk(2)
        drawn = mean + (-10 + 6 * (raw.tanh() + 1)).exp() * torch.randn(4, ACTIONS, generator=noise)
        expected = model.action_mean + math.sqrt(3) * drawn.tanh() * model.action_std
        torch.testing.assert_close(found[episode, :, 0], expected, rtol=1e-4, atol=1e-4)
    other = model.propose(belief, generators(1, 3), goal=goal, horizon=3, count=4)
    assert torch.equal(other[0], found[0])
    assert not torch.isclose(other[1], found[1]).any()
    assert not make_model(reward="none").has_policy


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(UserError, match=r"196 x 384.*wmcache derive"):
        build("td-mpc2", replace(SHAPE, tokens=196, token_dim=384), {}, make_statistics())
    with pytest.raises(UserError, match="--simplex 3"):
        make_model(simplex=3)
    with pytest.raises(UserError, match="--reward data"):
        make_model(SHAPE, reward="data")
    assert (make_model(SHAPE).source, make_model(RICH).source) == ("goal", "data")


@pytest.fixture
def go(store_path: Path, tiny: TrainOptions) -> Go:
    sizes = {"latent": 8, "simplex": 4, "encoder_width": 8, "hidden": 8, "dropout": 0.2}
    return make_go(store_path, replace(tiny, model="td-mpc2", model_options=sizes))


@pytest.mark.parametrize("by_signal", [False, True])
@pytest.mark.parametrize("reward", ["goal", "none"])
def test_a_stopped_run_resumes_exactly(go: Go, tmp_path: Path, reward: str, by_signal: bool) -> None:
    options = {"reward": reward}
    figures = go(tmp_path / "straight", model_options=options)
    assert list(figures) == [f"skill_{k}" for k in range(1, len(figures) + 1)]
    with stopped_at(6, by_signal=by_signal):
        go(tmp_path / "stopped", model_options=options)
    go(tmp_path / "stopped", model_options=options)
    assert weights_of(tmp_path / "stopped") == weights_of(tmp_path / "straight")
    assert read_log(tmp_path / "stopped") == read_log(tmp_path / "straight")
    weights = load_tensors(last_checkpoint(tmp_path / "stopped"), FILES[0])
    assert any(name.startswith("agent.slow.") for name in weights) == (reward == "goal")


def test_it_learns_a_planted_linear_system(planted_path: Path, tiny: TrainOptions, run: Path) -> None:
    sizes = {"latent": 64, "encoder_width": 64, "hidden": 64, "reward": "goal"}
    base = replace(tiny, model="td-mpc2", model_options=sizes, log_every=100, validate_every=400, checkpoint_every=400)
    skills = make_go(planted_path, base)(run, steps=400, batch=32, frameskip=5, learning_rate=3e-3)
    assert min(skills[f"skill_{k}"] or 0.0 for k in range(2, 6)) > 0.1
    log = [line for line in read_log(run) if "value" in line]
    assert log[-1]["reward"] < log[0]["reward"]
    assert log[-1]["goal"] < log[0]["goal"]
