"""wmtrain on the command line: presets and the options beside them, the options of each model, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from wmcache.common.options import declared
from wmcache.trainer.models import MODELS, WorldModel, read_options, rollout
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.presets import PRESETS
from wmcache.trainer.runs import load_trained, read_config

from .conftest import flat, parser, run, succeed

TINY = "--depth 1 --heads 2 --head-dim 4 --mlp 8"
SMALL = {
    "dino-wm": TINY,
    "ddp-wm": TINY,
    "mdn-rnn": "--hidden 8 --latents mean --frameskip 5",  # the store has no log-variances
    "rssm": "--deter 16 --hidden 8 --sequence 4 --frameskip 5",
    "diswm": "--deter 16 --hidden 8 --sequence 4 --frameskip 5",
    "rwm": "--hidden 8 --observed-steps 3 --forecast 2 --frameskip 5",
    "vjepa2-ac": "--width 16 --depth 1 --heads 2 --mlp 8",
    "iris": "--width 16 --depth 1 --heads 2 --vocabulary 8 --code-dim 4 --channels 8 --history 3 --frameskip 5",
    "td-mpc2": "--latent 16 --hidden 8",
    "avdc": "--width 16 --depth 1 --heads 2",
    "avdc-plan": "--width 8 --depth 1 --video-width 16 --video-depth 1 --video-heads 2",
}
"""Options that fit a store of four tokens, and episodes of 60 frames."""
Parse = Callable[[str], TrainOptions]


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Parse:
    return parser(monkeypatch, "wmcache.trainer.train.train", TrainOptions, "wmtrain --cache x.zarr")


class TestPresets:
    @pytest.mark.parametrize("preset", PRESETS)
    def test_every_value_arrives_and_no_other_changes(self, parse: Parse, preset: str) -> None:
        names = {"batch-size": "batch", "lr": "learning_rate"}
        values = {names.get(flag, flag.replace("-", "_")): value for flag, value in PRESETS[preset].items()}
        plain = flat(parse(f"--model {PRESETS[preset]['model']}"), "model_options")
        assert flat(parse(f"--preset {preset}"), "model_options") == plain | values

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
        options = flat(parse(order.format(given)), "model_options")
        assert options[name] == value
        assert options["epochs"] == {"steps": None, "epochs": 3}.get(name, 100)

    @pytest.mark.parametrize("preset", PRESETS)
    def test_a_model_is_trained_with_it_and_found_again(
        self, ddp_store_path: Path, tmp_path: Path, preset: str
    ) -> None:
        if preset.startswith("avdc"):
            pytest.importorskip("diffusers")
        small = SMALL[PRESETS[preset]["model"]]
        line = (
            f"wmtrain --preset {preset} --cache {{store}} --out {{out}} --batch-size 8 --device cpu --steps 2 {small}"
        )
        if "foreground" in PRESETS[preset]:  # 32 tokens are too many for a store of four
            line += " --foreground 2"
        for _ in range(2):
            succeed(line, store=ddp_store_path, out=tmp_path / "run")
        config = read_config(tmp_path / "run")
        assert config["model"] == PRESETS[preset]["model"]
        for name in ("embedding", "mixtures"):
            assert config["model_options"].get(name) == PRESETS[preset].get(name)
        model = load_trained(tmp_path / "run", torch.device("cpu"))
        if not isinstance(model, WorldModel):
            return
        imagined = rollout(model, torch.rand(1, 1, 4, 32), torch.rand(1, 1, 4), torch.rand(1, 5, 10))
        assert imagined.latents.shape == (1, 1, 5, 4, 32)
        assert imagined.proprio.isfinite().all()

    def test_world_models_is_trained_on_what_extract_makes_of_its_encoder(
        self, dataset_path: Path, tmp_path: Path
    ) -> None:
        weights = "--dataset {frames} --device cpu --encoder vae"
        succeed(f"wmcache fit {weights} --steps 1 --batch-size 8", tmp_path, frames=dataset_path)
        succeed(
            f"wmcache extract {weights} --store-dtype int8 --out {{out}}",
            tmp_path,
            frames=dataset_path,
            out=tmp_path / "vae.zarr",
        )
        small = "--steps 2 --batch-size 4 --hidden 8 --device cpu"
        line = f"wmtrain --preset world-models-car --cache {{store}} --out {{out}} {small}"
        succeed(line, tmp_path, store=tmp_path / "vae.zarr", out=tmp_path / "run")
        options = read_config(tmp_path / "run")["model_options"]
        assert (options["latents"], options["sequences"], options["sequence"]) == ("drawn", "episodes", 1000)

    def test_options_of_another_model_in_it_are_left_out(self, parse: Parse) -> None:
        chosen = parse("--preset jepa-wm --model ddp-wm").model_options
        assert chosen["mlp"] == PRESETS["jepa-wm"]["mlp"]
        assert "condition" not in chosen


class TestModels:
    @pytest.mark.parametrize("model", list(MODELS))
    def test_a_model_receives_its_own_options_and_no_others(self, parse: Parse, model: str) -> None:
        for line in (f"--model {model} --proprio none", f"--proprio none --model={model}"):
            chosen = parse(line).model_options
            assert read_options(model, chosen) == replace(read_options(model, {}), proprio="none")
            assert chosen.keys() == {field.name for field in fields(MODELS.get(model).Options)}

    @pytest.mark.parametrize("model", list(MODELS))
    def test_help_has_its_options_and_no_others(self, model: str) -> None:
        text = run(f"wmtrain --model {model} --help").stdout
        flags = {
            name: {f"{known.flag.partition('/')[0]} " for known in declared(MODELS.get(name).Options)}
            for name in MODELS
        }
        assert {flag for flag in set().union(*flags.values()) if flag in text} == flags[model]
        assert f"--preset [{'|'.join(PRESETS)}]" in text
        assert ",".join(MODELS) in "".join(text.split())  # lines break at spaces and hyphens
        assert all(f"{heading}:\n" in text for heading in ("Run", "Data", "Training", "Options"))

    @pytest.mark.parametrize("stage", ["localization", "primary", "lrm", "all"])
    def test_stage_and_start_arrive(
        self, parse: Parse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
    ) -> None:
        options = parse(f"--model ddp-wm --stage {stage}")
        assert (options.stage, options.start) == (stage, None)
        # Absolute, because a run is resumed from any working directory.
        monkeypatch.chdir(tmp_path)
        assert parse(f"--model ddp-wm --stage {stage} --from runs/a").start == str(tmp_path / "runs" / "a")
