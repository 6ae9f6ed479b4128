"""The arithmetic of a large extraction, on rates that are measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict

import pytest
from click.testing import CliRunner

from wmcache.bench import plan_job as plan_job_module
from wmcache.bench.plan_job import JobPlan, plan_job
from wmcache.bench.scale import measure_scale
from wmcache.cli import main


@pytest.fixture(scope="module", autouse=True)
def measured_once() -> Iterator[None]:
    """Rates are measured for real, but for the smallest of stores, and once."""
    scale = measure_scale(plan_job_module.MEASURED_SHARDS, tokens=196, token_dim=384)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_job_module, "measure_scale", lambda *_, **__: scale)
        patch.setattr(plan_job_module, "MEASURED_TASKS", 200)
        yield


@pytest.fixture(scope="module")
def small(measured_once: None) -> JobPlan:
    return plan_job(100_000, token_grid=(14, 14), token_dim=384, image_size=224, workers=10, frames_per_second=100.0)


def test_bytes_and_objects_are_those_of_the_layout(small: JobPlan) -> None:
    assert (small.frames_per_shard, small.shards) == (512, 196)
    assert small.token_bytes == 100_000 * 196 * 384 * 2
    assert small.shard_bytes == 512 * (196 * 384 * 2 + 4 + 16) + 4
    # 196 shards, as many records, a chunk for each of five columns, and a description for each array and the group
    assert small.objects == 196 + 196 + 5 + 7


def test_hours_are_those_of_the_worker_that_has_most_shards(small: JobPlan) -> None:
    assert small.worker_hours == pytest.approx(100_000 / 100 / 3600)
    assert small.hours == pytest.approx(20 * 512 / 100 / 3600)


def test_a_job_of_usual_size_has_no_notes(small: JobPlan) -> None:
    assert small.notes == []
    assert 0 < small.commit_share < 0.05


def test_a_huge_dataset_gets_larger_shards_and_is_warned_of(small: JobPlan) -> None:
    huge = plan_job(
        10**9, token_grid=(14, 14), token_dim=384, image_size=224, workers=100_000, frames_per_second=5000.0
    )
    assert huge.frames_per_shard == 4096
    assert any("one scheduler is too few" in note for note in huge.notes)
    assert any("step table" in note for note in huge.notes)
    assert huge.finish > small.finish


def test_too_many_tars_and_too_many_workers_are_said() -> None:
    plan = plan_job(
        10**9,
        token_grid=(1, 1),
        token_dim=8,
        image_size=64,
        workers=10**9,
        frames_per_second=1e5,
        frames_per_shard=10,
    )
    assert any("--frames-per-shard 2344 or more" in note for note in plan.notes)
    assert any("would have no shard" in note for note in plan.notes)


def test_the_command_measures_an_encoder_that_is_here_and_prints_the_plan() -> None:
    result = CliRunner().invoke(
        main, ["plan-job", "--frames", "1e5", "--encoder", "pixels", "--workers", "3", "--json"]
    )
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert set(plan) == set(asdict(plan_job_fields()))
    assert plan["frames"] == 100_000
    assert plan["frames_per_second"] > 0


def plan_job_fields() -> JobPlan:
    return JobPlan(**dict.fromkeys(JobPlan.__dataclass_fields__, 0))  # type: ignore[arg-type]


def test_an_encoder_that_is_not_here_needs_to_be_told_of() -> None:
    result = CliRunner().invoke(main, ["plan-job", "--frames", "1e5", "--encoder", "dinov3"])
    assert result.exit_code == 1
    assert "--frames-per-second" in result.output
    assert len(result.output.strip().splitlines()) == 1


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", "inf", "nan"])
def test_what_is_no_whole_number_of_frames_is_refused(text: str) -> None:
    result = CliRunner().invoke(main, ["plan-job", f"--frames={text}"])
    assert result.exit_code == 2
    assert "whole number" in result.output
