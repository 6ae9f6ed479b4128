"""wmtrain's words: presets and what is given beside them, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

from wmcache.cache import TokenStore
from wmcache.cli import wmtrain
from wmcache.engine.checkpoint import Progress, last_checkpoint, read_progress
from wmcache.trainer import loop
from wmcache.trainer.models import MODELS, build, read_options
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.presets import PRESETS
from wmcache.trainer.runs import load_model, read_config
from wmcache.trainer.train import data_shape, learning_rate, make_optimiser, statistics_of

TINY = "--depth 1 --heads 2 --head-dim 4 --mlp 8 --batch-size 8 --device cpu"
Told = Callable[[str], TrainOptions]


def run(line: str, **places: Path) -> Result:
    return CliRunner().invoke(wmtrain, [word.format(**places) for word in line.split()], prog_name="wmtrain")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    """The settings that a line of options comes to, without a training."""

    def settings_of(line: str) -> TrainOptions:
        taken: list[TrainOptions] = []
        monkeypatch.setattr(loop, "train", lambda cache, out, options, **_: taken.append(options))
        monkeypatch.setattr(
            "wmcache.commands.train._next_step", lambda run, cache: "no run"
        )  # there is none to look at
        result = run(f"--cache x.zarr {line}")
        assert result.exit_code == 0, result.output
        return taken[0]

    return settings_of


def flat(options: TrainOptions) -> dict[str, Any]:
    values = asdict(options)
    return {**values.pop("model_options"), **values}


class TestPresets:
    def test_dino_wm_is_trained_as_the_reference(self, told: Told) -> None:
        options = told("--preset dino-wm")
        assert (options.history, options.frameskip, options.batch, options.epochs) == (3, 5, 32, 100)
        assert (options.clip, options.accumulate, options.pool, options.dtype) == (0.0, 1, 1, "float32")
        assert {learning_rate(step, options) for step in range(0, options.steps, 100)} == {5e-4}
        optimiser = make_optimiser(nn.Linear(2, 2), options)
        decay = {group["weight_decay"] for group in optimiser.param_groups if group["params"]}
        assert (decay, optimiser.defaults["betas"]) == ({0.01}, (0.9, 0.999))

    def test_dino_wm_is_built_as_the_reference(self, told: Told, store: TokenStore) -> None:
        options = told("--preset dino-wm")
        model = build("dino-wm", data_shape(store, options), options.model_options, statistics_of(store, 5))
        assert model.norm.normalized_shape == (store.card.token_dim + 10 + 10,)
        assert (len(model.blocks), model.project_out, isinstance(model.project_in, nn.Identity)) == (6, None, True)
        for block in model.blocks:
            assert (block.heads, block.head_dim, block.mlp[0].out_features, block.dropout) == (16, 64, 2048, 0.1)
            assert (block.qkv.bias is None, block.out.bias is None) == (True, False)
        assert model.position.std().item() == pytest.approx(1, abs=0.1)
        assert (model.tokens_mean.unique().tolist(), model.tokens_std.unique().tolist()) == ([0], [1])

    def test_jepa_wm_conditions_turns_and_looks_two_steps_ahead(self, told: Told) -> None:
        chosen = told("--preset jepa-wm").model_options
        assert (chosen["condition"], chosen["position"], chosen["rollout_loss"]) == ("adaln", "rope", 1.0)

    def test_ddp_wm_is_trained_and_built_as_the_reference(self, told: Told) -> None:
        options = told("--preset ddp-wm")
        assert (options.history, options.frameskip, options.batch, options.epochs) == (3, 5, 64, 10)
        assert (options.stage, options.clip, options.dtype) == ("all", 0.0, "float32")
        assert {learning_rate(step, options) for step in range(0, options.steps, 100)} == {7e-4}
        chosen = options.model_options
        assert (chosen["width"], chosen["locator_width"], chosen["foreground"]) == (0, 192, 32)
        assert (chosen["proprio"], chosen["predict"], chosen["standardise"]) == ("embedding", "frame", False)

    @pytest.mark.parametrize("preset", PRESETS)
    def test_each_of_its_values_arrives_and_nothing_else_changes(self, told: Told, preset: str) -> None:
        names = {"batch-size": "batch", "lr": "learning_rate"}
        values = {names.get(flag, flag.replace("-", "_")): value for flag, value in PRESETS[preset].items()}
        plain = flat(told(f"--model {PRESETS[preset]['model']}"))
        assert flat(told(f"--preset {preset}")) == plain | values

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
    @pytest.mark.parametrize("order", ["--preset dino-wm {}", "{} --preset dino-wm"], ids=["after", "before"])
    def test_what_is_given_beside_it_wins(self, told: Told, order: str, given: str, name: str, value: object) -> None:
        options = flat(told(order.format(given)))
        assert options[name] == value
        assert options["epochs"] == {"steps": None, "epochs": 3}.get(name, 100)

    @pytest.mark.parametrize("preset", PRESETS)
    def test_a_model_is_trained_with_it(self, ddp_store_path: Path, tmp_path: Path, preset: str) -> None:
        line = f"--preset {preset} --cache {{store}} --out {{out}} {TINY} --steps 2"
        if preset == "ddp-wm":  # whose 32 of 196 tokens are too many for a store of four
            line += " --foreground 2"
        for _ in range(2):  # run again, it finds a run with its own settings
            result = run(line, store=ddp_store_path, out=tmp_path / "run")
            assert result.exit_code == 0, result.output
        config = read_config(tmp_path / "run")
        assert config["model"] == PRESETS[preset]["model"]
        assert config["model_options"]["embedding"] == PRESETS[preset]["embedding"]
        model = load_model(tmp_path / "run", torch.device("cpu"))
        tokens, code = model.rollout(torch.rand(1, 1, 4, 32), torch.rand(1, 1, 4), torch.rand(1, 5, 10))
        assert tokens.shape == (1, 5, 4, 32)
        assert code.isfinite().all()

    def test_its_values_are_no_words_that_another_model_could_refuse(self, told: Told) -> None:
        assert told("--preset jepa-wm --model ddp-wm").model_options["mlp"] == 2048

    def test_help_names_them(self) -> None:
        result = run("--help")
        assert result.exit_code == 0
        assert f"--preset [{'|'.join(PRESETS)}]" in result.stdout


class TestModels:
    @pytest.mark.parametrize("model", list(MODELS))
    def test_each_is_told_its_own_options_and_no_others(self, told: Told, model: str) -> None:
        chosen = told(f"--model {model} --dropout 0.25").model_options
        assert read_options(model, chosen) == replace(read_options(model, {}), dropout=0.25)
        assert chosen.keys() == {field.name for field in fields(MODELS.get(model).Options)}

    @pytest.mark.parametrize("stage", ["localization", "primary", "lrm", "all"])
    def test_a_stage_and_where_it_starts_from_arrive(self, told: Told, tmp_path: Path, stage: str) -> None:
        options = told(f"--model ddp-wm --stage {stage}")
        assert (options.stage, options.start) == (stage, None)
        assert told(f"--model ddp-wm --stage {stage} --from {tmp_path}").start == str(tmp_path)

    def test_where_it_starts_from_is_kept_as_it_is_from_everywhere(
        self, told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert told("--model ddp-wm --stage lrm --from runs/a").start == str(tmp_path / "runs" / "a")

    def test_three_stages_are_trained_one_by_one_from_run_to_run(self, ddp_store_path: Path, tmp_path: Path) -> None:
        places = {"store": ddp_store_path, "one": tmp_path / "one", "two": tmp_path / "two"}
        line = f"--model ddp-wm --cache {{store}} {TINY} --width 12 --steps 1"
        for words in ("--out {one} --stage localization", "--out {two} --stage primary --from {one}"):
            result = run(f"{line} {words}", **places)
            assert result.exit_code == 0, result.output
        result = run(f"{line.replace('--steps 1', '--steps 2')} --out {{two}} --stage lrm", **places)
        assert result.exit_code == 0, result.output
        assert read_progress(last_checkpoint(tmp_path / "two")) == Progress(3, "lrm", 1, finished=True)
        assert int(load_model(tmp_path / "two", torch.device("cpu")).stage) == 3


class TestRefusals:
    @pytest.mark.parametrize(
        ("line", "said"),
        [
            ("", "Missing option '--cache'"),
            ("--preset dino-wm", "Missing option '--cache'"),
            ("--preset dreamer", "'dreamer' is not one of 'dino-wm', 'jepa-wm'"),
            ("--cache x --stage dreams", "'dreams' is not one of 'localization', 'primary', 'lrm', 'all'"),
            ("--cache x --steps 3 --epochs 2", "--steps and --epochs"),
            ("explode", "No such command 'explode'"),
            *(
                (f"--cache x {option}", f"'{option.split()[0]}'")
                for option in (
                    "--combine patches",
                    "--condition film",
                    "--proprio xy",
                    "--predict both",
                    "--position sine",
                    "--width -1",
                    "--head-dim -1",
                    "--mlp -1",
                    "--embedding 0",
                    "--rollout-loss -1",
                    "--noise -1",
                    "--epochs 0",
                    "--beta2 1",
                    "--pool 0",
                    "--pool-until 2",
                    "--foreground -1",
                    "--labels words",
                    "--threshold -1",
                    "--locator-width 0",
                    "--locator-depth 0",
                    "--locator-heads 0",
                    "--locator-mlp 0",
                    "--fusion-heads 0",
                    "--correction-heads 0",
                )
            ),
        ],
    )
    def test_words_that_make_no_sense_are_a_matter_of_usage(self, line: str, said: str) -> None:
        result = run(line)
        assert result.exit_code == 2
        assert said in result.stderr.splitlines()[-1]

    @pytest.mark.parametrize(
        ("line", "said"),
        [
            ("--preset dino-wm --proprio raw", "--width 0 has no head for raw proprio"),
            ("--preset dino-wm --head-dim 0", "--width 0 leaves the heads without a size"),
            ("--preset dino-wm --head-dim 63", "size of a head must be even"),
            ("--preset jepa-wm --history 1", "--rollout-loss needs a --history of at least 2"),
            ("--pool 3", "--pool 3 does not divide the grid of 2 x 2 tokens"),
            ("--noise inf", "option noise"),
            ("--model dreamer", "'dreamer'"),
            ("--model ddp-wm --combine tokens", "world model ddp-wm has no option --combine; leave that out"),
            ("--model ddp-wm --noise 0 --rollout-loss 1", "ddp-wm has no option --noise, --rollout-loss"),
            ("--model ddp-wm --position learned", "ddp-wm has no option --position"),
            ("--foreground 2 --locator-width 8", "dino-wm has no option --foreground, --locator-width"),
            ("--preset ddp-wm --model dino-wm --labels pixels", "dino-wm has no option --labels"),
            ("--stage primary", "no stage 'primary'; this model is trained in one go, so leave out --stage"),
            ("--from elsewhere", "goes on from no other run; leave out --from"),
            ("--model ddp-wm", "make them with: wmcache derive change-maps"),
            ("--preset ddp-wm --labels features", "--foreground 32 leaves none of 4 tokens"),
            ("--model ddp-wm --labels features --stage lrm", "stage lrm goes on from a finished primary"),
            ("--model ddp-wm --labels features --stage lrm --from elsewhere", "elsewhere"),
            ("--model ddp-wm --labels features --pool 2", "leave out --pool"),
            (
                "--devices 3 --batch-size 8",
                "--batch-size 8 is cut into equal slices for 3 devices; choose a multiple of 3",
            ),
        ],
    )
    def test_what_does_not_go_together_is_one_line(
        self, store_path: Path, tmp_path: Path, line: str, said: str
    ) -> None:
        result = run(f"--cache {{store}} --out {{out}} {line}", store=store_path, out=tmp_path / "run")
        assert result.exit_code == 1
        assert result.stderr.startswith("Error: ")
        assert len(result.stderr.splitlines()) == 1
        assert said in result.stderr
        assert not (tmp_path / "run").exists()
