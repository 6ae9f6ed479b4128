"""--cluster with a running scheduler, which is in this process, and with slices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from distributed import LocalCluster

from wmcache.cache import TokenStore
from wmcache.planner.context import EvalContext
from wmcache.planner.evaluate import evaluate
from wmcache.planner.options import PlanOptions
from wmcache.trainer.train import train

from ..conftest import shards_of
from .conftest import ADAPTER, TINY, error_of, run, succeed


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
def stores(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where extract puts the stores of a home whose path is relative."""
    monkeypatch.setenv("WMCACHE_HOME", "home")
    return home / "stores/pointmaze-umaze"


def test_frames_are_collected(scheduler: str, dataset_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "pointmaze-umaze"
    line = "wmcache collect --episodes 6 --length 60 --image-size 32 --frames-per-shard 64 --cluster {at} --out {out}"
    succeed(line, at=scheduler, out=out)
    for file in dataset_path.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes()


def test_stores_are_extracted_and_derived_and_weights_fitted(scheduler: str, stores: Path, store_path: Path) -> None:
    layers = "home/stores/pointmaze-umaze/tcn-layers-64.zarr"
    for line in (
        "wmcache extract --encoder tcn,tcn-layers --device cpu --dtype float32",
        f"{ADAPTER} --base tcn-layers",
        f"wmcache derive {layers} --encoder dino-tok --device cpu",
    ):
        succeed(f"{line} --cluster {scheduler}")
    assert shards_of(stores / "tcn-64.zarr") == shards_of(store_path)
    assert TokenStore.open(stores / "dino-tok-64.zarr").complete
    weights = "home/encoders/pointmaze-umaze-dino-tok.safetensors"
    assert f"{weights}: fitted on" in succeed(f"{ADAPTER} --cache {layers}").stdout


def test_weights_that_were_fitted_again_are_loaded_again(scheduler: str, stores: Path, tmp_path: Path) -> None:
    for out in ("one.zarr", "two.zarr"):
        succeed(f"wmcache extract --device cpu --cluster {scheduler} --out {out}")
        succeed("wmcache fit --steps 3 --batch-size 16 --seed 5 --overwrite --device cpu")
    one, two = (TokenStore.open(tmp_path / name) for name in ("one.zarr", "two.zarr"))
    assert one.identity.weights_sha256 != two.identity.weights_sha256
    assert shards_of(tmp_path / "one.zarr") != shards_of(tmp_path / "two.zarr")


def test_plans_are_the_same_wherever_they_are_made(
    scheduler: str,
    store_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    train(store_path, Path("run"), TINY)
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
    assert "wmplan: 1 batches for 2 workers" in capsys.readouterr().err


def test_slices_in_any_order_make_the_store_and_report_missing_shards(stores: Path) -> None:
    pixels, tcn = stores / "pixels-32.zarr", stores / "tcn-64.zarr"
    for part in ("2/3", "0/3"):
        result = succeed(f"wmcache extract --encoder pixels,tcn --device cpu --shard-slice {part}")
        assert f"slice {part[0]} of 3 is done" in result.stdout
    error = error_of(run("wmcache finalize {store}", store=pixels))
    assert f"{pixels} lacks 2 of 6 shards (2, 3)" in error
    succeed(error.partition("make them with: ")[2])
    assert TokenStore.open(pixels).complete
    succeed("wmcache finalize {store}", store=pixels)
    # The last slice completes the other store too.
    result = succeed("wmcache extract --encoder pixels,tcn --device cpu --shard-slice 1/3")
    assert TokenStore.open(pixels).complete
    assert TokenStore.open(tcn).complete
    assert "slice" not in result.stdout
