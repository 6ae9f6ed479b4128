"""wmtrain's words: presets and what is given beside them, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn
from wmcache.cache import TokenStore
from wmcache.cli import wmtrain
from wmcache.trainer import loop
from wmcache.trainer.checkpoint import load_model, read_config
from wmcache.trainer.loop import TrainOptions, data_shape, learning_rate, make_optimiser, statistics_of
from wmcache.trainer.models import build
from wmcache.trainer.presets import PRESETS

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
        assert model.width == store.card.token_dim + 10 + 10
        assert (len(model.blocks), model.project_out, isinstance(model.project_in, nn.Identity)) == (6, None, True)
        for block in model.blocks:
            assert (block.heads, block.head_dim, block.mlp[0].out_features, block.dropout) == (16, 64, 2048, 0.1)
            assert (block.qkv.bias is None, block.out.bias is None) == (True, False)
        assert model.position.std().item() == pytest.approx(1, abs=0.1)
        assert (model.tokens_mean.unique().tolist(), model.tokens_std.unique().tolist()) == ([0], [1])

    def test_jepa_wm_conditions_turns_and_looks_two_steps_ahead(self, told: Told) -> None:
        chosen = told("--preset jepa-wm").model_options
        assert (chosen["condition"], chosen["position"], chosen["rollout_loss"]) == ("adaln", "rope", 1.0)

    @pytest.mark.parametrize("preset", PRESETS)
    def test_each_of_its_values_arrives_and_nothing_else_changes(self, told: Told, preset: str) -> None:
        names = {"batch-size": "batch", "lr": "learning_rate"}
        values = {names.get(flag, flag.replace("-", "_")): value for flag, value in PRESETS[preset].items()}
        assert flat(told(f"--preset {preset}")) == flat(told("")) | values

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
    def test_a_model_is_trained_with_it(self, store_path: Path, tmp_path: Path, preset: str) -> None:
        line = f"--preset {preset} --cache {{store}} --out {{out}} {TINY} --steps 2"
        for _ in range(2):  # run again, it finds a run with its own settings
            result = run(line, store=store_path, out=tmp_path / "run")
            assert result.exit_code == 0, result.output
        config = read_config(tmp_path / "run")
        assert config["model_options"]["position"] == PRESETS[preset]["position"]
        model = load_model(tmp_path / "run", torch.device("cpu"))
        tokens, code = model.rollout(torch.rand(1, 1, 4, 32), torch.rand(1, 1, 4), torch.rand(1, 5, 10))
        assert tokens.shape == (1, 5, 4, 32)
        assert code.isfinite().all()

    def test_help_names_them(self) -> None:
        result = run("--help")
        assert result.exit_code == 0
        assert f"--preset [{'|'.join(PRESETS)}]" in result.stdout


class TestRefusals:
    @pytest.mark.parametrize(
        ("line", "said"),
        [
            ("", "Missing option '--cache'"),
            ("--preset dino-wm", "Missing option '--cache'"),
            ("--preset dreamer", "'dreamer' is not one of 'dino-wm', 'jepa-wm'"),
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
