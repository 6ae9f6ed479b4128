"""Online training from end to end by the real command: what each part does, kills, longer runs, goals, and settings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from wmcache.cache import TokenStore
from wmcache.cli import main
from wmcache.common.errors import UserError
from wmcache.engine.checkpoint import last_checkpoint, read_progress
from wmcache.pipeline.frames import FrameDataset
from wmcache.study.online_options import read_online
from wmcache.trainer.runs import caches_of, read_config

from ..conftest import times

SETTINGS = """
prefill = 60
every = 40
train_ratio = 0.1
seed = 3

[collect]
length = 21
image_size = 32
frames_per_shard = 50

[encoder]
name = "pixels"

[train]
batch = 4
dtype = "float32"
model_options = { proprio = "none", deter = 8, stoch = 4, hidden = 8, sequence = 4 }
checkpoint_every = 3

[actor]
batch = 4
observed = 2
horizon = 2
units = 8
layers = 1
checkpoint_every = 3

[plan]
episodes = 3
"""
PENDULUM = ("--env", "gym:Pendulum-v1", "--steps", "140")


def write(folder: Path) -> Path:
    file = folder / "tiny.toml"
    file.write_text(SETTINGS)
    return file


def words(file: Path, out: Path, *flags: str) -> list[str]:
    return ["online", str(file), "--out", str(out), "--device", "cpu", *flags]


def run(file: Path, out: Path, *flags: str, status: int = 0) -> Result:
    result = CliRunner().invoke(main, words(file, out, *flags), prog_name="wmcache")
    assert result.exit_code == status, result.output
    return result


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three parts, of 60, 40 and 40 env steps; read only."""
    folder = tmp_path_factory.mktemp("online")
    run(write(folder), folder / "out", *PENDULUM)
    return folder / "out"


def rows_of(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / "online.json").read_text())["parts"]
    return found


def weights_of(out: Path) -> list[bytes]:
    return [(last_checkpoint(out / name) / "model.safetensors").read_bytes() for name in ("run", "actor")]


def test_each_part_is_collected_by_the_actor_and_encoded_once(done: Path) -> None:
    cards = [FrameDataset.open(done / "frames" / f"part-{n}").card for n in (1, 2, 3)]
    assert [card.episodes for card in cards] == [3, 2, 2]
    assert cards[0].policy == "random"
    assert all(card.policy.startswith("dream-actor of rssm, weights ") for card in cards[1:])
    assert cards[1].policy != cards[2].policy
    stores = [done / "stores" / f"part-{n}.zarr" for n in (1, 2, 3)]
    for card, path in zip(cards, stores, strict=True):
        assert TokenStore.open(path).identity.dataset_fingerprint == card.fingerprint
    assert caches_of(read_config(done / "run")) == stores
    assert [read_progress(last_checkpoint(done / name)).step for name in ("run", "actor")] == [14, 14]


def test_figures_are_those_of_stores_and_evaluations(done: Path) -> None:
    rows = rows_of(done)
    assert [(row["env_steps"], row["updates"]) for row in rows] == [(60, 6), (100, 10), (140, 14)]
    for number, row in enumerate(rows, 1):
        store = TokenStore.open(done / "stores" / f"part-{number}.zarr")
        returns = [float(store.reward[store.episode == n].sum()) for n in range(store.episodes)]
        assert row["collected"]["mean"] == pytest.approx(np.mean(returns), rel=1e-5)
        results = json.loads((done / "plans" / f"part-{number}" / "results.json").read_text())
        assert row["return"] == results["return"]
        assert sorted(results["baselines"]) == ([] if number > 1 else ["random", "zero"])
    board = EventAccumulator(str(done / "tensorboard")).Reload()
    events = [(event.step, event.value) for event in board.Scalars("evaluation/return")]
    assert events == [(row["env_steps"], pytest.approx(row["return"]["mean"])) for row in rows]
    page = (done / "online.html").read_text()
    assert (page.count("data:image/png"), page.count("data:video/mp4")) == (1, 1)


def test_kills_change_no_byte(done: Path, tmp_path: Path) -> None:
    file, out = write(tmp_path), tmp_path / "out"
    command = [sys.executable, "-P", "-c", "from wmcache.cli import main; main()", *words(file, out, *PENDULUM)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    for moment in ("run/checkpoints/step-00000009", "actor/checkpoints/step-00000009"):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=one_thread)
        until = time.monotonic() + 120
        while not list(out.glob(moment)) and time.monotonic() < until and process.poll() is None:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert len(rows_of(out)) < 3
    run(file, out, *PENDULUM)
    assert rows_of(out) == rows_of(done)
    assert weights_of(out) == weights_of(done)
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [60, 100, 140]


def test_a_second_run_does_nothing_and_more_steps_go_on(done: Path, tmp_path: Path) -> None:
    file, short = write(tmp_path), tmp_path / "short"
    run(file, short, *PENDULUM[:2], "--steps", "80")
    assert [row["env_steps"] for row in rows_of(short)] == [60, 100]
    run(file, short, *PENDULUM)
    assert rows_of(short) == rows_of(done)
    assert weights_of(short) == weights_of(done)
    parts = ("frames", "stores", "run", "actor", "plans")
    before = {part: times(short / part) for part in parts}
    for steps in ("140", "60"):
        printed = json.loads(run(file, short, *PENDULUM[:2], "--steps", steps, "--json").stdout)
        assert printed == rows_of(done)
    assert {part: times(short / part) for part in parts} == before


def test_goals_and_episodes_that_end_early(tmp_path: Path) -> None:
    file = write(tmp_path)
    file.write_text(SETTINGS.replace("[plan]", "[policy]\ngoal_steps = 10\n[plan]").replace('"none"', '"raw"'))
    run(file, tmp_path / "maze", "--env", "UMaze", "--steps", "100", "--evaluate-every", "2")
    first, last = rows_of(tmp_path / "maze")
    assert "by_threshold" not in first
    assert first["collected"] is None
    assert last["by_threshold"][0]["successes"] <= last["episodes"] == 3
    assert sorted(last["baselines"]) == ["random", "zero"]
    file.write_text(SETTINGS.replace("length = 21", "length = 81"))
    sizes = ("--proprio", "none", "--hidden", "8", "--mixtures", "2", "--sequence", "4")
    run(file, tmp_path / "cart", "--env", "gym:CartPole-v1", "--model", "mdn-rnn", *sizes, "--steps", "100")
    rows = rows_of(tmp_path / "cart")
    assert rows[0]["part"] > 1  # the first part was too short for the prefill
    assert rows[0]["env_steps"] >= 60
    assert rows[-1]["env_steps"] >= 100
    assert rows[-1]["collected"]["mean"] == pytest.approx(
        (rows[-1]["env_steps"] - rows[-2]["env_steps"]) / rows[-1]["collected_episodes"]
    )


def test_other_settings_are_refused_by_name(done: Path, tmp_path: Path) -> None:
    file, before = write(tmp_path), times(done / "run")
    line = run(file, done, *PENDULUM, "--train-ratio", "0.2", "--deter", "9", status=1).stderr.strip().splitlines()[-1]
    assert "train_ratio 0.1 != 0.2" in line
    assert "train.model_options.deter 8 != 9" in line
    assert times(done / "run") == before
    copy = copytree(done, tmp_path / "copy", symlinks=True)
    (copy / "online.json").unlink()
    assert str(copy) in run(file, copy, *PENDULUM, status=1).stderr


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("prefill = 60", "prefill = 99999", "prefill 99999"),
        ("prefill = 60", "prefil = 60", "prefil.*prefill"),
        ("train_ratio = 0.1", "train_ratio = 0.0", "train_ratio"),
        ("length = 21", "episodes = 9", "collect has episodes"),
        ("length = 21", "length = 1", "collect: length"),
        ("batch = 4", "steps = 4", "train has steps"),
        ("batch = 4", 'model = "gcbc"', "train.*gcbc.*rssm"),
        ("deter = 8", "detre = 8", "train.*detre.*deter"),
        ("observed = 2", "steps = 2", "actor has steps"),
        ("observed = 2", "observd = 2", "actor.*observd.*observed"),
        ("episodes = 3", 'policy = "mpc"', "plan has policy"),
        ('"pixels"', '"pca"', "pca.*adapter"),
    ],
)
def test_a_bad_setting_is_one_line_that_names_it(tmp_path: Path, old: str, new: str, named: str) -> None:
    file = write(tmp_path)
    file.write_text(SETTINGS.replace(old, new, 1))
    with pytest.raises(UserError, match=named) as caught:
        read_online(file)
    assert "\n" not in str(caught.value)


def test_flags_win_over_the_file_and_another_model_drops_its_options(tmp_path: Path) -> None:
    file = write(tmp_path)
    flags = {"steps": 70, "collect.env": "UMaze", "train.model": "mdn-rnn", "encoder.name": "tcn", "plan.episodes": 9}
    options = read_online(file, {**flags, "train.model_options": {"hidden": 5}})
    assert (options.steps, options.prefill, options.collect.env, options.plan.episodes) == (70, 60, "UMaze", 9)
    assert (options.train.model, options.train.model_options) == ("mdn-rnn", {"hidden": 5})
    assert (options.encoder.name, options.encoder.fit) == ("tcn", {"seed": 3})
    assert read_online(file, {"train.model_options": {"hidden": 5}}).train.model_options["deter"] == 8
    usual = read_online(None, {"collect.env": "gym:Pendulum-v1"})
    assert (usual.train.model, usual.encoder.name, usual.plan.budget) == ("rssm", "vae", usual.collect.length - 1)
    assert (usual.policy.draw, usual.plan.draw) == (True, False)


@pytest.mark.parametrize("name", ["online-pendulum.toml", "online-reacher.toml"])
def test_the_files_of_the_docs_are_valid(name: str) -> None:
    options = read_online(Path(__file__).parents[2] / "study" / name)
    assert options.train.model == "rssm"
