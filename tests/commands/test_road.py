"""From frames to a plan: what each command leaves for the next one, int8 stores, residences and interruptions."""

from __future__ import annotations

import json
from importlib.metadata import metadata
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest

from wmcache.bench import extract as extract_bench
from wmcache.bench import limit
from wmcache.cache import TokenStore

from .conftest import COMMANDS, MODEL, PLAN, PLAN_FOLDER, RUN, STORE, contents, run, succeed

INT8 = "{home}/stores/pointmaze-umaze/tcn-64-int8.zarr"


def test_every_product_is_where_the_next_command_looks_for_it(road: Path) -> None:
    for path in (
        "pointmaze-umaze/dataset.json",
        "encoders/pointmaze-umaze-tcn.safetensors",
        "stores/pointmaze-umaze/tcn-64.zarr/zarr.json",
        "runs/pointmaze-umaze-tcn-64/checkpoints/last/model.safetensors",
        f"runs/pointmaze-umaze-tcn-64/{PLAN_FOLDER}/results.json",
        f"runs/pointmaze-umaze-tcn-64/{PLAN_FOLDER}/report.html",
    ):
        assert (road / path).exists()
    assert not list(road.rglob("*.tmp"))
    # `run` splits lines before it fills in paths; otherwise no test would show that spaces work.
    assert " " in str(road)


@pytest.mark.parametrize(
    "line",
    [
        "wmcache collect --episodes 6 --length 40 --image-size 32 --frames-per-shard 64 --cluster local:1",
        "wmcache fit --steps 5 --batch-size 16 --device cpu",
        "wmcache extract --device cpu",
    ],
)
def test_a_finished_command_changes_nothing_when_it_is_run_again(road: Path, line: str) -> None:
    def data() -> dict[Path, bytes]:
        return {file: file.read_bytes() for file in road.rglob("*") if file.is_file() and "runs" not in file.parts}

    before = data()
    assert "already complete" in succeed(line, road).stdout
    assert data() == before


def test_training_ends_with_the_next_command(road: Path, tmp_path: Path) -> None:
    result = succeed(f"wmtrain --cache {STORE} --steps 1 --out {{out}} {MODEL}", road, out=tmp_path / "run")
    assert result.stdout.splitlines()[-1].endswith(f"wmplan --run {tmp_path / 'run'}")


@pytest.mark.parametrize("command", COMMANDS)
def test_version(road: Path, command: str) -> None:
    assert run(f"{command} --version", road).stdout == f"{command}, version {metadata('wmcache')['Version']}\n"


def test_a_dry_run_writes_nothing(road: Path, tmp_path: Path) -> None:
    before = contents(road, tmp_path)
    line, out = "wmcache extract --dry-run --device cpu", tmp_path / "new.zarr"
    text = succeed(f"{line} --out {{out}}", road, out=out).stdout
    assert "4 shards, 240 frames" in text
    assert "61.4 kB" in text  # 240 frames of 4 tokens of 32 numbers of 2 bytes
    assert "30.7 kB" in succeed(f"{line} --store-dtype int8 --out {{out}}", road, out=out).stdout
    assert "0 shards, 0 frames" in succeed(line, road).stdout
    assert contents(road, tmp_path) == before


@pytest.fixture(scope="module")
def narrow(road: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a store of int8, a run and a plan on it."""
    own = Path(copytree(road, tmp_path_factory.mktemp("int8") / "home"))
    for line in (
        "wmcache extract --store-dtype int8 --device cpu",
        f"wmtrain --cache {INT8} --steps 4 {MODEL}",
        f"wmplan --run {{home}}/runs/pointmaze-umaze-tcn-64-int8 {PLAN}",
    ):
        succeed(line, own)
    return own


class TestInt8:
    def test_a_store_is_beside_the_other_and_half_as_large(self, narrow: Path) -> None:
        entries = {Path(row["path"]).name: row for row in json.loads(run("wmcache ls --json", narrow).stdout)}
        wide, small = entries["tcn-64.zarr"], entries["tcn-64-int8.zarr"]
        assert (wide["dtype"], small["dtype"]) == ("float16", "int8")
        assert small["bytes"] < wide["bytes"]
        first, second = (TokenStore.open(Path(row["path"])).gather(np.arange(240)) for row in (wide, small))
        np.testing.assert_allclose(second, first, atol=0.05)

    def test_it_is_trained_and_planned_on_and_verified(self, narrow: Path) -> None:
        folder = narrow / "runs/pointmaze-umaze-tcn-64-int8"
        assert json.loads((folder / PLAN_FOLDER / "results.json").read_text())["episodes"] == 2
        identity = json.loads((folder / "identity.json").read_text())
        assert (identity["identity"]["store_dtype"], identity["card"]["dtype"]) == ("int8", "int8")
        succeed(f"wmcache verify --deep --device cpu {INT8}", narrow)

    def test_one_is_not_taken_for_the_other(self, narrow: Path) -> None:
        result = run(f"wmcache extract --device cpu --out {INT8}", narrow)
        assert "store_dtype: int8 != float16" in result.stderr
        result = run(f"wmtrain --cache {INT8} --out {{home}}/runs/pointmaze-umaze-tcn-64 --steps 4 {MODEL}", narrow)
        assert "store_dtype: float16 != int8" in result.stderr


BENCHMARKS = {
    "read --frames 100 --tokens 2 --dim 4 --batch-size 2": {"frames", "ratio_to_zarr"},
    "extract --device cpu": {"frames", "ratio_to_network"},
    "extract --encoder tcn,tcn-layers --device cpu": {"more_than_first", "one_after_the_other"},
    f"train --cache {STORE} --steps 2 --width 16 --depth 1 --heads 2 --batch-size 4 --device cpu": {
        "waiting_share",
        "ratio_to_memory",
        "share_of_limit",
    },
    f"plan --run {RUN} --samples 20 --elites 4 --device cpu": {"ours_encoder_frames", "share_of_limit"},
    f"codecs {STORE} --frames 100": {"form", "size", "speed", "relative_error"},
}
"""Command line -> some of its figures; tests/bench checks their values."""


@pytest.mark.parametrize("line", BENCHMARKS)
def test_benchmarks_print_figures_as_a_table_and_as_json(
    road: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.setattr(extract_bench, "ROUNDS", 1)
    monkeypatch.setattr(limit, "CPU_SIZE", 64)
    figures = json.loads(succeed(f"wmcache bench {line} --json", road).stdout)
    assert BENCHMARKS[line] <= set(figures[0] if isinstance(figures, list) else figures)
    printed = [row.split()[0] for row in succeed(f"wmcache bench {line}", road).stdout.splitlines()]
    assert printed == (
        ["form", *(row["form"].split()[0] for row in figures)] if "form" in BENCHMARKS[line] else [*figures]
    )
