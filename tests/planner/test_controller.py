"""Linear controllers: the search, its resumption bit by bit, and a policy that acts by what it has found."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from wmcache.cli import main, wmplan, wmtrain
from wmcache.common.errors import UserError
from wmcache.common.jsonfiles import read_json
from wmcache.common.tensors import load_tensors
from wmcache.pipeline import encoders
from wmcache.pipeline.collect import collect
from wmcache.pipeline.extract import extract
from wmcache.pipeline.frames import FrameDataset
from wmcache.planner.collect import collect as collect_with
from wmcache.planner.context import EvalContext
from wmcache.planner.controllers.linear import Linear
from wmcache.planner.controllers.options import ControllerOptions
from wmcache.planner.controllers.search import Search
from wmcache.planner.controllers.train import train_controller
from wmcache.planner.controllers.trial import open_trial
from wmcache.planner.evaluate import run_episodes
from wmcache.planner.options import PlanOptions
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.runs import load_model
from wmcache.trainer.train import train

QUICK = ControllerOptions(
    generations=4, population=12, rollouts=2, length=3, check_every=2, check_episodes=2, device="cpu"
)
FILES = {"config.json", "controller.safetensors", "state.safetensors", "generations.jsonl", "controller.png"}


@pytest.fixture(scope="module")
def run(store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MDN-RNN of PointMaze; read only."""
    out = tmp_path_factory.mktemp("runs") / "mdn-rnn"
    words = f"--model mdn-rnn --hidden 16 --sequence 5 --steps 60 --batch-size 8 --lr 3e-3 --cache {store_path}"
    done = CliRunner().invoke(wmtrain, [*words.split(), "--out", str(out), "--device", "cpu", "--dtype", "float32"])
    assert done.exit_code == 0, done.output
    return out


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """Return generations.jsonl without the times."""
    lines = [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def assert_equal_folders(first: Path, second: Path) -> None:
    """Compare all that a search leaves, bit by bit."""
    assert lines_of(first) == lines_of(second)
    for name in ("controller.safetensors", "state.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert {file.name for file in second.iterdir()} == FILES


@pytest.mark.parametrize("size", [12, 1300], ids=["covariance", "diagonal"])
def test_the_search_approaches_an_optimum_and_continues_bit_by_bit(tmp_path: Path, size: int) -> None:
    optimum = np.linspace(-1, 1, size)

    def search(one: Search, until: int) -> list[np.ndarray]:
        asked = []
        while one.generation < until:
            asked.append(one.ask())
            one.tell(asked[-1], -np.square(asked[-1] - optimum).sum(1))
        return asked

    settings: dict[str, Any] = {"population": 16, "sigma": 0.3 if size < 100 else 0.05, "seed": 3}
    whole = Search(np.zeros(size), **settings)
    start = np.square(whole.mean - optimum).sum()
    search(whole, 30)
    whole.save(tmp_path / "state")
    following = search(whole, 60)
    assert np.square(whole.mean - optimum).sum() < start * (1e-3 if size < 100 else 1)

    again = Search(np.zeros(size), **settings)
    again.load(tmp_path / "state")
    assert again.generation == 30
    np.testing.assert_array_equal(search(again, 60), following)
    np.testing.assert_array_equal(again.mean, whole.mean)


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    search = Search(np.zeros(5), population=6, sigma=0.1, seed=0)
    search.tell(search.ask(), np.arange(6.0))
    file = tmp_path / "state.safetensors"
    search.save(file)
    whole = file.read_bytes()
    for damaged in (whole[:-9], whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], b"", b"\x80\x04N."):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=str(file)):
            Search(np.zeros(5), population=6, sigma=0.1, seed=0).load(file)


def test_actions_are_linear_and_within_the_bounds(run: Path) -> None:
    model = load_model(run, torch.device("cpu"))
    bounds = torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 1.0])
    linear = Linear.of(model, ["latent", "hidden", "cell", "goal"], bounds, 5, None)
    sizes = {"latent": model.values, "hidden": 16, "cell": 16, "goal": model.values}
    assert linear.parameters == 2 * (sum(sizes.values()) + 1)
    random = torch.Generator().manual_seed(0)
    features = {name: torch.randn(6, size, generator=random) for name, size in sizes.items()}
    solutions = torch.randn(3, linear.parameters, generator=random)
    actions = linear(solutions, features)
    assert actions.shape == (6, 10)
    repeated = actions.view(6, 5, 2)
    assert (repeated == repeated[:, :1]).all()
    assert ((repeated >= bounds[0]) & (repeated <= bounds[1])).all()
    for episode in range(6):
        alone = linear(solutions[episode // 2, None], {name: rows[episode, None] for name, rows in features.items()})
        torch.testing.assert_close(alone[0], actions[episode])
    torch.testing.assert_close(linear(solutions[:1] * 0, features)[0, :2], torch.tensor([0.0, 0.5]))
    for wrong in (["pixels"], ["latent", "latent"]):
        with pytest.raises(UserError, match="--inputs"):
            Linear.of(model, wrong, bounds, 5, None)


def test_clipped_actions_are_0_at_an_output_of_0(run: Path) -> None:
    model = load_model(run, torch.device("cpu"))
    bounds = torch.tensor([-2.0, 0.0, -3.0]), torch.tensor([2.0, 1.0, 1.0])
    clipped = Linear.of(model, ["hidden"], bounds, 1, "clip")
    biases = torch.zeros(3, 3, 17)
    biases[:, :, -1] = torch.tensor([0.0, 0.3, -0.3])[:, None]
    actions = clipped(biases.flatten(1), {"hidden": torch.zeros(3, 16)})
    up = math.tanh(0.3)
    torch.testing.assert_close(actions, torch.tensor([[0.0, 0, 0], [2 * up, up, 3 * up], [-2 * up, 0, -3 * up]]))


def test_discrete_actions_are_one_hot(run: Path) -> None:
    model = load_model(run, torch.device("cpu"))
    bounds = torch.zeros(3), torch.ones(3)
    largest = Linear.of(model, ["hidden"], bounds, 2, "argmax")
    single = Linear.of(model, ["hidden"], bounds, 1, "thresholds")
    assert (largest.parameters, single.parameters) == (3 * 17, 17)
    nothing = {"hidden": torch.zeros(4, 16)}
    scores = torch.zeros(1, 3, 17)
    scores[0, :, -1] = torch.tensor([0.0, 2.0, 1.0])
    assert largest(scores.flatten(1), nothing).tolist() == [[0, 1, 0, 0, 1, 0]] * 4
    biases = torch.zeros(4, 17)
    biases[:, -1] = torch.tensor(
        [-1.0, -0.1, 0.1, 1.0]
    )  # the middle third is action 0, as in VizDoom: neither left nor right
    assert single(biases, nothing).argmax(1).tolist() == [1, 0, 0, 2]


def test_a_controller_learns_in_the_dream_and_acts_in_the_environment(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "controller"
    words = "--generations 12 --population 12 --rollouts 8 --length 8 --temperature 0.5 --check-every 12"
    done = CliRunner().invoke(main, ["controller", "--run", str(run), *words.split(), "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    lines = lines_of(out)
    assert [line["generation"] for line in lines] == list(range(1, 13))
    with open_trial(run, replace(QUICK, length=8, temperature=0.5), tmp_path, cluster="local:1", weights=None) as trial:
        solution = load_tensors(out / "controller.safetensors")["solution"].double().numpy()
        before, after = trial.returns(np.stack([0 * solution, solution]), range(64), "").mean(1)
    assert after > before
    assert {"mean", "ci95"} <= lines[-1]["check"].keys()
    assert not any("check" in line for line in lines[:-1])
    assert {file.name for file in out.iterdir()} == FILES
    assert read_json(out / "config.json", "")["inputs"] == ["latent", "hidden", "goal"]

    plan = ["--run", str(run), "--policy", str(out), "--episodes", "3", "--budget", "20", "--batch-size", "2"]
    done = CliRunner().invoke(wmplan, [*plan, "--device", "cpu"])
    assert done.exit_code == 0, done.output
    (folder,) = run.glob("plan-*-controller-*3x20")
    results = read_json(folder / "results.json", "")
    assert results["policy"] == "controller"
    assert results["encoder_frames"] == 3 * 5  # the goal, and before each of 4 decisions
    assert results["operations_per_decision"] > 0
    assert not results["reads_state"]

    frames = tmp_path / "frames"
    card = collect_with(
        str(read_json(run / "identity.json", "")["card"]["dataset"]["env"]),
        frames,
        policy=str(out),
        episodes=2,
        length=12,
    )
    assert card.policy.startswith("controller of mdn-rnn")
    assert card.frames == 24


def test_the_return_of_discrete_actions_is_that_of_an_evaluation(tmp_path: Path) -> None:
    collect("gym:CartPole-v1", tmp_path / "frames", episodes=6, length=40, image_size=32)
    extract(FrameDataset.open(tmp_path / "frames"), encoders.create("pixels", device="cpu"), tmp_path / "pixels.zarr")
    sizes = {"hidden": 8, "mixtures": 2, "sequence": 4}
    settings = TrainOptions(model="mdn-rnn", model_options=sizes, frameskip=2, steps=3, batch=8, device="cpu")
    train(tmp_path / "pixels.zarr", tmp_path / "run", settings)
    options = replace(QUICK, choose="thresholds", inputs="hidden,latent", length=12, check_every=4)
    found = train_controller(tmp_path / "run", options, tmp_path / "controller")
    assert found["parameters"] == 8 + 16 * 192 + 1
    assert 24 >= found["check"]["highest"] >= found["check"]["lowest"] > 0  # env steps until it falls

    plan = PlanOptions(policy=str(tmp_path / "controller"), budget=24, device="cpu", dtype="float32")
    context = EvalContext(tmp_path / "run", plan)
    episodes = run_episodes(context, plan, range(4))
    assert (np.sort(episodes.actions, -1) == [0, 1]).all()
    assert (episodes.actions[:, ::2] == episodes.actions[:, 1::2]).all()
    solution = load_tensors(tmp_path / "controller/controller.safetensors")["solution"].double().numpy()
    with open_trial(tmp_path / "run", options, tmp_path / "unfinished", cluster="local:1", weights=None) as trial:
        assert trial.check is not None
        np.testing.assert_array_equal(trial.check(solution[None], range(4), "check")[0], episodes.rewards.sum(1))


@pytest.mark.parametrize(("where", "moment"), [("env", "in a generation"), ("dream", "after its line")])
def test_a_killed_search_continues_bit_by_bit(run: Path, tmp_path: Path, where: str, moment: str) -> None:
    options = replace(QUICK, where=where)
    train_controller(run, options, tmp_path / "whole")
    words = [sys.executable, "-P", "-c", KILLED, run, tmp_path / "killed", where, moment]
    assert subprocess.run(words, check=False, timeout=100).returncode == -signal.SIGKILL
    assert len(lines_of(tmp_path / "killed")) == (2 if moment == "in a generation" else 3)
    done = train_controller(run, options, tmp_path / "killed")
    assert done["generation"] == 4
    assert_equal_folders(tmp_path / "whole", tmp_path / "killed")


KILLED = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
import torch
from wmcache.planner.controllers import fitness, search, train
from wmcache.planner.controllers.options import ControllerOptions

def die(owner, name, calls):
    real, left = getattr(owner, name), calls

    def call(*arguments):
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    setattr(owner, name, call)

torch.set_num_threads(1)
run, out, where, moment = sys.argv[1:]
if moment == "in a generation":
    # A generation dreams 3 steps, or has 2 tasks in the environment; 2 generations have a task of the check.
    die(*((fitness.Dream, "step", 7) if where == "dream" else (fitness, "live_returns", 6)))
else:
    die(search.Search, "save", 2)
options = ControllerOptions(generations=4, population=12, rollouts=2, length=3, check_every=2, check_episodes=2, device="cpu")
train.train_controller(Path(run), replace(options, where=where), Path(out))
"""


def test_returns_do_not_depend_on_the_batch(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_trial(run, QUICK, tmp_path / "unfinished", cluster="local:1", weights=None) as trial:
        candidates = np.random.default_rng(0).normal(size=(4, trial.linear.parameters))
        dreamed = trial.returns(candidates, range(3), "")
        assert trial.check is not None
        played = trial.check(candidates, range(3), "here")
        alone = trial.check(candidates[2:3], [1], "alone")
        monkeypatch.setattr("wmcache.planner.controllers.fitness.DREAMED", 3)
        np.testing.assert_allclose(trial.returns(candidates, range(3), ""), dreamed, rtol=1e-4)
    assert dreamed.shape == played.shape == (4, 3)
    np.testing.assert_allclose(alone[0, 0], played[2, 1], rtol=1e-4)


@pytest.mark.cluster
def test_workers_find_what_this_process_finds(run: Path, tmp_path: Path) -> None:
    for cluster in ("local:1", "local:2"):
        train_controller(run, replace(QUICK, where="env"), tmp_path / cluster, cluster=cluster)
    assert_equal_folders(tmp_path / "local:1", tmp_path / "local:2")


def test_what_does_not_suit_is_refused(run: Path, run_path: Path, tmp_path: Path) -> None:
    quick = replace(QUICK, check_every=0, generations=1)
    with pytest.raises(UserError, match="mdn-rnn"):
        train_controller(run_path, quick, tmp_path / "dino-wm")
    out = tmp_path / "controller"
    train_controller(run, quick, out)
    with pytest.raises(UserError, match="rollouts 2 != 3"):
        train_controller(run, replace(quick, rollouts=3), out)
    assert train_controller(run, replace(quick, generations=2), out)["generation"] == 2
    further = replace(quick, start=str(out))
    train_controller(run, further, tmp_path / "further")
    with pytest.raises(UserError, match="--from"):
        train_controller(run, replace(further, inputs="latent"), tmp_path / "other")
    for policy, changed, named in (
        (out, {"execute": 2}, "--execute 2"),
        ("controller", {}, "--policy"),
        (run, {}, "--policy"),
    ):
        options = PlanOptions(policy=str(policy), device="cpu", **changed)
        with pytest.raises(UserError, match=named):
            run_episodes(EvalContext(run, options), options, [0])
    settings = read_json(out / "config.json", "")
    (out / "config.json").write_text(json.dumps({**settings, "model_sha256": "0" * 64}))
    options = PlanOptions(policy=str(out), device="cpu")
    with pytest.raises(UserError, match=str(out)):
        run_episodes(EvalContext(run, options), options, [0])
