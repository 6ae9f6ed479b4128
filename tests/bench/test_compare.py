"""Runs compared with each other: landscapes of known shapes, and rows relative to the first run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from wmcache.bench import compare
from wmcache.bench.compare import GRID, compare_runs, landscape, roughness
from wmcache.cli import main
from wmcache.planner.base import Cost
from wmcache.planner.context import EvalContext
from wmcache.planner.options import PlanOptions
from wmcache.planner.protocols import PROTOCOLS


class TestRoughness:
    def test_a_bowl_is_smooth_and_its_only_minimum_is_found(self) -> None:
        x = np.linspace(-1, 1, GRID)
        bowl = np.square(x)[:, None] + np.square(x)
        found, rough = (
            roughness((bowl + noise * np.random.default_rng(0).random(bowl.shape))[None]) for noise in (0, 0.3)
        )
        assert (found["minima"], found["stuck"]) == (1, 0)
        assert rough["minima"] > 20
        assert rough["stuck"] > 0.5
        assert rough["curvature"] > 5 * found["curvature"]

    def test_half_of_two_equal_bowls_descends_into_the_other_one(self) -> None:
        x = np.linspace(-2, 2, 41)
        two = np.square(np.abs(x) - 1)[:, None] + np.square(x)
        two[:20] += 1e-6  # so that one of them is the lowest
        found = roughness(two[None])
        assert found["minima"] == 2
        assert found["stuck"] == pytest.approx(0.5, abs=0.03)


def test_the_centre_of_a_landscape_is_the_plan(
    context: EvalContext, tiny_plan: PlanOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "GRID", 5)
    planes = landscape(context, tiny_plan, episodes=2)
    assert planes.shape == (2, 5, 5)
    planned, solver = [], context.solver

    def watched(cost: Cost, start: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        plan = solver(cost, start, generators)
        planned.append(cost(plan[:, None]).item())
        return plan

    monkeypatch.setattr(context, "solver", watched)
    np.testing.assert_array_equal(planes, landscape(context, tiny_plan, episodes=2))
    assert planes[:, 2, 2].tolist() == pytest.approx(planned)


def test_runs_are_compared_with_the_first(
    run_path: Path, ddp_run: Path, run_until: Callable[[int], Path], tiny_plan: PlanOptions, tmp_path: Path
) -> None:
    protocol = PROTOCOLS.get("mpc-100")
    assert isinstance(protocol, dict)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "ROUNDS", 1)
        patch.setattr(compare, "GRID", 5)
        for name, value in {"budget": 5, "horizon": 2}.items():
            patch.setitem(protocol, name, value)
        plan = replace(tiny_plan, threshold=None)
        rows = compare_runs((run_path, run_until(2), ddp_run), plan, 2, tmp_path / "landscape.png")
    assert [row["model"] for row in rows] == ["dino-wm", "ddp-wm, primary", "ddp-wm, lrm"]
    assert [row["fewer_flop"] for row in rows] == [rows[0]["gflop_per_step"] / row["gflop_per_step"] for row in rows]
    assert rows[1]["gflop_per_step"] < rows[2]["gflop_per_step"]
    assert all(row["episodes"] == 2 and 0 <= row["within_0.5"] <= 2 for row in rows)
    assert all(np.isfinite([row["seconds_per_replan"], row["curvature"]]).all() for row in rows)
    assert all(row["share_of_limit"] > 0 and row["limit_gflops"] == rows[0]["limit_gflops"] for row in rows)
    with Image.open(tmp_path / "landscape.png") as picture:
        assert picture.width > 600


def test_the_command_prints_a_table_or_json(run_path: Path, ddp_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "ROUNDS", 1)
    words = ["bench", "plan", "--model", str(run_path), "--model", str(ddp_run), "--episodes", "0", "--device", "cpu"]
    words += ["--samples", "8", "--elites", "3"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0].split() == ["run", run_path.name, ddp_run.name]
    rows = json.loads(CliRunner().invoke(main, [*words, "--json"]).stdout)
    assert rows[0]["fewer_flop"] == rows[0]["faster"] == 1


def test_the_same_run_with_fewer_tokens_and_as_the_reference_imagines(
    run_path: Path, ddp_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "ROUNDS", 1)
    words = ["bench", "plan", "--model", str(run_path), "--model", str(ddp_run), "--keep", "0.5", "--reference"]
    words += ["--episodes", "0", "--device", "cpu", "--samples", "8", "--elites", "3", "--context", "3", "--json"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [row["context"] for row in rows] == [3] * 5
    assert rows[0]["faster"] == rows[0]["fewer_flop"] == 1
    encoding, whole, kept, ddp, kept_ddp = (row["gflop_per_step"] for row in rows)
    assert encoding > whole > 1.7 * kept
    assert ddp > 1.5 * kept_ddp
    assert [row["parameters_m"] for row in rows[:3]] == [rows[0]["parameters_m"]] * 3


def test_columns_beside_a_model_need_one(run_path: Path) -> None:
    for flags in (["--keep", "0.5"], ["--reference"]):
        assert CliRunner().invoke(main, ["bench", "plan", "--run", str(run_path), *flags]).exit_code == 2


def test_a_model_without_a_reference_is_refused(ddp_run: Path) -> None:
    result = CliRunner().invoke(main, ["bench", "plan", "--run", str(ddp_run)])
    assert result.exit_code == 1
    assert str(ddp_run) in result.stderr.splitlines()[-1]
