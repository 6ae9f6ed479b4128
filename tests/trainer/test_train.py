"""Training a world model: it learns, repeats and resumes exactly, and never spoils another run. For the loop itself see tests/engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from run_tools import Go, files_of, make_go, read_curve, read_log, stopped_at, weights_of

from wmcache.cache import TokenStore
from wmcache.common.errors import UserError
from wmcache.engine.checkpoint import last_checkpoint
from wmcache.trainer import train as train_module
from wmcache.trainer.feed import Feed
from wmcache.trainer.models.dino_wm import DinoWm
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.runs import read_config

WMTRAIN = Path(sys.executable).with_name("wmtrain")
SKILLS = [f"skill_{k}" for k in range(1, 6)]


@pytest.fixture(scope="module")
def go(store_path: Path, tiny: TrainOptions) -> Go:
    return make_go(store_path, tiny)


def test_it_learns_a_planted_linear_system(go: Go, planted_path: Path, run: Path) -> None:
    sizes = {"width": 32, "depth": 2, "heads": 2, "dropout": 0.0}
    rare = {"log_every": 50, "validate_every": 250, "checkpoint_every": 250}
    options = {"steps": 250, "batch": 32, "frameskip": 2, "learning_rate": 3e-3, **rare}
    skills = go(run, cache=planted_path, model_options=sizes, **options)
    assert list(skills) == SKILLS
    assert min(value for value in skills.values() if value is not None) > 0.8


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate": 2},
        {"decay_all": True, "weight_decay": 0.5, "beta2": 0.999},
        {"pool": 2, "pool_until": 0.5},  # saved at step 4: as the grid changes, and before it
        {"pool": 2, "pool_until": 0.6},
        {"model_options": {"condition": "adaln", "position": "rope", "rollout_loss": 1.0}},
        {"model_options": {"combine": "tokens", "proprio": "none", "noise": 0.1, "standardise": False}},
    ],
    ids=["plain", "accumulate", "decay", "pool-at", "pool-before", "adaln-rope-rollout", "tokens-noise"],
)
def test_a_stopped_run_resumes_exactly(go: Go, tmp_path: Path, options: dict[str, Any]) -> None:
    go(tmp_path / "straight", **options)
    with stopped_at(6):
        go(tmp_path / "stopped", **options)
    assert last_checkpoint(tmp_path / "stopped").name == "step-00000004"
    go(tmp_path / "stopped", **options)
    assert weights_of(tmp_path / "stopped") == weights_of(tmp_path / "straight")
    assert read_log(tmp_path / "stopped") == read_log(tmp_path / "straight")


def test_a_finished_run_stays_as_it_is(go: Go, run: Path) -> None:
    go(run)
    before = files_of(run)
    for options in ({}, {"steps": 4, "learning_rate": 1.0, "resume": True}):
        assert go(run, **options) == {}
        assert files_of(run) == before


def test_a_run_whose_settings_lack_newer_sizes_resumes(go: Go, run: Path) -> None:
    go(run)
    config = read_config(run)
    for name in ("has_reward", "has_end"):
        del config["shape"][name]
    (run / "config.json").write_text(json.dumps(config))
    assert go(run, steps=10, resume=True)


@pytest.mark.parametrize(
    "changed",
    [{"learning_rate": 1e-3}, {"history": 2}, {"model_options": {"width": 32, "heads": 4}}, {"steps": 9}],
    ids=lambda changed: next(iter(changed)),
)
def test_other_settings_are_refused_by_name(go: Go, run: Path, changed: dict[str, Any]) -> None:
    go(run)
    before = files_of(run)
    name = next(iter(changed.get("model_options", changed)))
    with pytest.raises(UserError, match=rf"{run} .*{name} .* != .*--out") as refused:
        go(run, **changed)
    assert ("--resume" in str(refused.value)) == (name in ("learning_rate", "steps"))
    assert files_of(run) == before


def test_more_steps_need_resume_and_the_other_settings(go: Go, run: Path) -> None:
    with pytest.raises(UserError, match=rf"{run} .*--resume"):
        go(run, resume=True)
    assert not run.exists()
    go(run)
    with pytest.raises(UserError, match=r"steps 8 != 12; width 16 != 32.*--resume.*--out"):
        go(run, steps=12, model_options={"width": 32})
    go(run, steps=12, resume=True)
    assert last_checkpoint(run).name == "step-00000012"
    assert list(read_curve(run)) == list(range(1, 13))


def test_overwrite_starts_from_scratch(go: Go, planted_path: Path, tmp_path: Path) -> None:
    go(tmp_path / "run", steps=4)
    before = read_curve(tmp_path / "run")
    with pytest.raises(UserError, match="identity"):
        go(tmp_path / "run", steps=4, cache=planted_path)
    go(tmp_path / "run", seed=1, steps=4, overwrite=True)
    go(tmp_path / "fresh", seed=1, steps=4)
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "fresh")
    assert list(before) == list(read_curve(tmp_path / "run")) == [1, 2, 3, 4]
    assert before != read_curve(tmp_path / "run")


@pytest.mark.parametrize("precious", ["thesis.tex", "config.json"])
def test_a_folder_that_is_not_a_run_is_never_touched(go: Go, run: Path, precious: str) -> None:
    run.mkdir()
    # Many programs keep a config.json.
    (run / precious).write_text('{"precious": true}')
    for overwrite in (False, True):
        with pytest.raises(UserError, match=f"{run}.*--out"):
            go(run, overwrite=overwrite)
        assert files_of(run) == {precious: b'{"precious": true}'}


@pytest.mark.parametrize(
    "impossible",
    [{"model_options": {"heads": 3}}, {"history": 12}, {"pool": 3}, {"episodes_fraction": float("nan")}],
    ids=lambda impossible: next(iter(impossible)),
)
def test_options_that_are_refused_cost_no_run(go: Go, run: Path, impossible: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        go(run, **impossible)
    assert not run.exists()
    go(run, steps=1)
    before = files_of(run)
    with pytest.raises(UserError):
        go(run, **impossible, overwrite=True)
    assert files_of(run) == before


def test_the_windows_of_a_loss_that_is_not_finite_are_written(
    go: Go, store_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    loss = DinoWm.loss

    def broken(model: DinoWm, batch: Mapping[str, torch.Tensor], pool: int = 1) -> dict[str, torch.Tensor]:
        losses = loss(model, batch, pool)
        seen.append(batch["proprio"][:, 0].numpy())
        return {**losses, "loss": losses["loss"] * (float("nan") if len(seen) == 7 else 1)}

    with monkeypatch.context() as patch:
        patch.setattr(DinoWm, "loss", broken)
        with pytest.raises(UserError, match=rf"{run}.*--resume.*--lr"):
            go(run)
    found = json.loads((run / "not-finite.json").read_text())
    assert found["step"] == 5
    states = TokenStore.open(store_path).state[found["first_frames_of_windows"]]
    assert (states.astype("float32") == seen[-1]).all()
    go(run, learning_rate=1e-5, resume=True)
    assert last_checkpoint(run).name == "step-00000008"


def test_skill_that_is_not_defined_is_reported_once(
    go: Go, still_path: Path, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert set(go(run, cache=still_path, validate_every=2).values()) == {None}
    assert "".join(capfd.readouterr()).count("metrics.jsonl") == 1
    assert read_curve(run, "skill_1") == dict.fromkeys((2, 4, 6, 8))


def test_a_share_of_the_episodes_trains_on_fewer_of_the_same(
    go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[int]] = []

    class Watched(Feed):
        def __init__(self, store: TokenStore, windows: Any, *rest: Any) -> None:
            seen.append(set(store.episode[windows.starts].tolist()))
            super().__init__(store, windows, *rest)

    monkeypatch.setattr(train_module, "Feed", Watched)
    go(tmp_path / "all")
    go(tmp_path / "few", episodes_fraction=0.4)
    assert (len(seen[0]), len(seen[1])) == (5, 2)
    assert seen[1] < seen[0]
    assert weights_of(tmp_path / "all") != weights_of(tmp_path / "few")


def test_validation_needs_no_more_than_its_own_episodes_have(go: Go, uneven_path: Path, run: Path) -> None:
    assert list(go(run, cache=uneven_path, history=1, steps=1)) == SKILLS[:3]


def test_a_run_that_is_older_than_an_option_resumes(go: Go, run: Path) -> None:
    go(run)
    config = json.loads((run / "config.json").read_text())
    del config["episodes_fraction"]
    (run / "config.json").write_text(json.dumps(config))
    assert go(run) == {}
    with pytest.raises(UserError, match=r"episodes_fraction 1\.0 != 0\.5"):
        go(run, episodes_fraction=0.5)


@pytest.mark.parametrize(("epochs", "batch", "accumulate"), [(2, 50, 3), (1, 500, 1)])
def test_epochs_are_passes_over_all_windows(
    go: Go, store_path: Path, tiny: TrainOptions, run: Path, epochs: int, batch: int, accumulate: int
) -> None:
    windows = TokenStore.open(store_path).windows(tiny.history, 1, tiny.frameskip, "train", seed=tiny.split_seed)
    sizes = {"steps": 1000, "batch": batch, "accumulate": accumulate}
    go(run, epochs=epochs, **sizes)
    steps = max(1, epochs * len(windows) // (batch * accumulate))
    assert last_checkpoint(run).name == f"step-{steps:08d}"
    assert read_config(run)["steps"] == steps
    with pytest.raises(UserError, match=f"epochs {epochs} != {2 * epochs}"):
        go(run, epochs=2 * epochs, **sizes)
    go(run, epochs=2 * epochs, **sizes, resume=True)
    assert list(read_curve(run)) == list(range(1, read_config(run)["steps"] + 1))


@pytest.mark.parametrize(("pool", "until", "coarse"), [(2, 0.3, 3), (2, 0.0, 0), (2, 1.0, 8), (1, 0.5, 0)])
def test_the_grid_is_coarse_in_the_first_share_of_the_steps(
    go: Go, run: Path, monkeypatch: pytest.MonkeyPatch, pool: int, until: float, coarse: int
) -> None:
    seen, loss = [], DinoWm.loss

    def watched(model: DinoWm, batch: Mapping[str, torch.Tensor], pool: int = 1) -> dict[str, torch.Tensor]:
        seen.extend([pool] * model.training)
        return loss(model, batch, pool)

    monkeypatch.setattr(DinoWm, "loss", watched)
    go(run, pool=pool, pool_until=until)
    assert seen == [pool] * coarse + [1] * (8 - coarse)


def test_a_run_has_its_stores_identity_and_no_file_that_could_be_code(go: Go, store_path: Path, run: Path) -> None:
    go(run, steps=1, clip=0.0)
    assert {Path(name).suffix for name in files_of(run)} == {".json", ".jsonl", ".md", ".safetensors"}
    identity = json.loads((run / "identity.json").read_text())["identity"]
    assert identity == json.loads(json.dumps(TokenStore.open(store_path).identity.to_json()))


def test_training_loads_no_encoder_and_opens_no_image(store_path: Path, tmp_path: Path) -> None:
    program = f"""
import json, runpy, sys
sys.argv = ["wmtrain", "--cache", {str(store_path)!r}, "--out", {str(tmp_path / "run")!r}, *sys.argv[1:]]
try:
    runpy.run_path({str(WMTRAIN)!r}, run_name="__main__")
finally:
    print(json.dumps(sorted(sys.modules)))
"""
    sizes = "--width 16 --depth 1 --heads 2 --batch-size 8 --steps 2 --device cpu"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, *sizes.split()], env=environment, capture_output=True, text=True, check=True
    )
    assert (tmp_path / "run" / "checkpoints" / "last").exists()
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert "torch" in loaded
    own = ("wmcache.pipeline.encoders", "wmcache.pipeline.frames", "wmcache.envs")
    forbidden = (*own, "timm", "torchvision", "transformers", "PIL.Image", "mujoco")
    assert [name for name in loaded if name.startswith(forbidden)] == []


@pytest.mark.sweep
def test_compile_without_a_compiler_is_one_line_and_the_run_resumes_without_it(
    planted_path: Path, tmp_path: Path
) -> None:
    words = ["--cache", planted_path, "--out", tmp_path / "run", "--width", 16, "--depth", 1, "--heads", 2]
    words += ["--batch-size", 8, "--steps", 4, "--device", "cpu"]
    program = [str(WMTRAIN), *map(str, words)]
    environment = {**os.environ, "CXX": "no-such-c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}
    failed = subprocess.run([*program, "--compile"], env=environment, capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    (line,) = [line for line in failed.stderr.splitlines() if line.startswith("Error: ")]
    assert all(word in line for word in ("--compile", "no-such-c++"))
    assert "Traceback" not in failed.stderr
    subprocess.run(program, env=environment, capture_output=True, check=True)
