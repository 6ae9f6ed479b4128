"""Wrong input that a user is likely to give: one line of error, an exit status, and nothing changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import huggingface_hub.constants
import pytest
import torch

from wmcache.common import space

from .conftest import MODEL, PLAN, STORE, contents, run

Refused = Callable[..., None]
RUN = "{home}/runs/pointmaze-umaze-tcn-64"


@pytest.mark.parametrize(
    ("line", "there"),
    [
        ("wmcache info data/demo/{}", "stores/pointmaze-umaze/tcn-64.zarr"),
        ("wmtrain --cache /no/where/{}", "stores/pointmaze-umaze/tcn-64.zarr"),
        ("wmcache extract --dataset data/demo/{}", "pointmaze-umaze"),
        ("wmplan --run data/demo/{}", "runs/pointmaze-umaze-tcn-64"),
    ],
)
def test_the_same_path_under_home_is_suggested(
    road: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, there: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(line.format(there), road)
    assert result.exit_code == 1
    assert f"{road / there}?" in result.stderr


@pytest.mark.parametrize(
    ("line", "there"),
    [
        ("wmcache info {home}/stores/pointmaze-umaze/tcn-46.zarr", "stores/pointmaze-umaze/tcn-64.zarr"),
        ("wmcache extract --dataset {home}/pointmaze-umase", "pointmaze-umaze"),
        ("wmplan --run {home}/runs/pointmaze-umaze-tcn", "runs/pointmaze-umaze-tcn-64"),
    ],
)
def test_the_nearest_name_is_suggested(road: Path, line: str, there: str) -> None:
    assert f"{road / there}?" in run(line, road).stderr


@pytest.mark.parametrize(
    ("line", "maker"),
    [
        ("wmcache fit --dataset {tmp}/none", "wmcache collect"),
        ("wmcache extract --dataset {tmp}/none", "wmcache collect"),
        ("wmcache bench extract --dataset {tmp}/none", "wmcache collect"),
        ("wmcache bench train --cache {tmp}/none", "wmcache extract"),
        ("wmcache bench codecs {tmp}/none", "wmcache extract"),
        ("wmcache info {tmp}/none", "wmcache extract"),
        ("wmcache verify {tmp}/none", "wmcache extract"),
        ("wmcache verify --deep {tmp}/none", "wmcache extract"),
        ("wmcache repair {tmp}/none", "wmcache extract"),
        ("wmcache preview {tmp}/none", "wmcache extract"),
        ("wmcache rm --yes {tmp}/none", "wmcache ls"),
        ("wmcache rm {tmp}/none", "wmcache ls"),
        ("wmcache ls {tmp}/none", ""),
        ("wmtrain --cache {tmp}/none --out {tmp}/new/run", "wmcache extract"),
        ("wmplan --run {tmp}/none", "wmtrain"),
        ("wmcache bench plan --run {tmp}/none", "wmtrain"),
    ],
)
def test_a_missing_path_is_named_with_the_command_that_makes_it(refused: Refused, line: str, maker: str) -> None:
    refused(line, "{tmp}/none", maker)


@pytest.mark.parametrize(
    "line",
    [
        "wmcache extract --dataset {home}/stores/pointmaze-umaze/tcn-64.zarr",
        "wmcache extract --dataset {home}/pointmaze-umaze/dataset.json",
        "wmcache extract --out {home}/pointmaze-umaze --device cpu",
        "wmcache info {home}/pointmaze-umaze",
        "wmcache verify {home}/pointmaze-umaze",
        "wmcache verify --deep {home}/runs/pointmaze-umaze-tcn-64",
        "wmcache repair {home}/pointmaze-umaze/dataset.json",
        "wmcache preview {home}/pointmaze-umaze",
        "wmcache preview {home}/stores/pointmaze-umaze/tcn-64.zarr --dataset {home}/stores",
        "wmcache rm --yes {home}/pointmaze-umaze",
        "wmcache rm --yes {home}/pointmaze-umaze/dataset.json",
        "wmcache rm --yes {home}/stores",
        "wmcache rm --yes {home}/runs/pointmaze-umaze-tcn-64",
        "wmcache rm --yes {home}/stores/pointmaze-umaze/tcn-64.zarr/tokens",
        "wmtrain --cache {home}/pointmaze-umaze",
        "wmtrain --cache {home}/stores/pointmaze-umaze/tcn-64.zarr/tokens",
        "wmplan --run {home}/stores/pointmaze-umaze/tcn-64.zarr",
        "wmplan --run {home}/pointmaze-umaze/dataset.json",
    ],
)
def test_a_folder_of_another_kind(refused: Refused, line: str) -> None:
    refused(line, "{home}")


@pytest.mark.parametrize(
    ("line", "file"),
    [
        ("wmcache extract --dataset {folder}", "dataset.json"),
        ("wmtrain --cache {folder}", "zarr.json"),
        ("wmplan --run {folder}", "config.json"),
    ],
)
def test_json_of_another_program(refused: Refused, tmp_path: Path, line: str, file: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / file).write_text('{"attributes": {}, "node_type": "group"}')
    refused(line, "{folder}", folder=folder)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("wmcache extract --encoder clip", ["clip"]),
        ("wmcache extract --encoder dinov22", ["dinov22", "dinov2"]),
        ("wmcache bench extract --encoder clip", ["clip"]),
        ("wmcache fit --encoder dinov2", ["timm/vit_small_patch14_dinov2", "tcn"]),
        ("wmcache collect --policy clever --out {tmp}/new", ["clever", "random", "held"]),
        ("wmcache collect --out {tmp}/new --env Spiral", ["--env", "UMaze", "Large"]),
        ("wmcache collect --out {tmp}/new --env spiral.txt", ["UMaze", "Large"]),
        (f"wmplan --run {RUN} --env wmcache/PointMaze-Spiral-v0", ["UMaze", "Large"]),
        ("wmcache extract --image-size 65", ["--image-size 65", "32"]),
        ("wmcache extract --encoder dinov2 --image-size 200", ["--image-size 200", "14"]),
        ("wmcache extract --image-size 96", ["96 px"]),
        (
            "wmcache collect --length 40 --image-size 32 --frames-per-shard 64 --cluster local:1 --episodes 7",
            ["6", "7"],
        ),
        ("wmcache extract --normalisation imagenet --device cpu", ["normalisation: "]),
        ("wmcache fit --steps 6 --batch-size 16 --device cpu", ["--out"]),
        ("wmcache fit --steps 1 --batch-size 100000 --device cpu --out {tmp}/new.safetensors", ["--batch-size"]),
        ("wmcache fit --steps 1 --device abacus --out {tmp}/new.safetensors", ["abacus"]),
        (f"wmtrain --cache {STORE} --out {{tmp}}/run --history 12", ["longer episodes"]),
        (f"wmtrain --cache {STORE} --out {{tmp}}/run --frameskip 11", ["longer episodes"]),
        (f"wmtrain --cache {STORE} --out {{tmp}}/run --steps 1 {MODEL} --heads 3", ["--heads 3"]),
        (f"wmtrain --cache {STORE} --out {{tmp}}/run --steps 1 {MODEL} --device abacus", ["abacus"]),
        (f"wmplan --run {RUN} --out {{tmp}}/plan {PLAN} --temperature 1", ["cem", "--temperature", "mppi"]),
    ],
)
def test_options_that_do_not_fit(refused: Refused, line: str, named: list[str]) -> None:
    refused(line, *named)


def test_an_encoder_that_is_not_fitted_yet(road: Path, tmp_path: Path) -> None:
    line = "wmcache extract --dataset {data} --out {out}"
    result = run(line, tmp_path, data=road / "pointmaze-umaze", out=tmp_path)
    assert len(result.stderr.splitlines()) == 1
    assert all(word in result.stderr for word in ("Error: ", "--weights", "wmcache fit --encoder tcn", "--dataset"))


def test_a_hub_that_cannot_be_reached(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # HF_HUB_OFFLINE and HF_HOME are read once, at import; a process of its own would cost nine seconds.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    refused("wmcache extract --encoder dinov2 --device cpu", "--weights", "--encoder tcn")


@pytest.mark.parametrize(
    ("encoder", "weights", "named"),
    [
        ("tcn", "{home}/runs/pointmaze-umaze-tcn-64/checkpoints/last/model.safetensors", "tcn"),
        ("tcn", "{tmp}/garbage.safetensors", "tcn"),
        ("tcn", "{tmp}/none.safetensors", ".safetensors"),
        ("tcn", "{tmp}/pickle.pth", ".safetensors"),
        ("dinov2", "{home}/encoders/pointmaze-umaze-tcn.safetensors", "vit_small_patch14_dinov2"),
    ],
)
def test_weights_of_another_kind(refused: Refused, tmp_path: Path, encoder: str, weights: str, named: str) -> None:
    (tmp_path / "garbage.safetensors").write_bytes(b"garbage" * 100)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "pickle.pth")
    line = f"wmcache extract --encoder {encoder} --device cpu --weights {weights} --out {{tmp}}/new.zarr"
    refused(line, Path(weights).name, named)


@pytest.mark.parametrize(
    "line",
    [
        "wmcache collect --episodes 0",
        "wmcache collect --seed -1",
        "wmcache fit --steps 0",
        "wmcache fit --lr -1",
        "wmcache extract --store-dtype float64",
        "wmcache preview x --count 0",
        "wmcache preview",
        "wmcache rm",
        "wmcache bench read --frames 10",
        "wmcache bench train",
        "wmcache bench plan",
        "wmcache explode",
        "wmtrain --cache x --residence attic",
        "wmtrain --cache x --dropout 1",
        "wmtrain --cache x --dtype float8",
        "wmtrain",
        "wmplan",
        "wmplan --run x --objective first",
        "wmplan --run x --sigma nan",
    ],
)
def test_bad_usage_has_exit_status_2(tmp_path: Path, line: str) -> None:
    result = run(line, tmp_path)
    assert result.exit_code == 2
    assert [error for error in result.stderr.splitlines() if "Error" in error] == result.stderr.splitlines()[-1:]
    assert list(tmp_path.iterdir()) == []


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


def test_one_episode_is_too_few_to_train_on(road: Path, tmp_path: Path) -> None:
    lines = (
        "wmcache collect --episodes 1 --length 40 --image-size 32 --cluster local:1 --out {tmp}/one",
        "wmcache extract --dataset {tmp}/one --weights {weights} --device cpu --out {tmp}/one.zarr",
        "wmtrain --cache {tmp}/one.zarr --out {tmp}/run",
    )
    weights = road / "encoders" / "pointmaze-umaze-tcn.safetensors"
    *_, result = [run(line, road, tmp=tmp_path, weights=weights) for line in lines]
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_the_run_of_another_store(refused: Refused, road: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.zarr"
    assert run("wmcache extract --normalisation imagenet --device cpu --out {out}", road, out=other).exit_code == 0
    refused(f"wmtrain --cache {{other}} --out {RUN} --steps 4 {MODEL}", "identity", other=other)
    refused(f"wmplan --run {RUN} --cache {{other}} {PLAN}", "normalisation: ", "--cache", other=other)


def test_a_run_without_a_checkpoint(refused: Refused, road: Path, tmp_path: Path) -> None:
    copytree(road / "runs" / "pointmaze-umaze-tcn-64", tmp_path / "run", ignore=lambda *_: ["checkpoints"])
    refused("wmplan --run {tmp}/run", "{tmp}/run")
