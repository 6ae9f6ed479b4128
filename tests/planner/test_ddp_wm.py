"""DDP-WM behind the planner's seam: every solver, the report, masks, and runs that are compared with each other."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from wmcache.bench import compare
from wmcache.bench.compare import GRID, compare_runs, landscape, roughness
from wmcache.cli import main
from wmcache.common.errors import UserError
from wmcache.planner import localization as localization
from wmcache.planner.context import EvalContext
from wmcache.planner.evaluate import evaluate, run_episodes
from wmcache.planner.localization import draw_localization
from wmcache.planner.objective import GoalDistance
from wmcache.planner.options import PlanOptions
from wmcache.planner.report import write_report
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.train import train

SEARCHES: dict[str, dict[str, Any]] = {
    "cem": {"samples": 8, "elites": 3, "iterations": 2},
    "icem": {"samples": 8, "elites": 3, "iterations": 2},
    "mppi": {"samples": 8, "elites": 3, "iterations": 2},
    "gd": {"steps": 3, "restarts": 2},
}
MODEL = {
    "width": 16,
    "depth": 1,
    "heads": 2,
    "dropout": 0.0,
    "locator_width": 12,
    "locator_depth": 1,
    "locator_mlp": 16,
}


@pytest.fixture(scope="module")
def ddp_run(ddp_store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ddp") / "ddp"
    options = TrainOptions(
        model="ddp-wm",
        model_options=MODEL,
        steps=20,
        batch=8,
        learning_rate=3e-3,
        dtype="float32",
        device="cpu",
        log_every=5,
        checkpoint_every=20,
    )
    train(ddp_store_path, path, options)
    return path


def run_until(run: Path, out: Path, stage: int) -> Path:
    """A copy that ends with that stage."""
    copytree(run, out, symlinks=True)
    for later in sorted((out / "checkpoints").glob("step-*"))[stage:]:
        rmtree(later)
    (out / "checkpoints" / "last").unlink()
    return out


@pytest.fixture(scope="module")
def sparse_run(ddp_run: Path) -> Path:
    return run_until(ddp_run, ddp_run.with_name("sparse"), 2)


@pytest.fixture(scope="module")
def ddp_setting(ddp_run: Path, tiny_plan: PlanOptions) -> EvalContext:
    return EvalContext(ddp_run, tiny_plan)


@pytest.mark.parametrize("solver", SEARCHES)
def test_every_solver_plans_with_it(ddp_run: Path, tiny_plan: PlanOptions, solver: str) -> None:
    options = replace(tiny_plan, solver=solver, search=SEARCHES[solver])
    episodes = run_episodes(EvalContext(ddp_run, options), options, range(2))
    assert episodes.states.shape == (2, options.budget, 4)
    assert np.isfinite(episodes.states).all()


def test_an_episode_does_not_depend_on_those_planned_beside_it(
    ddp_setting: EvalContext, tiny_plan: PlanOptions
) -> None:
    together, alone = (run_episodes(ddp_setting, tiny_plan, numbers) for numbers in (range(3), [2]))
    np.testing.assert_allclose(together.states[2], alone.states[0], atol=1e-4)


def test_a_run_that_only_knows_where_is_not_planned_with(ddp_run: Path, tmp_path: Path, tiny_plan: PlanOptions) -> None:
    first = run_until(ddp_run, tmp_path / "first", 1)
    with pytest.raises(UserError, match="--stage primary"):
        EvalContext(first, tiny_plan)


def test_the_report_shows_where_it_computes(ddp_setting: EvalContext, tiny_plan: PlanOptions, tmp_path: Path) -> None:
    episodes, results = evaluate(ddp_setting, tiny_plan, tmp_path / "plan")
    write_report(tmp_path / "plan", ddp_setting.run, ddp_setting, episodes, results, "wmplan")
    assert "Where the model computes" in (tmp_path / "plan" / "report.html").read_text()
    with Image.open(tmp_path / "plan" / "figures" / "localization.png") as picture:
        assert picture.width > picture.height


def test_the_report_of_another_model_does_not(setting: EvalContext, tiny_plan: PlanOptions, tmp_path: Path) -> None:
    episodes, results = evaluate(setting, tiny_plan, tmp_path / "plan")
    write_report(tmp_path / "plan", setting.run, setting, episodes, results, "wmplan")
    assert "Where the model computes" not in (tmp_path / "plan" / "report.html").read_text()


def test_the_picture_follows_the_localiser(ddp_run: Path, tiny_plan: PlanOptions) -> None:
    setting = EvalContext(ddp_run, tiny_plan)
    pictures = []
    for bias in (-100, 100):
        setting.model.localiser.head[-1].bias.data.fill_(bias)
        pictures.append(np.asarray(Image.open(io.BytesIO(draw_localization(setting)))))
    assert pictures[0].shape == pictures[1].shape
    assert (pictures[0] != pictures[1]).any()


def test_the_picture_of_a_model_that_learned_from_tokens_outlines_what_changes_in_them(
    ddp_store_path: Path, tmp_path: Path, tiny_plan: PlanOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"labels": "features", "threshold": 100.0, "foreground": 1}  # which nothing comes near
    settings = TrainOptions(
        model="ddp-wm", model_options=MODEL | options, steps=1, batch=8, dtype="float32", device="cpu"
    )
    train(ddp_store_path, tmp_path / "run", settings)
    drawn: list[dict[str, Any]] = []

    def watched(images: Any, masks: dict[str, Any], *rest: Any) -> bytes:
        drawn.append(masks)
        return draw(images, masks, *rest)

    draw = localization._draw
    monkeypatch.setattr(localization, "_draw", watched)
    draw_localization(EvalContext(tmp_path / "run", tiny_plan))
    assert not drawn[0]["changes"].any()
    assert (drawn[0]["computed"].sum(-1) == 1).all()


class TestMasks:
    def test_only_the_tokens_in_the_mask_count(self) -> None:
        goal, latents = (
            torch.zeros(1, 3, 2),
            torch.tensor([1.0, 2.0, 3.0])[None, None, None, :, None].expand(1, 1, 1, 3, 2),
        )
        mask = torch.tensor([[True, False, True]])
        costs = [
            GoalDistance(goal, "last", mask=one)(latents, latents[..., 0, :0], slice(0, 1)) for one in (None, mask)
        ]
        assert [cost.item() for cost in costs] == pytest.approx([14 / 3, 5.0])

    def test_each_episode_has_its_own(self) -> None:
        goal = torch.zeros(2, 2, 1)
        latents = torch.tensor([1.0, 2.0])[:, None].expand(2, 3, 4, 2, 1)
        mask = torch.tensor([[True, False], [False, True]])
        cost = GoalDistance(goal, "all", mask=mask)(latents, latents[..., 0, :0], slice(0, 2))
        assert cost.tolist() == [[1.0] * 3, [4.0] * 3]

    def test_frames_differ_where_one_has_something_else(self, ddp_run: Path, tiny_plan: PlanOptions) -> None:
        setting = EvalContext(ddp_run, replace(tiny_plan, mask=True))
        frames = np.zeros((2, 32, 32, 3), np.uint8)
        frames[1, 18:30, 2:14] = 255
        assert setting.mask(frames[:1], frames[1:]).tolist() == [[False, False, True, False]]
        # A goal that is reached is no reason to look at nothing.
        assert setting.mask(frames[:1], frames[:1]).all()

    def test_what_is_planned_with_one_is_another_plan(self, ddp_run: Path, tiny_plan: PlanOptions) -> None:
        plans = [
            run_episodes(EvalContext(ddp_run, options), options, range(2)).states
            for options in (tiny_plan, replace(tiny_plan, mask=True))
        ]
        assert (plans[0] != plans[1]).any()

    def test_a_graph_has_no_tokens_to_weigh(self, ddp_run: Path, tiny_plan: PlanOptions) -> None:
        with pytest.raises(UserError, match="--mask weighs tokens, and --distance graph has none"):
            EvalContext(ddp_run, replace(tiny_plan, mask=True, distance="graph"))


class TestLandscapes:
    def test_a_bowl_is_smooth_and_its_only_minimum_is_found(self) -> None:
        x = np.linspace(-1, 1, GRID)
        bowl = np.square(x)[:, None] + np.square(x)
        found = roughness(bowl[None])
        assert (found["minima"], found["stuck"]) == (1, 0)
        noisy = bowl + 0.3 * np.random.default_rng(0).random(bowl.shape)
        rough = roughness(noisy[None])
        assert rough["minima"] > 20
        assert rough["stuck"] > 0.5
        assert rough["curvature"] > 5 * found["curvature"]

    def test_a_plain_has_no_curvature(self) -> None:
        assert roughness(np.ones((1, GRID, GRID)))["curvature"] == 0

    def test_half_of_two_equal_bowls_ends_in_the_other_one(self) -> None:
        x = np.linspace(-2, 2, 41)
        two = np.square(np.abs(x) - 1)[:, None] + np.square(x)
        two[:20] += 1e-6  # so that one of them is the lowest
        assert roughness(two[None])["minima"] == 2
        assert roughness(two[None])["stuck"] == pytest.approx(0.5, abs=0.03)

    def test_its_middle_is_the_plan(
        self, ddp_setting: EvalContext, tiny_plan: PlanOptions, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(compare, "GRID", 5)
        planes = landscape(ddp_setting, tiny_plan, episodes=2)
        assert planes.shape == (2, 5, 5)
        np.testing.assert_array_equal(planes, landscape(ddp_setting, tiny_plan, episodes=2))
        cost = compare._cost(ddp_setting, tiny_plan, 1)
        with torch.inference_mode():
            start = torch.zeros(1, tiny_plan.horizon, ddp_setting.model.shape.action_dim)
            plan = ddp_setting.solver(cost, start, [torch.Generator().manual_seed(100)])
            assert planes[1, 2, 2] == pytest.approx(cost(plan[:, None]).item())


def test_runs_are_compared_with_the_first(
    run_path: Path,
    ddp_run: Path,
    sparse_run: Path,
    tiny_plan: PlanOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compare, "ROUNDS", 1)
    monkeypatch.setattr(compare, "GRID", 5)
    monkeypatch.setattr(compare, "PROTOCOLS", {"mpc-100": {"budget": 5, "horizon": 2}})
    rows = compare_runs((run_path, sparse_run, ddp_run), tiny_plan, 2, tmp_path / "landscape.png")
    assert [row["model"] for row in rows] == ["dino-wm", "ddp-wm, primary", "ddp-wm, lrm"]
    assert [row["fewer_flop"] for row in rows] == [rows[0]["gflop_per_step"] / row["gflop_per_step"] for row in rows]
    assert rows[1]["gflop_per_step"] < rows[2]["gflop_per_step"]
    assert all(row["episodes"] == 2 and 0 <= row["within_0.5"] <= 2 for row in rows)
    assert all(np.isfinite([row["seconds_per_replan"], row["curvature"]]).all() for row in rows)
    with Image.open(tmp_path / "landscape.png") as picture:
        assert picture.width > 600


def test_the_command_says_so_in_a_table_and_as_json(
    run_path: Path, ddp_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "ROUNDS", 1)
    words = ["bench", "plan", "--model", str(run_path), "--model", str(ddp_run), "--episodes", "0", "--device", "cpu"]
    words += ["--samples", "8", "--elites", "3"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0].split() == ["run", run_path.name, "ddp"]
    rows = json.loads(CliRunner().invoke(main, [*words, "--json"]).stdout)
    assert rows[0]["fewer_flop"] == rows[0]["faster"] == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give one --run, to measure it against DINO-WM's own way, or one --model or more"),
        (["--run", "{run}", "--model", "{run}"], "give one --run"),
        (["--model", "{run}", "--model", "{run}"], "name each run once"),
        (["--run", "{run}"], "is no model of DINO-WM's; compare runs with --model"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_line(ddp_run: Path, words: list[str], said: str) -> None:
    result = CliRunner().invoke(main, ["bench", "plan", *(word.format(run=ddp_run) for word in words)])
    assert result.exit_code == (2 if said.startswith("give") else 1)
    assert said in result.stderr.splitlines()[-1]
