"""Rollout errors of runs by model step: against a calculation by hand, and intervals of the right width."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from wmcache.bench.rollout import compare_rollouts, tabulate
from wmcache.cache import TokenStore
from wmcache.cli import main
from wmcache.common.errors import UserError
from wmcache.trainer.models import WorldModel
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.runs import load_model
from wmcache.trainer.train import train


@pytest.fixture(scope="module")
def runs(planted_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """RWM after 120 steps and after 2, and of proprio alone; read only."""
    folder = tmp_path_factory.mktemp("runs")
    small = {"hidden": 32, "head": 32, "observed_steps": 2, "forecast": 4}
    base = TrainOptions(
        model="rwm", model_options=small, batch=16, frameskip=2, learning_rate=5e-3, dtype="float32", device="cpu"
    )
    made = {"long": (120, {}), "short": (2, {}), "blind": (2, {"tokens": "none"})}
    for name, (steps, changes) in made.items():
        train(planted_path, folder / name, replace(base, steps=steps, model_options=small | changes))
    return [folder / name for name in made]


def test_errors_are_those_of_a_calculation_by_hand(runs: list[Path], planted_path: Path) -> None:
    rows = compare_rollouts(runs[:2], steps=3, observed=2, device="cpu", dtype="float32")
    windows = TokenStore.open(planted_path).windows(2, 3, 2, "val")
    batch = {name: torch.from_numpy(value) for name, value in windows.batch(np.arange(len(windows))).items()}
    tokens, actions = batch["tokens"].float(), batch["action"]

    def roll_out(model: WorldModel) -> torch.Tensor:
        belief = model.observe(model.start(len(tokens)), tokens[:, 0], batch["proprio"][:, 0], None)
        belief = model.observe(belief, tokens[:, 1], batch["proprio"][:, 1], actions[:, 0])
        return model.imagine(belief, actions[:, None, 1:4]).latents[:, 0]

    copied = (tokens[:, 2:] - tokens[:, 1:2]).square().mean((0, 2, 3))
    assert [row["copying"] for row in rows[:-1]] == pytest.approx(copied.tolist())
    for run in runs[:2]:
        errors = (roll_out(load_model(run, torch.device("cpu"))) - tokens[:, 2:]).square().mean((0, 2, 3))
        assert [row["runs"][run.name] for row in rows[:-1]] == pytest.approx((errors / copied).tolist(), rel=1e-3)
    assert [row["step"] for row in rows] == ["1", "2", "3", "all"]
    for row in rows:
        gain, low, high = row["gains"]["short"]
        assert gain == pytest.approx(1 - row["runs"]["long"] / row["runs"]["short"])
        assert 0 < low < gain < high < 1


def test_intervals_cover_the_gain_over_episodes() -> None:
    # Windows of an episode are alike, so they must not count as so many.
    rng, covered = np.random.default_rng(0), 0
    for _ in range(200):
        episodes = np.repeat(np.arange(30), 10)
        one, two = (np.repeat(rng.gamma(4.0, scale, 30), 10)[:, None] for scale in (1.0, 2.0))
        (row, _) = tabulate({"copying": np.ones((300, 1)), "one": one, "two": two}, episodes)
        _, low, high = row["gains"]["two"]
        covered += low < 0.5 < high
    assert 175 <= covered <= 199


def test_frames_that_do_not_change_have_no_shares() -> None:
    still = np.zeros((6, 2))
    for row in tabulate({"copying": still, "one": still + 1, "two": still}, np.arange(6)):
        assert np.isnan([row["runs"]["one"], row["runs"]["two"], row["gains"]["two"][0]]).all()


def test_a_table_and_json(runs: list[Path]) -> None:
    words = ["bench", "rollout", "--run", str(runs[0]), "--run", str(runs[2]), "--steps", "2", "--device", "cpu"]
    done = CliRunner().invoke(main, [*words, "--part", "proprio"])
    assert done.exit_code == 0, done.output
    assert len(done.stdout.splitlines()) == 4
    done = CliRunner().invoke(main, [*words, "--part", "proprio", "--json"])
    assert len(json.loads(done.stdout)[0]["gains"]["blind"]) == 3


def test_what_cannot_be_compared_is_refused(runs: list[Path], run_path: Path) -> None:
    for given, changes, named in (
        ([runs[0], runs[2]], {}, "--part latents: blind"),
        ([runs[0], run_path], {}, "different data"),
        ([runs[0], runs[0]], {}, "--run"),
        (runs[:1], {"steps": 40}, "--steps 40"),
    ):
        with pytest.raises(UserError, match=named):
            compare_rollouts(given, **{"steps": 3, "device": "cpu", **changes})
