"""Datasets that a trained model plays: the same bytes however they are made, starts of the dataset's seed, goals by time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from wmcache.cli import main
from wmcache.common.errors import UserError
from wmcache.envs import open_environment
from wmcache.pipeline import encoders
from wmcache.pipeline.collect import collect as collect_behaviour
from wmcache.pipeline.extract import extract
from wmcache.pipeline.frames import DatasetCard, FrameDataset
from wmcache.planner import collect as collecting
from wmcache.planner.collect import collect
from wmcache.planner.options import PlanOptions
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.train import train

from ..conftest import contents

ENV = "wmcache/PointMaze-UMaze-v0"
SIZES: dict[str, Any] = {"episodes": 5, "length": 23, "image_size": 32, "frames_per_shard": 40, "seed": 7}


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "EPISODES_AT_ONCE", 2)


@pytest.fixture(scope="session")
def quick(tiny_plan: PlanOptions) -> PlanOptions:
    """Plans with a new goal every 10 env steps."""
    return replace(tiny_plan, goal_steps=10)


@pytest.fixture(scope="session")
def collected(run_path: Path, quick: PlanOptions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the run collects; read only."""
    path = tmp_path_factory.mktemp("collected") / "frames"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collecting, "EPISODES_AT_ONCE", 2)
        collect_again(run_path, quick, path)
    return path


def collect_again(run: Path, plan: PlanOptions, out: Path, **other: Any) -> DatasetCard:
    return collect(out=out, plan=plan, **{"env": ENV, "policy": str(run), **SIZES, **other})


def test_a_run_acts_from_the_starts_of_the_seed_and_every_column_is_recorded(collected: Path, run_path: Path) -> None:
    frames = FrameDataset.open(collected)
    env = open_environment(ENV, 1, 32)
    for episode in range(5):
        rows = range(23 * episode, 23 * (episode + 1))
        start = env.sample_task(np.random.default_rng((7, episode)), goal=False)
        seen = env.reset([start])
        moved = env.step(frames.steps.action[rows.start : rows.stop - 1][None])
        recorded = frames.steps.columns["state"][rows.start : rows.stop]
        np.testing.assert_array_equal(recorded, np.concatenate([seen.columns["state"], moved["state"][0]]))
        np.testing.assert_array_equal(frames.read_frames(rows), env.render(recorded))
        assert np.abs(frames.steps.action[rows.start : rows.stop]).max() <= 1
        assert len(np.unique(frames.steps.action[rows.start : rows.stop], axis=0)) > 20
    assert str(run_path) not in frames.card.policy


@pytest.mark.parametrize(("batch", "cluster"), [(1, "local:2"), pytest.param(50, "local:1", marks=pytest.mark.sweep)])
def test_batches_of_a_plan_and_workers_change_no_byte(
    collected: Path, run_path: Path, quick: PlanOptions, tmp_path: Path, batch: int, cluster: str
) -> None:
    path = tmp_path / "again" / "frames"
    collect_again(run_path, replace(quick, batch=batch), path, cluster=cluster)
    assert contents(path) == contents(collected)


def test_a_kill_costs_one_batch(run_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "EPISODES_AT_ONCE", 10)
    settings: dict[str, Any] = {"env": ENV, "policy": str(run_path), "episodes": 45, "length": 6, "image_size": 32}
    path = tmp_path / "killed" / "frames"
    words = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    program = [sys.executable, "-P", "-c", "from wmcache.cli import main; main()", "collect", *words]
    program += ["--cluster", "local:1", "--out", str(path)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(program, stderr=subprocess.DEVNULL, env=one_thread)
    until = time.monotonic() + 120
    while not list(path.glob(".played-*[0-9].tmp")) and time.monotonic() < until and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.wait()
    kept = {int(file.stem.rpartition("-")[2]) for file in path.glob(".played-*[0-9].tmp")}
    assert 0 in kept
    play, played = collecting.play_batch, set()

    def play_and_note(*arguments: Any) -> Any:
        played.add(arguments[-1][0])
        return play(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(collecting, "play_batch", play_and_note)
        for _ in range(2):
            collect(out=path, **settings)
    assert played == {0, 10, 20, 30, 40} - kept
    collect(out=tmp_path / "straight" / "frames", **settings)
    assert contents(path) == contents(tmp_path / "straight" / "frames")


def test_goals_change_by_time(run_path: Path, quick: PlanOptions, tmp_path: Path) -> None:
    actions = []
    for name, every in (("a", 10), ("b", 23)):
        collect_again(run_path, replace(quick, goal_steps=every), tmp_path / name, episodes=2)
        actions.append(FrameDataset.open(tmp_path / name).steps.action.reshape(2, 23, 2))
    np.testing.assert_array_equal(actions[0][:, :10], actions[1][:, :10])
    assert not (actions[0][:, 10:] == actions[1][:, 10:]).all(2).any()


def test_a_collection_of_other_weights_or_settings_is_refused(
    collected: Path, run_path: Path, blind_run_path: Path, quick: PlanOptions
) -> None:
    before = contents(collected)
    for run, plan, other in (
        (blind_run_path, quick, {}),
        (run_path, replace(quick, horizon=3), {}),
        (run_path, quick, {"length": 20}),
    ):
        with pytest.raises(UserError, match=f"{collected} .*policy"):
            collect_again(run, plan, collected, **other)
    with pytest.raises(UserError, match="episodes"):
        collect_again(run_path, quick, collected, episodes=6)
    assert contents(collected) == before


def test_a_model_of_rewards_collects_episodes_that_end(user_package: str, tmp_path: Path) -> None:
    env = f"{user_package}:Dots-v0"
    settings: dict[str, Any] = {"episodes": 6, "length": 12, "image_size": 16, "frames_per_shard": 20}
    collect_behaviour(env, tmp_path / "random", **settings)
    pixels = encoders.create("pixels", device="cpu")
    extract(FrameDataset.open(tmp_path / "random"), pixels, tmp_path / "pixels.zarr")
    sizes = {"hidden": 16, "mixtures": 2, "sequence": 4}
    options = TrainOptions(model="mdn-rnn", model_options=sizes, history=1, frameskip=2, steps=5, batch=8, device="cpu")
    train(tmp_path / "pixels.zarr", tmp_path / "run", options)
    plan = PlanOptions(horizon=2, search={"samples": 8, "elites": 2, "iterations": 1}, device="cpu")
    made = [collect(env, tmp_path / name, policy=str(tmp_path / "run"), plan=plan, **settings, seed=1) for name in "ab"]
    assert made[0].fingerprint == made[1].fingerprint
    steps = FrameDataset.open(tmp_path / "a").steps
    last = np.flatnonzero(np.diff(steps.episode, append=6))
    ends = steps.columns["terminated"] | steps.columns["truncated"]
    assert np.flatnonzero(ends).tolist() == (last - 1).tolist()
    assert (steps.action >= -2).all()
    assert (steps.action[:, 1] <= 1).all()
    with pytest.raises(UserError, match=f"--policy {tmp_path / 'run'} .*{env}.*--env"):
        collect(ENV, tmp_path / "other", policy=str(tmp_path / "run"), plan=plan, **settings)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("policy", "named"),
    [("hedl", "did you mean held?"), ("nowhere/run", "nowhere/run"), (".", "config.json")],
)
def test_a_policy_that_does_not_exist_is_one_line(tmp_path: Path, policy: str, named: str) -> None:
    words = ["collect", "--env", "UMaze", "--policy", policy, "--out", str(tmp_path / "frames")]
    result = CliRunner().invoke(main, words, prog_name="wmcache")
    assert result.exit_code == 1
    assert named in result.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "frames").exists()


def test_the_command_takes_a_run(run_path: Path, tmp_path: Path) -> None:
    sizes = ["--episodes", "1", "--length", "6", "--image-size", "32", "--cluster", "local:1"]
    words = ["collect", "--env", ENV, "--policy", str(run_path), *sizes, "--out", str(tmp_path / "frames")]
    result = CliRunner().invoke(main, words, prog_name="wmcache")
    assert result.exit_code == 0, result.output
    assert FrameDataset.open(tmp_path / "frames").card.policy.startswith("mpc of dino-wm, weights ")
