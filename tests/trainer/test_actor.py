"""Actors trained in imagination: their losses, what they learn, resumption to the bit, and how they act."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from run_tools import read_log, stopped_at, weights_of
from torch import Tensor
from torch.distributions import Categorical, Normal

from wmcache.cli import main, wmplan, wmtrain
from wmcache.common.errors import UserError
from wmcache.common.jsonfiles import read_json
from wmcache.engine.checkpoint import last_checkpoint
from wmcache.pipeline import encoders
from wmcache.pipeline.collect import collect
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.extract import extract
from wmcache.pipeline.frames import FrameDataset
from wmcache.planner.context import EvalContext
from wmcache.planner.evaluate import run_episodes, summarise
from wmcache.planner.options import PlanOptions
from wmcache.trainer.actor import train_actor
from wmcache.trainer.actor_critic import ActorCritic, ActorShape, ReturnRange, Trajectory, lambda_returns
from wmcache.trainer.models.symlog import TwoHot
from wmcache.trainer.options import ActorOptions, TrainOptions
from wmcache.trainer.train import train

TINY = ActorOptions(
    steps=6,
    batch=4,
    observed=2,
    horizon=3,
    units=8,
    layers=2,
    device="cpu",
    log_every=1,
    validate_every=3,
    checkpoint_every=3,
)
MODELS = {
    "mdn-rnn": {"hidden": 16, "mixtures": 2, "sequence": 5},
    "rwm": {"tokens": "none", "hidden": 16, "layers": 1, "head": 16, "observed_steps": 2, "forecast": 3},
}
GRADIENTS = pytest.mark.parametrize("gradient", ["reinforce", "dynamics"])
KINDS = pytest.mark.parametrize("discrete", [False, True], ids=["continuous", "discrete"])


@pytest.fixture(scope="module")
def runs(store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of PointMaze; read only."""
    folder = tmp_path_factory.mktemp("runs")
    for name, sizes in MODELS.items():
        settings = TrainOptions(
            model=name, model_options=sizes, steps=80, batch=16, learning_rate=3e-3, dtype="float32", device="cpu"
        )
        train(store_path, folder / name, settings)
    return {name: folder / name for name in MODELS}


@pytest.fixture(scope="module")
def actor(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An actor in the mdn-rnn; read only."""
    out = tmp_path_factory.mktemp("actors") / "actor"
    train_actor(runs["mdn-rnn"], out, TINY)
    return out


def make_network(*, discrete: bool, seed: int = 0, frameskip: int = 2, **changed: Any) -> ActorCritic:
    torch.manual_seed(seed)
    low, high = ([0.0] * 3, [1.0] * 3) if discrete else ([-2.0, 0.0], [2.0, 1.0])
    shape = ActorShape(size=4, low=low, high=high, discrete=discrete, frameskip=frameskip)
    return ActorCritic(shape, ActorOptions(units=16, layers=2, **changed))


def test_lambda_returns_are_those_of_a_loop() -> None:
    random = torch.Generator().manual_seed(0)
    rewards, discounts = (torch.rand(5, 3, generator=random) for _ in range(2))
    values = torch.randn(6, 3, generator=random)
    for trace in (0.0, 0.95, 1.0):
        found = lambda_returns(rewards, values, discounts, trace)
        for episode in range(3):
            after = float(values[5, episode])
            for t in reversed(range(5)):
                mixed = (1 - trace) * float(values[t + 1, episode]) + trace * after
                after = float(rewards[t, episode]) + float(discounts[t, episode]) * mixed
                assert float(found[t, episode]) == pytest.approx(after, rel=1e-5)


def test_the_range_of_returns_is_averaged_and_at_least_1() -> None:
    spread = ReturnRange()
    batches = [torch.arange(101.0) * scale for scale in (2, 4, 3)]
    ends, weight = np.zeros(2), 0.0
    for batch in batches:
        ends = 0.99 * ends + 0.01 * np.quantile(batch.numpy(), [0.05, 0.95])
        weight = 0.99 * weight + 0.01
        assert float(spread(batch)) == pytest.approx(np.ptp(ends) / weight, rel=1e-4)
    kept = float(spread.eval()(torch.zeros(5)))
    assert kept == pytest.approx(np.ptp(ends) / weight, rel=1e-4)
    assert float(ReturnRange()(0.01 * torch.arange(9.0))) == 1


@KINDS
def test_losses_are_those_of_a_loop(discrete: bool) -> None:
    network = make_network(discrete=discrete, discount_steps=10.0, trace=0.8, entropy=0.1)
    random, horizon, count = torch.Generator().manual_seed(1), 3, 2
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=random)
    network.bins = TwoHot(255, -5, 5)  # outer bins of random logits would hide the others
    inputs = torch.randn(horizon + 1, count, 4, generator=random)
    with torch.no_grad():
        drawn = network.actor(inputs[:-1]).sample(random)
    rewards, continues = (torch.rand(horizon, count, generator=random) for _ in range(2))
    found = network.loss(Trajectory(inputs, drawn, rewards, continues))

    with torch.no_grad():
        logits, distribution = network.critic(inputs), network.actor(inputs[:-1])
        values, slow = network.bins.mean(logits), network.bins.mean(network.slow(inputs))
    returns = lambda_returns(rewards, values, 0.9 * continues, 0.8)
    scale = max(1.0, float(np.ptp(np.quantile(returns.numpy(), [0.05, 0.95]))))
    actor = critic = 0.0
    for episode in range(count):
        weight = 1.0
        for t in range(horizon):
            log_prob = entropy = 0.0
            for part in range(2 if discrete else 4):
                chosen = drawn[t, episode].view(2, -1)[part] if discrete else drawn[t, episode, part]
                one: Any = (
                    Categorical(logits=distribution.logs[t, episode, part])
                    if discrete
                    else Normal(distribution.mean[t, episode, part], distribution.std[t, episode, part])
                )
                log_prob += float(one.log_prob(chosen.argmax() if discrete else chosen))
                entropy += float(one.entropy())
            gain = float(returns[t, episode] - values[t, episode]) / scale * log_prob
            actor -= weight * (gain + 0.1 * entropy) / (horizon * count)
            for target in (returns, slow):
                fit = network.bins.loss(logits[t, episode], target[t, episode])
                critic += weight * float(fit) / (horizon * count)
            weight *= 0.9 * float(continues[t, episode])
    assert float(found["actor"]) == pytest.approx(actor, rel=1e-3)
    assert float(found["critic"]) == pytest.approx(critic, rel=1e-3)
    assert float(found["loss"].detach()) == pytest.approx(actor + critic, rel=1e-3)


@GRADIENTS
@KINDS
def test_an_actor_finds_the_best_actions_of_a_known_world(gradient: Any, discrete: bool) -> None:
    # The inputs name the best action: its value, or its number as one-hot.
    network = make_network(discrete=discrete, gradient=gradient, frameskip=1)
    optimiser = torch.optim.Adam([one for one in network.parameters() if one.requires_grad], lr=3e-3)
    random = torch.Generator().manual_seed(2)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        if discrete:
            wanted = torch.eye(3)[torch.randint(3, (count,), generator=random)]
            return torch.cat([wanted, torch.zeros(count, 1)], 1), wanted
        seen = torch.rand(count, 4, generator=random) * 2 - 1
        return seen, torch.stack([1.6 * seen[:, 0], 0.5 + 0.4 * seen[:, 1]], 1)

    def reward(actions: Tensor, wanted: Tensor) -> Tensor:
        return -(actions - wanted).square().sum(-1)

    for _ in range(250):
        seen, wanted = draw(64)
        actions = network.actor(seen).sample(random)
        gained = 5 * reward(network.actor.to_env(actions), wanted)
        ends = torch.zeros(1, 64)
        losses = network.train().loss(Trajectory(torch.stack([seen, seen]), actions[None], gained[None], ends))
        optimiser.zero_grad()
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        network.follow()
    seen, wanted = draw(256)
    reached = float(reward(network.actor.act([seen]), wanted).mean())
    by_chance = float(reward(network.actor.to_env(network.actor.random(256, random)), wanted).mean())
    assert reached > 0.1 * by_chance
    low, high = network.actor.low, network.actor.high
    chosen = network.actor.act([100 * seen])
    assert ((chosen >= low) & (chosen <= high)).all()


def test_an_end_makes_later_rewards_worthless() -> None:
    network = make_network(discrete=False)
    inputs, drawn = torch.randn(4, 2, 4), torch.zeros(3, 2, 4)
    continues = torch.tensor([[1.0], [0.0], [1.0]]).expand(3, 2)
    rewards = torch.tensor([[1.0], [1.0], [7.0]]).expand(3, 2)
    found = [
        network.loss(Trajectory(inputs, drawn, rewards * torch.tensor([[1.0], [1.0], [scale]]), continues))
        for scale in (1.0, 9.0)
    ]
    assert float(found[0]["return"]) == pytest.approx(float(found[1]["return"]))
    assert float(found[0]["return"]) == pytest.approx(1 + 0.95 * 332 / 333, rel=1e-5)  # values are 0 at first


@GRADIENTS
def test_gradients_stay_where_they_belong(gradient: Any) -> None:
    network = make_network(discrete=False, gradient=gradient)
    inputs, push = torch.randn(3, 2, 4), torch.zeros(2, 2, 4, requires_grad=True)
    parts = (inputs + torch.nn.functional.pad(push, (0, 0, 0, 0, 1, 0)), torch.zeros(2, 2, 4), push.sum(-1))
    network.loss(Trajectory(*parts, torch.ones(2, 2)))["loss"].backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is None for parameter in network.slow.parameters())
    assert (push.grad is not None) == (gradient == "dynamics")


@pytest.mark.parametrize("name", MODELS)
def test_an_actor_gets_nearer_to_goals_than_random_actions(runs: dict[str, Path], tmp_path: Path, name: str) -> None:
    options = replace(TINY, steps=60, batch=16, horizon=6, units=32, learning_rate=3e-3, gradient="dynamics")
    found = train_actor(runs[name], tmp_path / "actor", options)
    assert found["reward"] == "goal"
    assert 0 > found["return"] > found["random_return"]


@GRADIENTS
def test_a_stopped_actor_resumes_exactly(runs: dict[str, Path], tmp_path: Path, gradient: Any) -> None:
    options = replace(TINY, gradient=gradient)
    straight = train_actor(runs["mdn-rnn"], tmp_path / "straight", options)
    with stopped_at(5):
        train_actor(runs["mdn-rnn"], tmp_path / "stopped", options)
    assert last_checkpoint(tmp_path / "stopped").name == "step-00000003"
    assert train_actor(runs["mdn-rnn"], tmp_path / "stopped", options) == straight
    assert weights_of(tmp_path / "stopped") == weights_of(tmp_path / "straight")
    assert read_log(tmp_path / "stopped") == read_log(tmp_path / "straight")
    train_actor(runs["mdn-rnn"], tmp_path / "short", replace(options, steps=3))
    assert train_actor(runs["mdn-rnn"], tmp_path / "short", options) == straight
    assert weights_of(tmp_path / "short") == weights_of(tmp_path / "straight")


def test_an_actor_is_a_policy_of_every_command(runs: dict[str, Path], tmp_path: Path) -> None:
    run, out = runs["mdn-rnn"], tmp_path / "actor"

    def call(program: Any, line: str) -> Any:
        done = CliRunner().invoke(program, [*line.split(), "--device", "cpu"] if program is not main else line.split())
        assert done.exit_code == 0, done.output
        return done

    small = "--steps 2 --batch-size 4 --observed 2 --horizon 2 --units 8 --layers 1 --inputs hidden,cell,goal"
    call(wmtrain, f"actor --run {run} --out {out} {small}")
    call(wmplan, f"--run {run} --policy {out} --episodes 3 --budget 20 --batch-size 2 --out {tmp_path / 'plan'}")
    results = read_json(tmp_path / "plan/results.json", "")
    assert results["policy"] == "dream-actor"
    assert results["encoder_frames"] == 3 * 5  # the goal, and before each of 4 decisions
    env = read_json(run / "identity.json", "")["card"]["dataset"]["env"]
    call(main, f"collect --env {env} --policy {out} --episodes 2 --length 12 --image-size 32 --out {tmp_path / 'new'}")
    card = FrameDataset.open(tmp_path / "new").card
    assert card.policy.startswith("dream-actor of mdn-rnn")
    call(main, f"dream --run {run} --policy {out} --episodes 3 --pictured 0 --out {tmp_path / 'dream'}")
    assert read_json(tmp_path / "dream/dream.json", "")["return"]["mean"] < 0


def test_actions_do_not_depend_on_the_batch(runs: dict[str, Path], actor: Path) -> None:
    options = PlanOptions(policy=str(actor), budget=20, device="cpu", dtype="float32")
    context = EvalContext(runs["mdn-rnn"], options)
    together, alone = (
        [run_episodes(context, options, numbers).states for numbers in parts] for parts in ([range(3)], [[0], [1], [2]])
    )
    np.testing.assert_allclose(together[0], np.concatenate(alone), rtol=1e-3, atol=1e-4)


def test_drawn_actions_depend_on_the_episode_alone(runs: dict[str, Path], actor: Path) -> None:
    usual = PlanOptions(policy=str(actor), budget=20, device="cpu", dtype="float32")
    options = replace(usual, draw=True)
    context = EvalContext(runs["mdn-rnn"], options)
    together, alone = (
        [run_episodes(context, options, numbers).states for numbers in parts] for parts in ([range(3)], [[0], [1], [2]])
    )
    np.testing.assert_allclose(together[0], np.concatenate(alone), rtol=1e-3, atol=1e-4)
    assert np.abs(together[0] - run_episodes(context, usual, range(3)).states).max() > 0.01
    found = summarise(context, replace(options, episodes=2), run_episodes(context, options, range(2)))
    assert (found["resolved"]["draw"], sorted(found["baselines"])) == (True, ["random", "zero"])
    with pytest.raises(UserError, match="--draw: policy mpc"):
        run_episodes(context, replace(options, policy="mpc"), [0])


def test_an_actor_follows_a_run_that_is_trained_further(
    runs: dict[str, Path], store_path: Path, encoder: Encoder, tmp_path: Path
) -> None:
    collect("UMaze", tmp_path / "frames", episodes=2, length=40, image_size=32, seed=1)
    extract(FrameDataset.open(tmp_path / "frames"), encoder, tmp_path / "new.zarr")
    run, out = copytree(runs["mdn-rnn"], tmp_path / "run", symlinks=True), tmp_path / "actor"
    train_actor(run, out, TINY)
    known = {"model": "mdn-rnn", "model_options": MODELS["mdn-rnn"], "batch": 16, "dtype": "float32", "device": "cpu"}
    train(store_path, run, TrainOptions(**known, steps=82), more=[tmp_path / "new.zarr"], resume=True)
    longer = replace(TINY, steps=9)
    with pytest.raises(UserError, match="model_sha256"):
        train_actor(run, out, longer)
    with stopped_at(8):
        train_actor(run, out, longer, follow=True)
    found = train_actor(run, out, longer, follow=True)
    assert found["step"] == 9
    assert train_actor(run, out, longer) == found
    plan = PlanOptions(policy=str(out), budget=5, device="cpu")
    assert run_episodes(EvalContext(run, plan), plan, [0]).replans == 1


def test_discrete_actions_and_rewards_of_the_data(tmp_path: Path) -> None:
    collect("gym:CartPole-v1", tmp_path / "frames", episodes=6, length=40, image_size=32)
    extract(FrameDataset.open(tmp_path / "frames"), encoders.create("pixels", device="cpu"), tmp_path / "pixels.zarr")
    sizes = {"hidden": 8, "mixtures": 2, "sequence": 4}
    settings = TrainOptions(model="mdn-rnn", model_options=sizes, frameskip=2, steps=3, batch=8, device="cpu")
    train(tmp_path / "pixels.zarr", tmp_path / "run", settings)
    found = train_actor(tmp_path / "run", tmp_path / "actor", TINY)
    assert found["reward"] == "model"
    assert 0 < found["return"] <= 2 * TINY.horizon  # one for each env step, while the episode goes on
    plan = PlanOptions(policy=str(tmp_path / "actor"), budget=12, device="cpu", dtype="float32")
    actions = run_episodes(EvalContext(tmp_path / "run", plan), plan, range(3)).actions
    assert (np.sort(actions, -1) == [0, 1]).all()


def test_mistakes_are_refused(runs: dict[str, Path], run_path: Path, actor: Path, tmp_path: Path) -> None:
    run, out = runs["mdn-rnn"], tmp_path / "actor"
    for where, changed, named in (
        (run_path, {}, "mdn-rnn"),
        (run, {"inputs": "latent,pixels,goal"}, "--inputs"),
        (run, {"inputs": "latent"}, "--inputs"),
        (run, {"observed": 500}, "frames"),
        (run, {"discount_steps": 1.0}, "--discount-steps"),
        (runs["rwm"], {"inputs": "cell,goal"}, "--inputs"),
        (tmp_path, {}, "config.json"),
    ):
        with pytest.raises(UserError, match=named):
            train_actor(where, out, replace(TINY, **changed))
        assert not out.exists()
    copytree(actor, out, symlinks=True)
    with pytest.raises(UserError, match=f"{out} .*horizon 3 != 4.*--out"):
        train_actor(run, out, replace(TINY, horizon=4))
    with pytest.raises(UserError, match="model_sha256"):
        train_actor(runs["rwm"], out, TINY)
    assert train_actor(run, out, replace(TINY, seed=1, steps=1), overwrite=True)["step"] == 1
    for policy, changed, named in (
        (out, {"execute": 2}, "--execute 2"),
        ("dream-actor", {}, "--policy"),
    ):
        options = PlanOptions(policy=str(policy), device="cpu", **changed)
        with pytest.raises(UserError, match=named):
            run_episodes(EvalContext(run, options), options, [0])
    settings = read_json(out / "config.json", "")
    for fault in ({"model_sha256": "0" * 64}, {"shape": {**settings["shape"], "size": 7}}, {"inputs": []}):
        (out / "config.json").write_text(json.dumps({**settings, **fault}))
        options = PlanOptions(policy=str(out), device="cpu")
        with pytest.raises(UserError, match=str(out)):
            run_episodes(EvalContext(run, options), options, [0])
