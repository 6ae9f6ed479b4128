"""Rounds from end to end by the real command: resumed anywhere, nothing twice, other settings refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
from click.testing import CliRunner, Result

from wmcache.cache import TokenStore
from wmcache.cli import main
from wmcache.common.errors import UserError
from wmcache.engine.checkpoint import last_checkpoint, read_progress
from wmcache.pipeline.frames import FrameDataset
from wmcache.study.rounds_options import read_rounds
from wmcache.trainer.runs import caches_of, read_config

from ..conftest import times

ROUNDS = """
rounds = 2
seed = 3
device = "cpu"

[collect]
env = {env}
episodes = 4
length = 30
image_size = 32
frames_per_shard = 50

[encoder]
{encoder}

[train]
model = {model}
steps = 6
batch = 8
dtype = "float32"
log_every = 1
model_options = {sizes}

[policy]
horizon = 2
samples = 8
elites = 2
iterations = 1
{policy}

[plan]
episodes = 3
budget = 10
horizon = 2
samples = 8
elites = 2
iterations = 1
"""
TCN = 'name = "tcn"\nfit = { steps = 4, batch = 16 }'
DINO_WM = "{ width = 16, depth = 1, heads = 2 }"
MDN_RNN = "{ hidden = 16, mixtures = 2, sequence = 4 }"
CONTROLLER = """
[controller]
generations = 1
population = 4
rollouts = 2
length = 3
check_every = 0
"""
Write = Callable[..., Path]


def write(
    folder: Path,
    env: str = "UMaze",
    encoder: str = TCN,
    model: str = "dino-wm",
    sizes: str = DINO_WM,
    policy: str = "goal_steps = 10",
) -> Path:
    file = folder / "tiny.toml"
    known = {"env": json.dumps(env), "model": json.dumps(model)}
    file.write_text(ROUNDS.format(**known, encoder=encoder, sizes=sizes, policy=policy))
    return file


def run(file: Path, out: Path, *flags: str, status: int = 0) -> Result:
    result = CliRunner().invoke(main, ["rounds", str(file), "--out", str(out), *flags], prog_name="wmcache")
    assert result.exit_code == status, result.output
    return result


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished rounds; read only."""
    folder = tmp_path_factory.mktemp("rounds")
    run(write(folder), folder / "out")
    return folder / "out"


def ends_of(out: Path) -> list[bytes]:
    """Return the weights of each round."""
    return [(last_checkpoint(path) / "model.safetensors").read_bytes() for path in sorted((out / "runs").iterdir())]


def prints_of(out: Path) -> list[str]:
    return [FrameDataset.open(path).card.fingerprint for path in sorted((out / "frames").iterdir())]


def test_each_round_encodes_its_own_frames_and_trains_on_all(done: Path) -> None:
    first, second = (FrameDataset.open(done / "frames" / f"round-{n}") for n in (1, 2))
    assert first.card.policy == "random"
    assert second.card.policy.startswith("mpc of dino-wm, weights ")
    starts = [frames.steps.columns["state"][frames.steps.step == 0] for frames in (first, second)]
    assert len(np.unique(np.concatenate(starts), axis=0)) == 8
    for number, frames in ((1, first), (2, second)):
        store = TokenStore.open(done / "stores" / f"round-{number}.zarr")
        assert store.identity.dataset_fingerprint == frames.card.fingerprint
        path = done / "runs" / f"round-{number}"
        assert read_progress(last_checkpoint(path)).step == 6 * number
        assert len(caches_of(read_config(path))) == number
    rows = json.loads((done / "rounds.json").read_text())["rounds"]
    assert [row["total_frames"] for row in rows] == [120, 240]
    assert all(row["by_threshold"][0]["successes"] <= row["episodes"] == 3 for row in rows)
    assert (done / "rounds.html").stat().st_size > 10_000


def test_each_round_begins_at_the_constant_rate_and_ends_with_its_own_decay(done: Path) -> None:
    lines = [json.loads(line) for line in (done / "runs" / "round-2" / "metrics.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] for line in lines if "loss" in line]
    assert len(rates) == 12
    assert rates[6] == rates[1] == max(rates)
    assert rates[5] == pytest.approx(rates[11], rel=0.2)
    assert rates[11] < rates[6]


def test_a_second_run_does_nothing_and_a_third_round_goes_on(done: Path, tmp_path: Path) -> None:
    out = copytree(done, tmp_path / "out", symlinks=True)
    # A copied run records where its stores were.
    parts = ("frames", "stores", "runs", "plans")
    before = {part: times(out / part) for part in parts}
    printed = json.loads(run(write(tmp_path), out, "--json").stdout)
    assert [row["round"] for row in printed] == [1, 2]
    assert {part: times(out / part) for part in parts} == before


def test_kills_change_no_byte(done: Path, tmp_path: Path) -> None:
    file, out = write(tmp_path), tmp_path / "out"
    command = [
        sys.executable,
        "-P",
        "-c",
        "from wmcache.cli import main; main()",
        "rounds",
        str(file),
        "--out",
        str(out),
    ]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    moments = ("frames/round-1/steps.parquet", "frames/round-2/.played-*", "runs/round-2/config.json")
    for moment in moments:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=one_thread)
        until = time.monotonic() + 120
        while not list(out.glob(moment)) and time.monotonic() < until and process.poll() is None:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (out / "plans/round-2/results.json").exists()
    run(file, out)
    assert prints_of(out) == prints_of(done)
    assert ends_of(out) == ends_of(done)


def test_other_settings_are_refused_by_name(done: Path, tmp_path: Path) -> None:
    file = write(tmp_path)
    file.write_text(file.read_text().replace("steps = 6", "steps = 7").replace("goal_steps = 10", "goal_steps = 9"))
    before = times(done)
    result = run(file, done, status=1)
    line = result.stderr.strip().splitlines()[-1]
    assert "train.steps 6 != 7" in line
    assert "policy.goal_steps 10 != 9" in line
    assert times(done) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    assert str(tmp_path / "other") in run(write(tmp_path), tmp_path / "other", status=1).stderr


def test_without_goals_a_controller_collects_and_the_curve_is_of_returns(user_package: str, tmp_path: Path) -> None:
    few = TCN.replace("batch = 16", "batch = 8")
    file = write(tmp_path, f"{user_package}:Dots-v0", few, "mdn-rnn", MDN_RNN, policy="")
    several = f'{CONTROLLER}\n[variants."blind.0"]\ninputs = "hidden"\n[variants.real]\nwhere = "env"\n'
    file.write_text(file.read_text().replace("[train]", f"{several}\n[train]\nframeskip = 2\nhistory = 1"))
    result = run(file, tmp_path / "out")
    card = FrameDataset.open(tmp_path / "out" / "frames" / "round-2").card
    assert card.policy.startswith("controller of mdn-rnn, weights ")
    rows = json.loads((tmp_path / "out" / "rounds.json").read_text())["rounds"]
    assert [row["return"]["mean"] > 0 for row in rows] == [True, True]
    assert "mean return" in result.stdout
    page = (tmp_path / "out" / "rounds.html").read_text()
    assert page.count("data:image/png") == 4  # returns, and the training of each controller
    for row in rows:
        assert [sorted(row["variants"]), "dream" in row] == [["blind.0", "real"], True]
        assert ["dream" in row["variants"][name] for name in ("blind.0", "real")] == [True, False]
        assert all(found["return"]["ci95"] for found in row["variants"].values())
    before = times(tmp_path / "out" / "controllers")
    run(file, tmp_path / "out")
    assert times(tmp_path / "out" / "controllers") == before


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("rounds = 2", "rounds = 0", "rounds"),
        ("rounds = 2", "roundz = 2", "roundz.*rounds"),
        ("steps = 6", "epochs = 6", "train has epochs"),
        ("steps = 6", "seed = 6", "train has seed"),
        ("length = 30", "seed = 1", "collect has seed"),
        ("length = 30", "lenght = 30", "collect.*lenght.*length"),
        ('model = "dino-wm"', 'model = "ddp-wm"', "ddp-wm.*stages"),
        (DINO_WM, "{ widht = 16 }", "train.*widht.*width"),
        ("goal_steps = 10", "batch = 10", "policy has batch"),
        ("goal_steps = 10", "goal_steps = 0", "policy: goal_steps"),
        ('name = "tcn"', 'name = "tnc"', "encoder.*tnc.*tcn"),
        ("budget = 10", "execute = 9", "plan.*--execute 9"),
        (TCN, 'name = "pca"', "pca.*adapter"),
        ("[train]", "[variants.cold]\n[train]", "variants.*cold.*controller"),
        ("[train]", f'{CONTROLLER}[variants."../x"]\n[train]', "variants"),
        ("[train]", f"{CONTROLLER}[variants.cold]\ntemprature = 0.1\n[train]", "variants.cold.*temprature"),
    ],
)
def test_a_bad_setting_is_one_line_that_names_it(tmp_path: Path, old: str, new: str, named: str) -> None:
    file = write(tmp_path)
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=named) as caught:
        read_rounds(file)
    assert "\n" not in str(caught.value)


def test_the_files_of_the_docs_are_valid() -> None:
    folder = Path(__file__).parents[2] / "study"
    options = read_rounds(folder / "rounds-umaze.toml")
    assert (options.rounds, options.collect.episodes) == (3, 20)
    options = read_rounds(folder / "robust-umaze.toml")
    assert (options.rounds, options.policy.solver, options.plan.budget) == (2, "gd", 30)
    assert options.policy.search | {"steps": 100} == options.plan.search
