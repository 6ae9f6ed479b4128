"""Runs on disk: whole or absent, whatever moment a kill comes at, and readable or refused in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import pytest
import torch
from model_tools import SHAPE, SIZES, each_variant, make_batch, make_trained_model
from safetensors.torch import save_file
from torch import nn

from wmcache.common.errors import UserError
from wmcache.engine.checkpoint import KEEP, last_checkpoint, load_training_state, save_checkpoint
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.runs import load_model
from wmcache.trainer.train import make_optimiser, train

CPU = torch.device("cpu")

# Saves steps 1, 2 and 3 in folder after folder. In the n-th, a fork dies by SIGKILL just before the n-th change or look at the file
# system that saving step 3 makes; it ends with the folder in which no fork died.
DYING_WRITER = """
import os, signal, sys
from pathlib import Path
import torch
from wmcache.engine.checkpoint import save_checkpoint
from wmcache.trainer.train import make_optimiser
from wmcache.trainer.options import TrainOptions

torch.set_num_threads(1)
model = torch.nn.Linear(2, 2)
optimiser = make_optimiser(model, TrainOptions())
model(torch.ones(2)).sum().backward()
optimiser.step()

def save(run, step):
    torch.nn.init.constant_(model.weight, step)
    save_checkpoint(run, step, model, optimiser)

def save_until(death, run):
    seen = 0

    def die(event, arguments):
        nonlocal seen
        if event == "open" or event.startswith(("os.", "shutil.")):
            seen += 1
            if seen == death:
                os.kill(os.getpid(), signal.SIGKILL)

    save(run, 1)
    save(run, 2)
    sys.addaudithook(die)
    save(run, 3)
    os._exit(0)

for death in range(1, 1000):
    child = os.fork()
    if child == 0:
        save_until(death, Path(sys.argv[1]) / str(death))
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
"""


@pytest.fixture(scope="module")
def finished(store_path: Path, tmp_path_factory: pytest.TempPathFactory, tiny: TrainOptions) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    train(store_path, run, tiny)
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return copytree(finished, tmp_path / "run", symlinks=True)


@pytest.mark.sweep  # in `make test` it is killed at any change of a file, see tests/faults/test_kills.py
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", DYING_WRITER, tmp_path], check=True)
    runs = sorted(tmp_path.iterdir(), key=lambda folder: int(folder.name))
    assert len(runs) > 10
    newest = []
    for run in runs:
        model = nn.Linear(2, 2)
        optimiser = make_optimiser(model, TrainOptions())
        step = load_training_state(run, model, optimiser)
        assert model.weight.unique().tolist() == [step]
        newest.append(step)
        # What a dead writer left behind must not stand in the way of the next.
        save_checkpoint(run, 3, model, optimiser)
        assert {file.name for file in (run / "checkpoints").iterdir()} == {"last", "step-00000002", "step-00000003"}
    assert newest == sorted(newest)
    assert {newest[0], newest[-1]} == {2, 3}


def test_only_the_newest_checkpoints_stay(store_path: Path, tmp_path: Path, tiny: TrainOptions) -> None:
    train(store_path, tmp_path / "run", replace(tiny, checkpoint_every=1))
    names = sorted(file.name for file in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["last", *(f"step-{step:08d}" for step in range(9 - KEEP, 9))]


def test_a_model_comes_back_as_it_was_saved(run: Path, store_path: Path, tiny: TrainOptions) -> None:
    once, again = load_model(run, CPU), load_model(run, CPU)
    tokens, proprio, actions = torch.rand(1, 1, 4, 32), torch.rand(1, 1, 4), torch.rand(1, 3, 10)
    assert torch.equal(once.rollout(tokens, proprio, actions)[0], again.rollout(tokens, proprio, actions)[0])
    assert not any(parameter.requires_grad for parameter in once.parameters())


@each_variant
def test_every_variant_comes_back_as_it_was_saved(tmp_path: Path, variant: dict[str, Any]) -> None:
    options = {**variant, "standardise": variant["predict"] == "change"}
    model, batch = make_trained_model(**options), make_batch()
    save_checkpoint(tmp_path, 1, model, make_optimiser(model, TrainOptions()))
    config = TrainOptions(model_options=SIZES | options)
    (tmp_path / "config.json").write_text(json.dumps({**asdict(config), "cache": "x", "shape": asdict(SHAPE)}))
    for saved, loaded in zip(
        model.rollout(*batch.values()), load_model(tmp_path, CPU).rollout(*batch.values()), strict=True
    ):
        assert torch.equal(saved, loaded)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_cut_checkpoint_can_be_deleted_to_fall_back_to_the_one_before(
    run: Path, store_path: Path, tiny: TrainOptions, name: str
) -> None:
    newest = last_checkpoint(run)
    whole = (newest / name).read_bytes()
    (newest / name).write_bytes(whole[: len(whole) // 2])
    longer = replace(tiny, steps=12)
    with pytest.raises(UserError, match=f"{newest / name} differs from its checksum; move its folder"):
        train(store_path, run, longer, resume=True)
    rmtree(newest)
    before = (run / "metrics.jsonl").read_text().splitlines()
    train(store_path, run, longer, resume=True)
    assert last_checkpoint(run).name == "step-00000012"
    # Steps that are trained again log other times, so it did not begin anew.
    after = (run / "metrics.jsonl").read_text().splitlines()
    assert after[:4] == before[:4]
    assert after[4] != before[4]


def test_an_optimiser_state_that_does_not_fit_is_refused(run: Path, store_path: Path, tiny: TrainOptions) -> None:
    save_file({"rng.cpu": torch.get_rng_state()}, last_checkpoint(run) / "optimizer.safetensors")
    with pytest.raises(UserError):
        train(store_path, run, replace(tiny, steps=12), resume=True)


def test_weights_that_do_not_fit_their_settings_are_refused(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    config["model_options"]["depth"] = 2
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"does not fit its config\.json") as refusal:
        load_model(run, CPU)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "content", [None, "", "[]", "{}", '{"model": "dino-wm"}'], ids=["none", "empty", "list", "other", "partial"]
)
def test_a_folder_that_is_no_run_is_refused(run: Path, content: str | None) -> None:
    (run / "config.json").unlink()
    if content is not None:
        (run / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json"):
        load_model(run, CPU)


def test_a_run_without_a_checkpoint_is_refused(run: Path) -> None:
    rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="no checkpoint yet"):
        load_model(run, CPU)
