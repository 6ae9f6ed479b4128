"""wmtrain on the command line: presets and the options beside them, the options of each model, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from wmcache.cli import wmtrain
from wmcache.common.errors import UserError
from wmcache.engine.checkpoint import Progress, last_checkpoint, read_progress
from wmcache.trainer.models import MODELS, read_options
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.presets import PRESETS
from wmcache.trainer.runs import load_model, read_config

TINY = "--depth 1 --heads 2 --head-dim 4 --mlp 8 --batch-size 8 --device cpu"
Parse = Callable[[str], TrainOptions]


def run(line: str, **paths: Path) -> Result:
    return CliRunner().invoke(wmtrain, [word.format(**paths) for word in line.split()], prog_name="wmtrain")


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Parse:
    """The settings that a command line results in, without a training."""

    def settings_of(line: str) -> TrainOptions:
        received: list[TrainOptions] = []

        def receive(cache: object, out: object, options: TrainOptions, **_: object) -> None:
            received.append(options)
            raise UserError("received")

        monkeypatch.setattr("wmcache.trainer.train.train", receive)
        result = run(f"--cache x.zarr {line}")
        assert result.output.splitlines() == ["Error: received"], result.output
        return received[0]

    return settings_of


def flat(options: TrainOptions) -> dict[str, Any]:
    values = asdict(options)
    return {**values.pop("model_options"), **values}


class TestPresets:
    @pytest.mark.parametrize("preset", PRESETS)
    def test_every_value_arrives_and_no_other_changes(self, parse: Parse, preset: str) -> None:
        names = {"batch-size": "batch", "lr": "learning_rate"}
        values = {names.get(flag, flag.replace("-", "_")): value for flag, value in PRESETS[preset].items()}
        plain = flat(parse(f"--model {PRESETS[preset]['model']}"))
        assert flat(parse(f"--preset {preset}")) == plain | values

    @pytest.mark.parametrize(
        ("preset", "lr", "batch", "epochs"), [("dino-wm", 5e-4, 32, 100), ("ddp-wm", 7e-4, 64, 10)]
    )
    def test_a_reference_is_trained_at_a_constant_rate(
        self, parse: Parse, preset: str, lr: float, batch: int, epochs: int
    ) -> None:
        options = parse(f"--preset {preset}")
        assert (options.learning_rate, options.batch, options.epochs) == (lr, batch, epochs)
        assert (options.warmup, options.decay, options.clip, options.accumulate, options.pool) == (0, 0, 0, 1, 1)
        assert (options.weight_decay, options.decay_all, options.beta2) == (0.01, True, 0.999)

    @pytest.mark.parametrize(
        ("given", "name", "value"),
        [
            ("--lr 0.25", "learning_rate", 0.25),
            ("--width 64", "width", 64),
            ("--proprio none", "proprio", "none"),
            ("--standardise", "standardise", True),
            ("--decay-matrices", "decay_all", False),
            ("--clip 2", "clip", 2.0),
            ("--epochs 3", "epochs", 3),
            ("--steps 7", "steps", 7),
        ],
    )
    @pytest.mark.parametrize("order", ["--preset dino-wm {}", "{} --preset=dino-wm"], ids=["after", "before"])
    def test_an_option_beside_a_preset_wins(
        self, parse: Parse, order: str, given: str, name: str, value: object
    ) -> None:
        options = flat(parse(order.format(given)))
        assert options[name] == value
        assert options["epochs"] == {"steps": None, "epochs": 3}.get(name, 100)

    @pytest.mark.parametrize("preset", PRESETS)
    def test_a_model_is_trained_with_it_and_found_again(
        self, ddp_store_path: Path, tmp_path: Path, preset: str
    ) -> None:
        line = f"--preset {preset} --cache {{store}} --out {{out}} {TINY} --steps 2"
        if "foreground" in PRESETS[preset]:  # 32 tokens are too many for a store of four
            line += " --foreground 2"
        for _ in range(2):
            result = run(line, store=ddp_store_path, out=tmp_path / "run")
            assert result.exit_code == 0, result.output
        config = read_config(tmp_path / "run")
        assert config["model"] == PRESETS[preset]["model"]
        assert config["model_options"]["embedding"] == PRESETS[preset]["embedding"]
        model = load_model(tmp_path / "run", torch.device("cpu"))
        tokens, proprio = model.rollout(torch.rand(1, 1, 4, 32), torch.rand(1, 1, 4), torch.rand(1, 5, 10))
        assert tokens.shape == (1, 5, 4, 32)
        assert proprio.isfinite().all()

    def test_options_of_another_model_in_it_are_left_out(self, parse: Parse) -> None:
        chosen = parse("--preset jepa-wm --model ddp-wm").model_options
        assert chosen["mlp"] == PRESETS["jepa-wm"]["mlp"]
        assert "condition" not in chosen


class TestModels:
    @pytest.mark.parametrize("model", list(MODELS))
    def test_a_model_receives_its_own_options_and_no_others(self, parse: Parse, model: str) -> None:
        for line in (f"--model {model} --dropout 0.25", f"--dropout 0.25 --model={model}"):
            chosen = parse(line).model_options
            assert read_options(model, chosen) == replace(read_options(model, {}), dropout=0.25)
            assert chosen.keys() == {field.name for field in fields(MODELS.get(model).Options)}

    @pytest.mark.parametrize("model", list(MODELS))
    def test_help_has_its_options_and_no_others(self, model: str) -> None:
        helps = {name: run(f"--model {name} --help").stdout for name in MODELS}
        own = {f"--{field.name.replace('_', '-')} " for field in fields(MODELS.get(model).Options)}
        others = {
            f"--{field.name.replace('_', '-')} " for name in MODELS for field in fields(MODELS.get(name).Options)
        } - own
        assert all(flag in helps[model] for flag in own)
        assert not any(flag in helps[model] for flag in others)
        assert all(f"{heading}:\n" in helps[model] for heading in ("Run", "Data", "Training", "Options"))

    def test_help_lists_presets_and_models(self) -> None:
        result = run("--help")
        assert result.exit_code == 0
        assert f"--preset [{'|'.join(PRESETS)}]" in result.stdout
        assert ", ".join(MODELS) in result.stdout

    @pytest.mark.parametrize("stage", ["localization", "primary", "lrm", "all"])
    def test_stage_and_start_arrive(
        self, parse: Parse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
    ) -> None:
        options = parse(f"--model ddp-wm --stage {stage}")
        assert (options.stage, options.start) == (stage, None)
        # Absolute, because a run is resumed from any working directory.
        monkeypatch.chdir(tmp_path)
        assert parse(f"--model ddp-wm --stage {stage} --from runs/a").start == str(tmp_path / "runs" / "a")

    def test_stages_are_trained_one_by_one_from_run_to_run(self, ddp_store_path: Path, tmp_path: Path) -> None:
        paths = {"store": ddp_store_path, "one": tmp_path / "one", "two": tmp_path / "two"}
        line = f"--model ddp-wm --cache {{store}} {TINY} --width 12 --steps 1"
        for words in ("--out {one} --stage localization", "--out {two} --stage primary --from {one}"):
            result = run(f"{line} {words}", **paths)
            assert result.exit_code == 0, result.output
        result = run(f"{line.replace('--steps 1', '--steps 2')} --out {{two}} --stage lrm", **paths)
        assert result.exit_code == 0, result.output
        assert read_progress(last_checkpoint(tmp_path / "two")) == Progress(3, "lrm", 1, finished=True)
        assert int(load_model(tmp_path / "two", torch.device("cpu")).stage) == 3


def bad_values() -> Iterator[str]:
    """An option of each kind of range and choice, with a value outside."""
    yield from (
        "--combine patches",
        "--predict both",
        "--width -1",
        "--embedding 0",
        "--rollout-loss -1",
        "--noise inf",
    )
    yield from (
        "--epochs 0",
        "--beta2 1",
        "--pool 0",
        "--pool-until 2",
        "--lr 0",
        "--lr nan",
        "--clip -1",
        "--dtype int4",
    )
    yield from (f"--model ddp-wm {option}" for option in ("--foreground -1", "--labels words", "--locator-width 0"))


class TestRefusals:
    @pytest.mark.parametrize(
        ("line", "named"),
        [
            ("", "--cache"),
            ("--preset dino-wm", "--cache"),
            ("--preset dinowm", "did you mean dino-wm"),
            ("--cache x --steps 3 --epochs 2", "--steps and --epochs"),
            ("--cache x --no-such-option", "--no-such-option"),
            ("explode", "explode"),
            *((f"--cache x {line}", f"'{line.split()[-2]}'") for line in bad_values()),
        ],
    )
    def test_bad_usage_has_exit_status_2(self, line: str, named: str) -> None:
        result = run(line)
        assert result.exit_code == 2
        assert named in result.stderr.splitlines()[-1]

    @pytest.mark.parametrize(
        ("line", "named"),
        [
            ("--preset dino-wm --proprio raw", ["--width 0", "--proprio"]),
            ("--preset dino-wm --head-dim 0", ["--width 0", "--head-dim"]),
            ("--preset dino-wm --head-dim 63", ["--head-dim"]),
            ("--preset jepa-wm --history 1", ["--rollout-loss", "--history"]),
            ("--pool 3", ["--pool 3", "2 x 2"]),
            ("--model dreamer", ["dreamer", "dino-wm"]),
            ("--model ddp-wm --combine tokens", ["ddp-wm", "--combine", "dino-wm"]),
            ("--noise 0 --model ddp-wm", ["ddp-wm", "--noise", "dino-wm"]),
            ("--preset ddp-wm --model dino-wm --labels pixels", ["dino-wm", "--labels", "ddp-wm"]),
            ("--stage primary", ["primary", "--stage"]),
            ("--from elsewhere", ["--from"]),
            ("--model ddp-wm", ["wmcache derive change-maps"]),
            ("--preset ddp-wm --labels features", ["--foreground 32", "4 tokens"]),
            ("--model ddp-wm --labels features --stage lrm", ["lrm", "primary"]),
            ("--model ddp-wm --labels features --stage dreams", ["dreams"]),
            ("--model ddp-wm --labels features --stage lrm --from elsewhere", ["elsewhere"]),
            ("--model ddp-wm --labels features --pool 2", ["--pool"]),
            ("--devices 3 --batch-size 8", ["--batch-size 8", "3"]),
        ],
    )
    def test_options_that_do_not_fit_are_one_line(
        self, store_path: Path, tmp_path: Path, line: str, named: list[str]
    ) -> None:
        result = run(f"--cache {{store}} --out {{out}} {line}", store=store_path, out=tmp_path / "run")
        assert result.exit_code == 1
        assert result.stderr.startswith("Error: ")
        assert len(result.stderr.splitlines()) == 1
        assert all(word in result.stderr for word in named), result.stderr
        assert not (tmp_path / "run").exists()
