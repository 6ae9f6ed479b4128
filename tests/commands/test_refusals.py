"""Wrong input that a user is likely to give: one line of error, an exit status, and nothing changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
import torch

from wmcache.common import space
from wmcache.planner.protocols import PROTOCOLS

from .conftest import MODEL, PLAN, RUN, STORE, contents, run, succeed

Refused = Callable[..., None]
TCN = "{home}/encoders/pointmaze-umaze-tcn.safetensors"
TRAIN = f"wmtrain --cache {STORE} --out {{tmp}}/run --device cpu"
QUICK = f"wmplan --run {RUN} --out {{tmp}}/plan {PLAN}"


@pytest.mark.parametrize(
    ("line", "there"),
    [
        ("wmcache info data/demo/{}", "stores/pointmaze-umaze/tcn-64.zarr"),
        ("wmcache extract --dataset data/demo/{}", "pointmaze-umaze"),
        ("wmplan --run data/demo/{}", "runs/pointmaze-umaze-tcn-64"),
        ("wmcache info {{home}}/stores/pointmaze-umaze/tcn-46.zarr", "stores/pointmaze-umaze/tcn-64.zarr"),
    ],
)
def test_the_same_path_under_home_or_the_nearest_name_is_suggested(refused: Refused, line: str, there: str) -> None:
    refused(line.format(there), f"{{home}}/{there}?")


@pytest.mark.parametrize(
    ("line", "maker"),
    [
        ("wmcache extract --dataset {tmp}/none", "wmcache collect"),
        ("wmcache info {tmp}/none", "wmcache extract"),
        ("wmcache verify {tmp}/none", "wmcache extract"),
        ("wmcache verify --deep {tmp}/none", "wmcache extract"),
        ("wmcache repair {tmp}/none", "wmcache extract"),
        ("wmcache rm --yes {tmp}/none", "wmcache ls"),
        ("wmcache derive {tmp}/none --encoder tcn", ""),
        ("wmcache derive change-maps {tmp}/none", ""),
        ("wmcache finalize {tmp}/none", ""),
        ("wmcache ls {tmp}/none", ""),
        ("wmtrain --cache {tmp}/none --out {tmp}/new/run", "wmcache extract"),
        ("wmplan --run {tmp}/none", "wmtrain"),
    ],
)
def test_a_missing_path_is_named_with_the_command_that_makes_it(refused: Refused, line: str, maker: str) -> None:
    refused(line, "{tmp}/none", maker)


@pytest.mark.parametrize(
    "line",
    [
        "wmcache extract --dataset {home}/stores/pointmaze-umaze/tcn-64.zarr",
        "wmcache extract --out {home}/pointmaze-umaze --device cpu",
        "wmcache info {home}/pointmaze-umaze",
        "wmcache verify --deep {home}/runs/pointmaze-umaze-tcn-64",
        "wmcache preview {home}/stores/pointmaze-umaze/tcn-64.zarr --dataset {home}/stores",
        "wmcache rm --yes {home}/stores/pointmaze-umaze/tcn-64.zarr/tokens",
        "wmtrain --cache {home}/pointmaze-umaze",
        "wmplan --run {home}/stores/pointmaze-umaze/tcn-64.zarr",
    ],
)
def test_a_folder_of_another_kind(refused: Refused, line: str) -> None:
    refused(line, "{home}")


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("wmcache extract --encoder dinov22", ["dinov22", "dinov2"]),
        ("wmcache extract --encoder pixels,pixels", ["--encoder pixels,pixels"]),
        ("wmcache extract --encoder tcn,vae --weights {tmp}/x", ["--weights NAME={tmp}/x"]),
        (f"wmcache extract --encoder tcn --weights tnc={TCN}", ["tnc="]),
        (f"wmcache extract --encoder tcn,pixels --weights tcn={TCN} --weights tcn={TCN}", ["--weights tcn="]),
        (f"wmcache extract --encoder pixels,tcn --base-weights {TCN}", ["--base-weights"]),
        ("wmcache extract --encoder pixels --lag 5", ["--lag"]),
        ("wmcache extract --encoder vae", ["wmcache fit --encoder vae"]),
        ("wmcache extract --encoder random-vit-layers --change-maps", ["1 x 17"]),
        ("wmcache extract --image-size 65", ["--image-size 65", "32"]),
        ("wmcache extract --image-size 96", ["96 px"]),
        ("wmcache extract --normalisation imagenet --device cpu", ["normalisation: "]),
        *((f"wmcache extract --shard-slice {value}", ["--array=0-7"]) for value in ("1", "-1/4", "0/0", "4/4")),
        ("wmcache extract --cluster slurm:nowhere", ["nowhere.toml"]),
        ("wmcache collect --cluster lokal", ["'lokal'"]),
        ("wmcache bench cluster --encoder pixels", ["local:N"]),
        ("wmcache fit --encoder dinov2", ["timm/vit_small_patch14_dinov2", "tcn"]),
        ("wmcache fit --encoder tcn --codes 5", ["--codes"]),
        (f"wmcache fit --encoder tcn --cache {STORE}", ["--cache and --base"]),
        (f"wmcache fit --encoder dino-tok --batch-size 8 --cache {STORE}", ["dinov2-layers"]),
        (f"wmcache fit --encoder dino-tok --cache {STORE} --decoder pixels --dataset {STORE}", [STORE]),
        ("wmcache fit --steps 6 --batch-size 16 --device cpu", ["--out"]),
        ("wmcache fit --steps 1 --batch-size 100000 --device cpu --out {tmp}/new.safetensors", ["--batch-size"]),
        (f"wmcache derive {STORE} --encoder dinov2-cls", ["dinov2-cls"]),
        (f"wmcache derive {STORE} --encoder tcn --base-weights {TCN}", ["--base-weights"]),
        (f"wmcache derive change-maps {STORE} --dataset nowhere", ["--dataset"]),
        ("wmcache collect --policy clever --out {tmp}/new", ["clever", "random", "held"]),
        ("wmcache collect --out {tmp}/new --env Spiral", ["--env", "UMaze", "Large", ".txt", "wmcache import frames"]),
        ("wmcache plan-job --frames 1e5 --encoder dinov3", ["--frames-per-second"]),
        (f"wmcache bench plan --model {RUN} --model {RUN}", ["--model"]),
        ("wmcache collect --length 40 --image-size 32 --frames-per-shard 64 --episodes 7", ["6", "7"]),
    ],
)
def test_options_that_do_not_fit(refused: Refused, line: str, named: list[str]) -> None:
    refused(line, *named)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--history 12", ["longer episodes"]),
        ("--width 16 --heads 3", ["--heads 3"]),
        *((f"--device {name}", [name]) for name in ("abacus", "cuda:99", "cpu:x")),
        ("--preset dino-wm --proprio raw", ["--width 0", "--proprio"]),
        ("--preset dino-wm --head-dim 0", ["--width 0", "--head-dim"]),
        ("--preset jepa-wm --history 1", ["--rollout-loss", "--history"]),
        ("--pool 3", ["--pool 3", "2 x 2"]),
        ("--model dreamer", ["dreamer", "dino-wm"]),
        ("--model ddp-wm --combine tokens", ["ddp-wm", "--combine", "dino-wm"]),
        ("--preset ddp-wm --model dino-wm --labels pixels", ["dino-wm", "--labels", "ddp-wm"]),
        ("--stage primary", ["primary", "--stage"]),
        ("--from elsewhere", ["--from"]),
        ("--model ddp-wm", ["wmcache derive change-maps"]),
        ("--preset ddp-wm --labels features", ["--foreground 32", "4 tokens"]),
        ("--model ddp-wm --labels features --stage lrm", ["lrm", "primary"]),
        ("--model ddp-wm --labels features --stage lrm --from elsewhere", ["elsewhere"]),
        ("--model ddp-wm --labels features --pool 2", ["--pool"]),
        ("--devices 3 --batch-size 8", ["--batch-size 8", "3"]),
    ],
)
def test_options_of_a_training_that_do_not_fit(refused: Refused, flags: str, named: list[str]) -> None:
    refused(f"{TRAIN} {flags}", *named)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--goals random-stat", ["random-state", "dataset", "random-action"]),
        ("--goals dataset --goal-steps 5", ["--goal-steps", "--no-strict"]),
        ("--threshold 9", ["--no-strict"]),
        ("--proprio none", ["wmtrain --proprio none"]),
        ("--observed 2", ["--context"]),
        ("--solver guess", ["guess", "cem", "icem", "mppi", "gd"]),
        ("--temperature 1", ["cem", "--temperature", "mppi"]),
        ("--elites 9", ["9", "8"]),
        ("--execute 3", ["--execute 3", "--horizon"]),
        ("--mask --distance graph", ["--mask", "--distance graph"]),
        ("--keep 0.5 --distance graph", ["--keep 0.5", "--distance graph"]),
    ],
)
def test_options_of_a_plan_that_do_not_fit(refused: Refused, flags: str, named: list[str]) -> None:
    refused(f"{QUICK} {flags}", *named)


@pytest.mark.parametrize(
    ("encoder", "weights", "named"),
    [
        ("tcn", "{home}/runs/pointmaze-umaze-tcn-64/checkpoints/last/model.safetensors", "tcn"),
        ("tcn", "{tmp}/garbage.safetensors", "tcn"),
        ("tcn", "{tmp}/none.safetensors", ".safetensors"),
        ("tcn", "{tmp}/pickle.pth", ".safetensors"),
        ("dinov2", TCN, "vit_small_patch14_dinov2"),
    ],
)
def test_weights_of_another_kind(refused: Refused, tmp_path: Path, encoder: str, weights: str, named: str) -> None:
    (tmp_path / "garbage.safetensors").write_bytes(b"garbage" * 100)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "pickle.pth")
    line = f"wmcache extract --encoder {encoder} --device cpu --weights {weights} --out {{tmp}}/new.zarr"
    refused(line, Path(weights).name, named)


USAGE = {
    "wmcache collect": ("--episodes 0", "--seed -1"),
    "wmcache fit": (
        *("--steps 0", "--lr -1", "--lr inf", "--batch-size 1", "--encoder vae --beta -1", "--encoder pca --dim 0"),
        *("--encoder dino-tok --shallow 1", "--encoder dino-tok-vq --variance 1.5", "--encoder vfm-vae --kl -1"),
    ),
    "wmcache extract": ("--store-dtype float64", "--lag 0"),
    "wmcache preview x": ("--count 0",),
    "wmcache bench read": ("--frames 10",),
    "wmcache plan-job": ("--frames 1e16", "--frames 0.5", "--frames nan", "--frames inf", "--frames many"),
    "wmtrain --cache x": (
        *("--residence attic", "--dropout 1", "--dtype float8", "--combine patches", "--width -1", "--noise inf"),
        *("--lr 0", "--lr nan", "--no-such-option 1", "--preset dinowm"),
    ),
    "wmtrain --cache x --model ddp-wm": ("--foreground -1", "--labels words", "--locator-width 0"),
    f"wmplan --run {RUN}": (
        *("--objective first", "--sigma nan", "--alpha -1", "--threshold nan", "--elites 1", "--protocol dreamer"),
    ),
}
"""Command -> options with a value that is outside their range or choice."""


@pytest.mark.parametrize(
    ("line", "named"),
    [
        *((f"{command} {flag}", flag.split()[-2]) for command, flags in USAGE.items() for flag in flags),
        ("wmcache preview", "STORE"),
        ("wmcache bench train", "--cache"),
        ("wmcache explode", "explode"),
        ("wmtrain", "--cache"),
        (f"wmcache bench plan --run {RUN} --model {RUN}", "--model"),
        ("wmtrain --cache x --steps 3 --epochs 2", "--steps and --epochs"),
        ("wmplan", "--run"),
        *((f"wmplan --run {RUN} --protocol dreamer", name) for name in PROTOCOLS),
    ],
)
def test_bad_usage_has_exit_status_2(refused: Refused, line: str, named: str) -> None:
    refused(line, named, status=2)


@pytest.mark.parametrize(
    "line",
    [
        "wmcache collect --episodes 2 --length 4 --image-size 32 --cluster local:1 --out {out}",
        "wmcache fit --steps 1 --batch-size 16 --device cpu --out {out}",
        "wmcache extract --device cpu --out {out}",
        f"wmtrain --cache {STORE} --steps 1 {MODEL} --out {{out}}",
        f"wmplan --run {RUN} {PLAN} --out {{out}}",
    ],
    ids=["collect", "fit", "extract", "wmtrain", "wmplan"],
)
@pytest.mark.parametrize("path", ["{tmp}/file", "{tmp}/file/below", "/proc/wmcache/below"])
def test_a_path_that_cannot_be_written(road: Path, tmp_path: Path, line: str, path: str) -> None:
    (tmp_path / "file").write_text("precious")
    before = contents(road, tmp_path)
    result = run(line, road, out=path.format(tmp=tmp_path))
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    error = result.stderr.splitlines()[-1]  # below progress bars of earlier work
    assert error.startswith("Error: ")
    # The folder that cannot be written, and not a temporary name that the user never gave.
    assert str(tmp_path / "file") in error or "/proc/wmcache" in error
    assert ".tmp" not in error
    assert contents(road, tmp_path) == before


@pytest.mark.parametrize(
    "line", ["wmcache collect --episodes 2000 --out {tmp}/new", "wmcache extract --device cpu --out {tmp}/new.zarr"]
)
def test_a_disk_that_is_too_small(refused: Refused, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    monkeypatch.setattr(space, "free_space", lambda path: 1000)
    refused(line, "1.0 kB", "{tmp}/new")


def test_the_run_of_another_store(refused: Refused, road: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.zarr"
    succeed("wmcache extract --normalisation imagenet --device cpu --out {out}", road, out=other)
    refused(f"wmtrain --cache {{other}} --out {RUN} --steps 4 {MODEL}", "identity", other=other)
    refused(f"wmplan --run {RUN} --cache {{other}} {PLAN}", "normalisation: ", "--cache", other=other)


def test_a_run_without_a_checkpoint(refused: Refused, road: Path, tmp_path: Path) -> None:
    copytree(road / "runs" / "pointmaze-umaze-tcn-64", tmp_path / "run", ignore=lambda *_: ["checkpoints"])
    refused("wmplan --run {tmp}/run", "{tmp}/run")
