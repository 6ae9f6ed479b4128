"""Estimates of a large extraction, on measured rates."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner

from wmcache.bench import plan_job as plan_job_module
from wmcache.bench.plan_job import measure_scale, plan_job
from wmcache.cli import main


@pytest.fixture(scope="module", autouse=True)
def measured_once() -> Iterator[None]:
    """Rates are measured for real, on the smallest store, and once."""
    scale = measure_scale(plan_job_module.MEASURED_SHARDS, tokens=196, token_dim=384)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_job_module, "measure_scale", lambda *_, **__: scale)
        patch.setattr(plan_job_module, "MEASURED_TASKS", 200)
        yield


@pytest.fixture(scope="module")
def small(measured_once: None) -> dict[str, Any]:
    return plan_job(100_000, token_grid=(14, 14), token_dim=384, image_size=224, workers=10, frames_per_second=100.0)


def test_sizes_are_those_of_the_layout_and_hours_those_of_the_busiest_worker(small: dict[str, Any]) -> None:
    assert (small["frames_per_shard"], small["shards"]) == (512, 196)
    assert small["token_bytes"] == 100_000 * 196 * 384 * 2
    assert small["shard_bytes"] == 512 * (196 * 384 * 2 + 4 + 16) + 4
    # 196 shards, as many records, a chunk for each of five columns, and a description for each array and the group
    assert small["objects"] == 196 + 196 + 5 + 7
    assert small["worker_hours"] == pytest.approx(100_000 / 100 / 3600)
    assert small["hours"] == pytest.approx(20 * 512 / 100 / 3600)
    assert 0 < small["commit_share"] < 0.05
    assert small["notes"] == []


def test_a_huge_dataset_gets_larger_shards_and_notes(small: dict[str, Any]) -> None:
    sizes = {"image_size": 64, "token_dim": 384, "token_grid": (14, 14)}
    huge = plan_job(10**9, workers=100_000, frames_per_second=5000.0, **sizes)  # type: ignore[arg-type]
    assert huge["frames_per_shard"] == 4096
    assert huge["finish"] > small["finish"]
    split = plan_job(10**9, workers=10**9, frames_per_second=1e5, frames_per_shard=10, **sizes)  # type: ignore[arg-type]
    for notes, named in ((huge["notes"], "wmcache sbatch"), (split["notes"], "--frames-per-shard 2344 ")):
        assert any(named in note for note in notes)
    assert (len(huge["notes"]), len(split["notes"])) == (2, 4)


def test_the_command_measures_an_available_encoder(small: dict[str, Any]) -> None:
    result = CliRunner().invoke(
        main, ["plan-job", "--frames", "1e5", "--encoder", "pixels", "--workers", "3", "--json"]
    )
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert set(plan) == set(small)
    assert plan["frames"] == 100_000
    assert plan["frames_per_second"] > 0
