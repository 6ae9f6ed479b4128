"""--cluster with a running scheduler, which is in this process, and with slices."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from distributed import LocalCluster

from wmcache.cache import TokenStore
from wmcache.cli import main
from wmcache.planner.context import EvalContext
from wmcache.planner.evaluate import evaluate
from wmcache.planner.options import PlanOptions
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.train import train


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    """Address of a scheduler with one worker of two threads."""
    with LocalCluster(
        n_workers=1,
        threads_per_worker=2,
        processes=False,
        protocol="tcp://",
        dashboard_address=None,
        scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},
    ) as running:
        yield running.scheduler_address


@pytest.fixture
def home(tmp_path: Path, dataset_path: Path, tcn_weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a relative path, with the frames and the weights of tcn."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WMCACHE_HOME", "home")
    shutil.copytree(dataset_path, tmp_path / "home/pointmaze-umaze")
    (tmp_path / "home/encoders").mkdir()
    shutil.copy(tcn_weights, tmp_path / "home/encoders/pointmaze-umaze-tcn.safetensors")
    return tmp_path / "home"


def run(line: str, **places: object) -> Result:
    return CliRunner().invoke(main, [word.format(**places) for word in line.split()])


def tokens(store: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (store / "tokens").glob("c.*")}


def test_frames_are_collected(scheduler: str, dataset_path: Path, tmp_path: Path) -> None:
    line = "collect --episodes 6 --length 60 --image-size 32 --frames-per-shard 64 --cluster {scheduler} --out {out}"
    result = run(line, scheduler=scheduler, out=tmp_path / "pointmaze-umaze")
    assert result.exit_code == 0, result.output
    for file in dataset_path.iterdir():
        assert (tmp_path / "pointmaze-umaze" / file.name).read_bytes() == file.read_bytes()


def test_stores_are_extracted_and_derived_and_weights_fitted(scheduler: str, home: Path, store_path: Path) -> None:
    for line in (
        "extract --encoder tcn,tcn-layers --device cpu --dtype float32 --cluster {scheduler}",
        "fit --encoder dino-tok --base tcn-layers --steps 2 --batch-size 8 --shallow 4 --device cpu --cluster {scheduler}",
        "derive home/stores/pointmaze-umaze/tcn-layers-64.zarr --encoder dino-tok --device cpu --cluster {scheduler}",
    ):
        result = run(line, scheduler=scheduler)
        assert result.exit_code == 0, result.output
    stores = home / "stores/pointmaze-umaze"
    assert tokens(stores / "tcn-64.zarr") == tokens(store_path)
    assert TokenStore.open(stores / "dino-tok-64.zarr").complete
    assert "home/encoders/pointmaze-umaze-dino-tok.safetensors: fitted on" in run("fit --encoder dino-tok --cache "
        "home/stores/pointmaze-umaze/tcn-layers-64.zarr --steps 2 --batch-size 8 --shallow 4 --device cpu").output  # fmt: skip


def test_weights_that_were_fitted_again_are_loaded_again(scheduler: str, home: Path) -> None:
    line = "extract --device cpu --cluster {scheduler} --out {out}"
    fit = "fit --steps 3 --batch-size 16 --seed 5 --overwrite --device cpu"
    for place, after in (("one.zarr", fit), ("two.zarr", fit)):
        result = run(line, scheduler=scheduler, out=place)
        assert result.exit_code == 0, result.output
        assert run(after).exit_code == 0
    one, two = (TokenStore.open(home.parent / name) for name in ("one.zarr", "two.zarr"))
    assert one.identity.weights_sha256 != two.identity.weights_sha256
    assert tokens(one.path) != tokens(two.path)


def test_plans_are_the_same_wherever_they_are_made(
    scheduler: str,
    store_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = {"width": 16, "depth": 1, "heads": 2, "dropout": 0.0}
    train(store_path, Path("run"), TrainOptions(model_options=sizes, steps=4, batch=8, dtype="float32", device="cpu"))
    search = {"samples": 6, "elites": 2, "iterations": 1}
    options = PlanOptions(episodes=5, batch=2, budget=10, horizon=2, search=search, device="cpu")
    setting = EvalContext(Path("run"), options)
    here, results = evaluate(setting, options, Path("here"))
    for name in ("local:2", scheduler):
        out = Path(name.replace("/", ""))
        there, found = evaluate(setting, options, out, name)
        for part in ("start", "goal", "states"):
            np.testing.assert_array_equal(getattr(there, part), getattr(here, part))
        assert {**found, "seconds_per_replan": 0} == {**results, "seconds_per_replan": 0}
    # Only the missing batch is planned again, and it is fewer than the workers.
    next(out.glob("unfinished-*/000002.npz")).unlink()
    evaluate(setting, options, out, "local:2")
    assert "wmplan: 1 batches for 2 workers; a smaller --batch-size makes more of them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("extract --shard-slice 4/4", "--array=0-3"),
        ("extract --shard-slice 1", "0/8"),
        ("extract --shard-slice -1/4", "0/8"),
        ("extract --shard-slice 0/0", "0/8"),
        ("extract --cluster local:0", "'local:0'"),
        ("collect --cluster lokal", "'lokal'"),
        ("extract --cluster slurm:nowhere", "nowhere.toml"),
        ("study --cluster tcp://host", "'tcp://host'"),
        ("bench cluster --encoder pixels", "choose local:N with N above 1"),
        ("finalize nowhere.zarr", "nowhere.zarr"),
    ],
)
def test_invalid_values_are_one_line_of_error(home: Path, line: str, hint: str) -> None:
    before = sorted(home.rglob("*"))
    result = run(line)
    assert result.exit_code == 1
    (error,) = result.stderr.splitlines()
    assert hint in error
    assert sorted(home.rglob("*")) == before


def test_slices_in_any_order_make_the_store_and_report_missing_shards(home: Path) -> None:
    stores = [home / "stores/pointmaze-umaze" / name for name in ("pixels-32.zarr", "tcn-64.zarr")]
    for part in ("2/3", "0/3"):
        result = run(f"extract --encoder pixels,tcn --device cpu --shard-slice {part}")
        assert result.exit_code == 0, result.output
        assert f"slice {part[0]} of 3 is done" in result.stdout
    result = run(f"finalize {stores[0]}")
    assert result.exit_code == 1
    (error,) = result.stderr.splitlines()
    assert f"{stores[0]} lacks 2 of 6 shards (2, 3); make them with: wmcache extract --dataset" in error
    again = error.partition("make them with: wmcache ")[2]
    assert run(again).exit_code == 0
    assert TokenStore.open(stores[0]).complete
    assert not run(f"finalize {stores[0]}").exit_code
    # The last slice completes the other store too.
    result = run("extract --encoder pixels,tcn --device cpu --shard-slice 1/3")
    assert result.exit_code == 0
    assert all(TokenStore.open(store).complete for store in stores)
    assert "slice" not in result.stdout
