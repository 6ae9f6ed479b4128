"""The loop: it learns, it repeats itself exactly, it goes on exactly, and it refuses rather than spoils."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from wmcache.cache import TokenStore
from wmcache.common.errors import UserError
from wmcache.trainer import loop
from wmcache.trainer.checkpoint import last_checkpoint, load_model, read_config
from wmcache.trainer.feed import Feed
from wmcache.trainer.loop import learning_rate, make_optimiser, pool_at, train
from wmcache.trainer.models.dino_wm import DinoWm
from wmcache.trainer.options import TrainOptions

WMTRAIN = Path(sys.executable).with_name("wmtrain")


def read_metrics(run: Path, key: str = "loss") -> dict[int, float]:
    """Step -> value; a step that is logged twice fails."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [(line["step"], line[key]) for line in lines if key in line]
    assert len(found) == len(dict(found))
    return dict(found)


def weights_of(run: Path) -> bytes:
    return (last_checkpoint(run) / "model.safetensors").read_bytes()


def files_of(folder: Path) -> dict[str, bytes]:
    # TensorBoard opens a new file at every start.
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and "tensorboard" not in file.parts
    }


class StoppedAtSix(loop.Log):
    def write(self, step: int, values: Mapping[str, float]) -> None:
        super().write(step, values)
        if step == 6:
            raise KeyboardInterrupt


def train_and_stop_at_six(cache: Path, out: Path, options: TrainOptions) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Log", StoppedAtSix)
        with pytest.raises(KeyboardInterrupt):
            train(cache, out, options)


def test_it_learns_a_planted_linear_system(planted_path: Path, tmp_path: Path, tiny: TrainOptions) -> None:
    options = replace(
        tiny,
        model_options={"width": 32, "depth": 2, "heads": 2, "dropout": 0.0},
        steps=250,
        batch=32,
        frameskip=2,
        learning_rate=3e-3,
        log_every=50,
        validate_every=250,
        checkpoint_every=250,
    )
    skills = train(planted_path, tmp_path / "run", options)
    assert list(skills) == ["skill_1", "skill_2", "skill_3", "skill_4", "skill_5"]
    assert min(skills.values()) > 0.8


def test_the_same_seed_gives_the_same_losses(store_path: Path, tmp_path: Path, tiny: TrainOptions) -> None:
    train(store_path, tmp_path / "a", tiny)
    train(store_path, tmp_path / "b", tiny)
    train(store_path, tmp_path / "c", replace(tiny, seed=1))
    assert read_metrics(tmp_path / "a") == read_metrics(tmp_path / "b")
    assert list(read_metrics(tmp_path / "a")) == list(range(1, 9))
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b")
    assert read_metrics(tmp_path / "a") != read_metrics(tmp_path / "c")


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_stopped_run_goes_on_exactly(
    store_path: Path, tmp_path: Path, tiny: TrainOptions, dropout: float, accumulate: int
) -> None:
    options = replace(tiny, model_options=tiny.model_options | {"dropout": dropout}, accumulate=accumulate)
    train(store_path, tmp_path / "straight", options)
    train_and_stop_at_six(store_path, tmp_path / "stopped", options)
    assert last_checkpoint(tmp_path / "stopped").name == "step-00000004"
    train(store_path, tmp_path / "stopped", options)
    assert weights_of(tmp_path / "stopped") == weights_of(tmp_path / "straight")
    for key in ("loss", "gradient_norm", "skill_5"):
        assert read_metrics(tmp_path / "stopped", key) == read_metrics(tmp_path / "straight", key)


def test_a_killed_run_goes_on_exactly(store_path: Path, tmp_path: Path, tiny: TrainOptions) -> None:
    train(store_path, tmp_path / "straight", tiny)
    # Dies by SIGKILL after the last step, at the very moment that would make its checkpoint the newest.
    program = """
import json, os, signal, sys
from pathlib import Path
import torch
from wmcache.trainer.loop import train
from wmcache.trainer.options import TrainOptions
torch.set_num_threads(1)
def die(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith("step-00000008"):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(die)
train(Path(sys.argv[1]), Path(sys.argv[2]), TrainOptions(**json.loads(sys.argv[3])))
"""
    killed = tmp_path / "killed"
    arguments = [sys.executable, "-c", program, store_path, killed, json.dumps(vars(tiny))]
    assert subprocess.run(arguments, check=False, capture_output=True).returncode == -signal.SIGKILL
    assert last_checkpoint(killed).name == "step-00000004"
    assert list(read_metrics(killed)) == list(range(1, 9))
    train(store_path, killed, tiny)
    assert weights_of(killed) == weights_of(tmp_path / "straight")
    assert read_metrics(killed) == read_metrics(tmp_path / "straight")


def test_a_finished_run_is_left_as_it_is(store_path: Path, tmp_path: Path, tiny: TrainOptions) -> None:
    run = tmp_path / "run"
    train(store_path, run, tiny)
    before = files_of(run)
    train(store_path, run, tiny)
    assert files_of(run) == before


@pytest.mark.parametrize(
    "changed",
    [
        {"learning_rate": 1e-3},
        {"batch": 4},
        {"history": 2},
        {"frameskip": 4},
        {"seed": 1},
        {"split_seed": 1},
        {"model_options": {"width": 32, "heads": 4}},
        {"steps": 9},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_other_settings_are_refused_by_name(
    store_path: Path, tmp_path: Path, tiny: TrainOptions, changed: dict[str, Any]
) -> None:
    run = tmp_path / "run"
    train(store_path, run, tiny)
    before = files_of(run)
    name = next(iter(changed.get("model_options", changed)))
    with pytest.raises(UserError, match=rf"other settings .*{name} .* != .*--out") as refused:
        train(store_path, run, replace(tiny, **changed))
    assert ("--resume" in str(refused.value)) == (name in ("learning_rate", "steps"))
    assert files_of(run) == before


def test_another_store_is_refused(store_path: Path, planted_path: Path, tmp_path: Path, tiny: TrainOptions) -> None:
    train(store_path, tmp_path / "run", tiny)
    with pytest.raises(UserError, match="identity"):
        train(planted_path, tmp_path / "run", tiny)


def test_resume_goes_on_to_other_steps(store_path: Path, tmp_path: Path, tiny: TrainOptions) -> None:
    run = tmp_path / "run"
    train(store_path, run, tiny)
    train(store_path, run, replace(tiny, steps=12), resume=True)
    assert last_checkpoint(run).name == "step-00000012"
    assert list(read_metrics(run)) == list(range(1, 13))


def test_a_finished_run_that_is_to_have_more_steps_names_resume(
    store_path: Path, tmp_path: Path, tiny: TrainOptions
) -> None:
    run = tmp_path / "run"
    train(store_path, run, tiny)
    with pytest.raises(UserError, match=r"steps .*--resume") as refusal:
        train(store_path, run, replace(tiny, steps=12))
    assert "--overwrite" not in str(refusal.value)
    # A run cannot go on with another width: its own has to be repeated.
    wider = {**tiny.model_options, "width": 32}
    with pytest.raises(UserError, match=r"width .*repeat .*--resume.*another --out") as refusal:
        train(store_path, run, replace(tiny, steps=12, model_options=wider))
    assert "--overwrite" not in str(refusal.value)
    with pytest.raises(UserError, match="another --out") as refusal:
        train(store_path, run, replace(tiny, model_options=wider))
    assert "--resume" not in str(refusal.value)


def test_resume_insists_on_a_run(store_path: Path, tmp_path: Path, tiny: TrainOptions) -> None:
    with pytest.raises(UserError, match="no checkpoint to resume"):
        train(store_path, tmp_path / "run", tiny, resume=True)
    assert not (tmp_path / "run").exists()


def test_overwrite_begins_anew(store_path: Path, tmp_path: Path, tiny: TrainOptions) -> None:
    run, other = tmp_path / "run", replace(tiny, seed=1, steps=4)
    train(store_path, run, tiny)
    train(store_path, run, other, overwrite=True)
    train(store_path, tmp_path / "fresh", other)
    assert weights_of(run) == weights_of(tmp_path / "fresh")
    assert list(read_metrics(run)) == [1, 2, 3, 4]


@pytest.mark.parametrize("precious", ["thesis.tex", "config.json"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_run_is_never_touched(
    store_path: Path, tmp_path: Path, tiny: TrainOptions, precious: str, overwrite: bool
) -> None:
    folder = tmp_path / "home"
    folder.mkdir()
    # Many a program keeps a config.json.
    (folder / precious).write_text('{"precious": true}')
    with pytest.raises(UserError):
        train(store_path, folder, tiny, overwrite=overwrite)
    assert files_of(folder) == {precious: b'{"precious": true}'}


@pytest.mark.parametrize(
    "impossible",
    [
        {"model": "dreamer"},
        {"model_options": {"width": 16, "heads": 3}},
        {"dtype": "float8"},
        {"device": "abacus"},
        {"history": 12},
        {"pool": 3},
        {"clip": -1.0},
    ],
    ids=lambda impossible: next(iter(impossible)),
)
def test_what_cannot_be_trained_costs_no_run(
    store_path: Path, tmp_path: Path, tiny: TrainOptions, impossible: dict[str, Any]
) -> None:
    run = tmp_path / "run"
    with pytest.raises(UserError):
        train(store_path, run, replace(tiny, **impossible))
    assert not run.exists()
    train(store_path, run, tiny)
    before = files_of(run)
    with pytest.raises(UserError):
        train(store_path, run, replace(tiny, **impossible), overwrite=True)
    assert files_of(run) == before


def test_a_place_that_cannot_be_written_is_said_so(store_path: Path, tmp_path: Path, tiny: TrainOptions) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"):
        train(store_path, tmp_path / "file" / "run", tiny)


def train_until_it_explodes(cache: Path, out: Path, options: TrainOptions) -> None:
    """Four sound steps, then one that throws the weights far away."""

    def rate(step: int, options: TrainOptions) -> float:
        return 1e30 if step == 4 else learning_rate(step, options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "learning_rate", rate)
        with pytest.raises(UserError, match="not finite"):
            train(cache, out, options)


@pytest.mark.parametrize("checkpoint_every", [1, 2, 4])
def test_a_loss_that_is_not_finite_leaves_a_good_checkpoint_last(
    store_path: Path, tmp_path: Path, tiny: TrainOptions, checkpoint_every: int
) -> None:
    run = tmp_path / "run"
    train_until_it_explodes(store_path, run, replace(tiny, checkpoint_every=checkpoint_every))
    model, windows = load_model(run, torch.device("cpu")), TokenStore.open(store_path).windows(3, 1, 5, "train")
    batch = {name: torch.from_numpy(value) for name, value in windows.batch(np.arange(8)).items()}
    assert model.loss(batch)["loss"].isfinite()


def test_the_advice_about_a_loss_that_is_not_finite_can_be_followed(
    store_path: Path, tmp_path: Path, tiny: TrainOptions
) -> None:
    run = tmp_path / "run"
    train_until_it_explodes(store_path, run, tiny)
    assert last_checkpoint(run).name == "step-00000004"
    train(store_path, run, replace(tiny, learning_rate=tiny.learning_rate / 10), resume=True)
    assert last_checkpoint(run).name == "step-00000008"


def test_a_run_that_ends_in_no_number_is_not_called_trained(
    store_path: Path, tmp_path: Path, tiny: TrainOptions
) -> None:
    with pytest.raises(UserError, match="finite"):
        train(store_path, tmp_path / "run", replace(tiny, steps=1, learning_rate=1e38, warmup=0, decay=0))


def strict(line: str) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(word)

    return json.loads(line, parse_constant=refuse)


def test_frames_that_do_not_change_have_no_skill_and_that_is_said_once(
    still_path: Path, tmp_path: Path, tiny: TrainOptions, capfd: pytest.CaptureFixture[str]
) -> None:
    found = train(still_path, tmp_path / "run", replace(tiny, validate_every=2))
    assert set(found.values()) == {None}
    assert "".join(capfd.readouterr()).count("no skill") == 1
    lines = [strict(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    skills = {line["step"]: line["skill_1"] for line in lines if "skill_1" in line}
    assert skills == dict.fromkeys((2, 4, 6, 8))


def test_the_learning_rate_warms_up_stays_and_decays_towards_nothing() -> None:
    options = TrainOptions(steps=100, learning_rate=2.0, warmup=0.1, decay=0.4)
    rates = [learning_rate(step, options) for step in range(101)]
    np.testing.assert_allclose(rates[:10], 2.0 * np.arange(1, 11) / 10)
    assert rates[10:61] == [2.0] * 51
    np.testing.assert_allclose(rates[60:], 2.0 * (1 - np.sqrt(np.arange(41) / 40)), atol=1e-12)


@pytest.mark.parametrize(("warmup", "decay"), [(0, 0), (0, 1), (1, 0), (0.001, 0.001)])
def test_every_step_has_some_learning_rate(warmup: float, decay: float) -> None:
    options = TrainOptions(steps=7, learning_rate=2.0, warmup=warmup, decay=decay)
    assert all(0 < learning_rate(step, options) <= 2.0 for step in range(7))


@pytest.mark.parametrize(("decay_all", "of_vectors"), [(False, 0.0), (True, 0.5)])
def test_matrices_decay_and_vectors_only_where_told(decay_all: bool, of_vectors: float) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    decay = {
        parameter: group["weight_decay"]
        for group in make_optimiser(model, TrainOptions(weight_decay=0.5, decay_all=decay_all)).param_groups
        for parameter in group["params"]
    }
    assert {name: decay[value] for name, value in model.named_parameters()} == {
        "0.weight": 0.5,
        "0.bias": of_vectors,
        "1.weight": of_vectors,
        "1.bias": of_vectors,
    }


def test_the_second_moment_decays_as_told() -> None:
    optimiser = make_optimiser(nn.Linear(3, 4), TrainOptions(beta2=0.999))
    assert [group["betas"] for group in optimiser.param_groups] == [(0.9, 0.999)] * 2


def test_a_share_of_the_episodes_is_all_that_is_seen(
    store: TokenStore, store_path: Path, tmp_path: Path, tiny: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    class Watched(Feed):
        def __init__(self, store: TokenStore, windows: Any, *others: Any) -> None:
            seen.append(set(store.episode[windows.starts].tolist()))
            super().__init__(store, windows, *others)

    monkeypatch.setattr(loop, "Feed", Watched)
    train(store_path, tmp_path / "all", tiny)
    train(store_path, tmp_path / "few", replace(tiny, episodes_fraction=0.4))
    assert (len(seen[0]), len(seen[1])) == (5, 2)
    assert seen[1] < seen[0]
    assert weights_of(tmp_path / "all") != weights_of(tmp_path / "few")


def test_what_is_long_among_those_that_train_is_not_asked_of_those_that_validate(
    uneven_path: Path, tmp_path: Path, tiny: TrainOptions
) -> None:
    assert TokenStore.open(uneven_path).longest_episode() == 420
    result = train(uneven_path, tmp_path / "run", replace(tiny, history=1, steps=1))
    assert set(result) == {"skill_1", "skill_2", "skill_3"}


@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(store_path: Path, tmp_path: Path, tiny: TrainOptions, fraction: float) -> None:
    with pytest.raises(UserError, match="--fraction"):
        train(store_path, tmp_path / "run", replace(tiny, episodes_fraction=fraction))


def test_a_run_that_is_older_than_an_option_goes_on(store_path: Path, tmp_path: Path, tiny: TrainOptions) -> None:
    train(store_path, tmp_path / "run", tiny)
    file = tmp_path / "run" / "config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "episodes_fraction"}))
    assert train(store_path, tmp_path / "run", tiny) == {}
    with pytest.raises(UserError, match=r"episodes_fraction 1\.0 != 0\.5"):
        train(store_path, tmp_path / "run", replace(tiny, episodes_fraction=0.5))


def test_a_run_whose_vectors_decay_goes_on_exactly(store_path: Path, tmp_path: Path, tiny: TrainOptions) -> None:
    options = replace(tiny, decay_all=True, weight_decay=0.5, beta2=0.999)
    train(store_path, tmp_path / "straight", options)
    train_and_stop_at_six(store_path, tmp_path / "stopped", options)
    train(store_path, tmp_path / "stopped", options)
    assert weights_of(tmp_path / "stopped") == weights_of(tmp_path / "straight")


@pytest.mark.parametrize("figure", ["gradient_norm", "loss"])
def test_two_micro_batches_of_four_are_a_batch_of_eight(
    store_path: Path, tmp_path: Path, tiny: TrainOptions, figure: str
) -> None:
    options = replace(tiny, model_options=tiny.model_options | {"dropout": 0.0}, steps=1)
    train(store_path, tmp_path / "whole", options)
    train(store_path, tmp_path / "halves", replace(options, batch=4, accumulate=2))
    whole, halves = (read_metrics(tmp_path / run, figure)[1] for run in ("whole", "halves"))
    assert halves == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize(("epochs", "batch", "accumulate"), [(1, 64, 1), (2, 50, 3), (1, 500, 1)])
def test_epochs_are_as_many_steps_as_pass_over_all_windows(
    store_path: Path, tmp_path: Path, tiny: TrainOptions, epochs: int, batch: int, accumulate: int
) -> None:
    windows = TokenStore.open(store_path).windows(tiny.history, 1, tiny.frameskip, "train", seed=tiny.split_seed)
    options = replace(tiny, steps=1000, epochs=epochs, batch=batch, accumulate=accumulate)
    train(store_path, tmp_path / "run", options)
    steps = max(1, epochs * len(windows) // (batch * accumulate))
    assert last_checkpoint(tmp_path / "run").name == f"step-{steps:08d}"
    assert read_config(tmp_path / "run")["steps"] == steps


def test_a_run_of_epochs_goes_on_to_more_of_them(store_path: Path, tmp_path: Path, tiny: TrainOptions) -> None:
    options = replace(tiny, batch=64, epochs=1)
    train(store_path, tmp_path / "run", options)
    with pytest.raises(UserError, match="epochs 1 != 2"):
        train(store_path, tmp_path / "run", replace(options, epochs=2))
    train(store_path, tmp_path / "run", replace(options, epochs=2), resume=True)
    assert list(read_metrics(tmp_path / "run")) == list(range(1, read_config(tmp_path / "run")["steps"] + 1))


@pytest.mark.parametrize(
    ("pool", "until", "expected"),
    [
        (2, 0.5, [2, 2, 2, 2, 1, 1, 1, 1]),
        (2, 0.3, [2, 2, 2, 1, 1, 1, 1, 1]),
        (2, 0.0, [1] * 8),
        (2, 1.0, [2] * 8),
        (1, 0.5, [1] * 8),
    ],
)
def test_the_grid_is_coarse_in_the_first_share_of_the_steps(
    store_path: Path,
    tmp_path: Path,
    tiny: TrainOptions,
    monkeypatch: pytest.MonkeyPatch,
    pool: int,
    until: float,
    expected: list[int],
) -> None:
    seen, loss = [], DinoWm.loss

    def watched(model: DinoWm, batch: Mapping[str, torch.Tensor], pool: int = 1) -> dict[str, torch.Tensor]:
        seen.extend([pool] * model.training)
        return loss(model, batch, pool)

    monkeypatch.setattr(DinoWm, "loss", watched)
    options = replace(tiny, pool=pool, pool_until=until)
    train(store_path, tmp_path / "run", options)
    assert seen == expected == [pool_at(step, options) for step in range(8)]


@pytest.mark.parametrize("pool_until", [0.5, 0.6])
def test_a_stopped_run_goes_on_exactly_where_the_grid_changes(
    store_path: Path, tmp_path: Path, tiny: TrainOptions, pool_until: float
) -> None:
    # Checkpointed at step 4: at the change, and before it.
    options = replace(tiny, pool=2, pool_until=pool_until)
    train(store_path, tmp_path / "straight", options)
    train_and_stop_at_six(store_path, tmp_path / "stopped", options)
    train(store_path, tmp_path / "stopped", options)
    assert weights_of(tmp_path / "stopped") == weights_of(tmp_path / "straight")
    assert read_metrics(tmp_path / "stopped") == read_metrics(tmp_path / "straight")
    train(store_path, tmp_path / "fine", tiny)
    assert read_metrics(tmp_path / "fine")[1] != read_metrics(tmp_path / "straight")[1]


@pytest.mark.parametrize(
    "model_options",
    [
        {"condition": "adaln", "position": "rope", "rollout_loss": 1.0},
        {"width": 0, "head_dim": 4, "proprio": "embedding", "predict": "frame", "standardise": False},
        {"combine": "tokens", "proprio": "none", "noise": 0.1},
    ],
    ids=["adaln-rope-rollout", "reference", "tokens-noise"],
)
def test_a_stopped_run_of_another_variant_goes_on_exactly(
    store_path: Path, tmp_path: Path, tiny: TrainOptions, model_options: dict[str, Any]
) -> None:
    options = replace(tiny, model_options=tiny.model_options | model_options)
    train(store_path, tmp_path / "straight", options)
    train_and_stop_at_six(store_path, tmp_path / "stopped", options)
    train(store_path, tmp_path / "stopped", options)
    assert weights_of(tmp_path / "stopped") == weights_of(tmp_path / "straight")


def test_a_clip_of_nothing_is_none(store_path: Path, tmp_path: Path, tiny: TrainOptions) -> None:
    for name, clip in (("none", 0.0), ("far", 1e9), ("near", 1e-6)):
        train(store_path, tmp_path / name, replace(tiny, clip=clip, steps=2))
    assert weights_of(tmp_path / "none") == weights_of(tmp_path / "far")
    assert weights_of(tmp_path / "none") != weights_of(tmp_path / "near")


def test_nothing_in_a_run_can_hold_code(store_path: Path, tmp_path: Path, tiny: TrainOptions) -> None:
    train(store_path, tmp_path / "run", tiny)
    kinds = {Path(name).suffix for name in files_of(tmp_path / "run")}
    assert kinds == {".json", ".jsonl", ".safetensors"}


def test_a_run_knows_its_store(store_path: Path, tmp_path: Path, tiny: TrainOptions) -> None:
    train(store_path, tmp_path / "run", tiny)
    identity = json.loads((tmp_path / "run" / "identity.json").read_text())["identity"]
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
    forbidden = ("timm", "torchvision", "transformers", "PIL.Image", "wmcache.pipeline", "wmcache.envs", "mujoco")
    assert [name for name in loaded if name.startswith(forbidden)] == []


@pytest.mark.sweep
def test_compile_without_a_compiler_is_one_line_and_the_run_resumes_without_it(
    planted_path: Path, tmp_path: Path
) -> None:
    words = ["--cache", planted_path, "--out", tmp_path / "run", "--width", 16, "--depth", 1, "--heads", 2]
    words += ["--batch-size", 8, "--steps", 4, "--device", "cpu"]
    program = [str(Path(sys.executable).with_name("wmtrain")), *map(str, words)]
    environment = {**os.environ, "CXX": "no-such-c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}
    failed = subprocess.run([*program, "--compile"], env=environment, capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    (line,) = [line for line in failed.stderr.splitlines() if line.startswith("Error: ")]
    assert "--compile" in line
    assert "no-such-c++" in line
    assert "Traceback" not in failed.stderr
    subprocess.run(program, env=environment, capture_output=True, check=True)
