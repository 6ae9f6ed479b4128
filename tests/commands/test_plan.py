"""wmplan's words: protocols and what is given beside them, solvers and their options, and what is written down of it all."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from wmcache.bench import plan as bench
from wmcache.cli import main, wmplan
from wmcache.commands.plan import SEARCH
from wmcache.common.errors import UserError
from wmcache.planner import evaluate
from wmcache.planner.options import PlanOptions
from wmcache.planner.protocols import PROTOCOLS
from wmcache.planner.solvers import SOLVERS
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.train import train

Told = Callable[[str], PlanOptions]
QUICK = "--episodes 2 --budget 10 --horizon 2 --samples 6 --elites 2 --iterations 1 --device cpu"


def run(line: str, **places: Path) -> Result:
    return CliRunner().invoke(wmplan, [word.format(**places) for word in line.split()], prog_name="wmplan")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Told:
    """The settings that a line of options comes to, without a planning."""

    def settings_of(line: str) -> PlanOptions:
        taken: list[PlanOptions] = []

        def take(run: Path, options: PlanOptions, **_: Any) -> None:
            taken.append(options)
            raise UserError("enough")

        monkeypatch.setattr(evaluate, "EvalContext", take)
        result = run(f"--run {{run}} {line}", run=tmp_path)
        assert result.output.splitlines() == ["Error: enough"], result.output
        return taken[0]

    return settings_of


def flat(options: PlanOptions) -> dict[str, Any]:
    values = asdict(options)
    return {**values.pop("search"), **values}


class TestProtocols:
    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_a_protocol_says_what_it_says_and_nothing_else(self, told: Told, protocol: str) -> None:
        expected = flat(PlanOptions()) | PROTOCOLS[protocol]
        assert flat(told(f"--protocol {protocol}")) == expected

    def test_dino_wm_is_planned_as_in_the_reference(self, told: Told) -> None:
        options = told("--protocol dino-wm")
        assert (options.objective, options.horizon, options.execute, options.observed) == ("last", 5, 5, 1)
        assert options.search == {"samples": 300, "elites": 30, "iterations": 10, "sigma": 0.577}

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            ("--horizon 7", {"horizon": 7}),
            ("--budget 33", {"budget": 33}),
            ("--objective all", {"objective": "all"}),
            ("--samples 12 --sigma 0.3", {"samples": 12, "sigma": 0.3}),
        ],
    )
    @pytest.mark.parametrize("before", [True, False])
    def test_what_is_given_beside_it_wins(
        self, told: Told, protocol: str, flags: str, said: dict[str, Any], before: bool
    ) -> None:
        line = f"{flags} --protocol {protocol}" if before else f"--protocol {protocol} {flags}"
        assert flat(told(line)) == flat(PlanOptions()) | PROTOCOLS[protocol] | said

    @pytest.mark.parametrize("solver", SOLVERS)
    def test_another_solver_takes_of_it_what_it_has(self, told: Told, solver: str) -> None:
        options = told(f"--protocol dino-wm --solver {solver}")
        known = {field.name for field in fields(SOLVERS[solver])}
        said = {name: PROTOCOLS["dino-wm"][name] for name in ("samples", "elites", "iterations", "sigma")}
        assert options.search == {name: value for name, value in said.items() if name in known}
        SOLVERS[solver](**options.search)

    def test_an_option_of_another_solver_is_not_forgotten_when_it_is_given(self, told: Told) -> None:
        # So that it is refused by name, later.
        assert told("--solver gd --samples 12").search == {"samples": 12}

    def test_an_unknown_one_is_refused_with_those_that_exist(self, tmp_path: Path) -> None:
        result = run("--run {run} --protocol dreamer", run=tmp_path)
        assert result.exit_code == 2
        assert all(name in result.stderr.splitlines()[-1] for name in PROTOCOLS)


class TestOptions:
    def test_nothing_said_is_the_library_defaults(self, told: Told) -> None:
        assert told("") == PlanOptions()

    @pytest.mark.parametrize("name", SEARCH)
    def test_every_option_of_a_search_is_some_solvers_own(self, name: str) -> None:
        assert any(name in {field.name for field in fields(solver)} for solver in SOLVERS.values())

    @pytest.mark.parametrize(
        ("flags", "solver", "search"),
        [
            ("--solver gd --gd-steps 3 --gd-lr 0.5", "gd", {"steps": 3, "lr": 0.5}),
            ("--solver icem --beta 1", "icem", {"beta": 1.0}),
            ("--solver mppi --temperature 2", "mppi", {"temperature": 2.0}),
            ("--momentum 0.15", "cem", {"momentum": 0.15}),
        ],
    )
    def test_a_solver_gets_its_options(self, told: Told, flags: str, solver: str, search: dict[str, float]) -> None:
        options = told(flags)
        assert (options.solver, options.search) == (solver, search)

    def test_goals_and_distances_are_taken_over(self, told: Told) -> None:
        options = told("--goals random-action --goal-steps 12 --distance graph --alpha 0.5 --context 3 --observed 2")
        assert (options.goals, options.goal_steps, options.distance) == ("random-action", 12, "graph")
        assert (options.alpha, options.context, options.observed) == (0.5, 3, 2)


@pytest.fixture(scope="module")
def planned(store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run; each test's results go to folders of their own."""
    path = tmp_path_factory.mktemp("runs") / "tiny"
    sizes = {"width": 16, "depth": 1, "heads": 2, "dropout": 0.0}
    train(store_path, path, TrainOptions(model_options=sizes, steps=4, batch=8, dtype="float32", device="cpu"))
    return path


class TestResults:
    def test_they_say_all_that_they_came_from(self, planned: Path, tmp_path: Path) -> None:
        line = (
            f"--run {{run}} --protocol mpc-100 --goals random-action --goal-steps 6 --no-strict {QUICK} --out {{out}}"
        )
        result = run(line, run=planned, out=tmp_path / "plan")
        assert result.exit_code == 0, result.output
        written = json.loads((tmp_path / "plan" / "results.json").read_text())
        assert written["protocol"] == "mpc-100"
        expected = PlanOptions(
            episodes=2,
            budget=10,
            horizon=2,
            goals="random-action",
            goal_steps=6,
            strict=False,
            search={"samples": 6, "elites": 2, "iterations": 1},
            device="cpu",
        )
        assert written["options"] == asdict(expected)
        assert written["candidates_per_replan"] == 6

    def test_the_table_has_a_line_for_each_threshold(self, planned: Path, tmp_path: Path) -> None:
        result = run(f"--run {{run}} --out {{out}} {QUICK}", run=planned, out=tmp_path / "plan")
        header, *rows = result.stdout.splitlines()
        assert [row.split()[:2] for row in rows[:9]] == [
            [within, name] for within in ("0.5", "0.25", "0.1") for name in ("planner", "random", "zero")
        ]
        assert "began at the goal: 0 within 0.5" in rows[9]
        assert "4 replans" in rows[10]
        # Reached and held stand side by side, each with its interval.
        assert header.index("reached") < header.index("95 %") < header.index("held") < header.rindex("95 %")

    def test_the_untrained_model_is_a_baseline_when_asked_for(self, planned: Path, tmp_path: Path) -> None:
        result = run(f"--run {{run}} --out {{out}} --untrained {QUICK}", run=planned, out=tmp_path / "plan")
        assert result.exit_code == 0, result.output
        assert [row.split()[1] for row in result.stdout.splitlines()[1:5]] == ["planner", "random", "zero", "untrained"]
        written = json.loads((tmp_path / "plan" / "results.json").read_text())
        assert [row["threshold"] for row in written["baselines"]["untrained"]] == [0.5, 0.25, 0.1]
        assert "untrained" in (tmp_path / "plan" / "report.html").read_text()
        assert not list((tmp_path / "plan").glob("unfinished-*"))

    def test_its_own_episodes_can_be_planned_again(self, planned: Path, tmp_path: Path) -> None:
        line = f"--run {{run}} {QUICK} --json --out {{out}}"
        assert run(line, run=planned, out=tmp_path / "one").exit_code == 0
        again = run(
            f"{line} --goals {{goals}}", run=planned, out=tmp_path / "two", goals=tmp_path / "one" / "episodes.parquet"
        )
        first = json.loads((tmp_path / "one" / "results.json").read_text())
        assert json.loads(again.stdout)["by_threshold"] == first["by_threshold"]

    def test_other_settings_are_not_written_over_them(self, planned: Path, tmp_path: Path) -> None:
        line = f"--run {{run}} {QUICK} --out {{out}}"
        assert run(line, run=planned, out=tmp_path / "plan").exit_code == 0
        before = (tmp_path / "plan" / "results.json").read_bytes()
        for flags, said in (("--solver mppi", "solver cem != mppi"), ("--distance graph", "distance latent != graph")):
            result = run(f"{line} {flags}", run=planned, out=tmp_path / "plan")
            assert result.exit_code == 1
            assert said in result.stderr
            assert len(result.stderr.splitlines()) == 1
            assert f"--out {tmp_path / 'plan'}-2" in result.stderr
            assert "delete" not in result.stderr
        assert (tmp_path / "plan" / "results.json").read_bytes() == before

    def test_results_from_before_strict_are_those_of_pairs_of_any_distance(self, tmp_path: Path) -> None:
        options = asdict(PlanOptions())
        del options["strict"]
        (tmp_path / "results.json").write_text(json.dumps({"options": options}))
        evaluate.refuse_other_results(tmp_path, PlanOptions(strict=False))
        with pytest.raises(UserError, match="strict False != True"):
            evaluate.refuse_other_results(tmp_path, PlanOptions())
        # The pairs of a file are the same either way.
        (tmp_path / "results.json").write_text(json.dumps({"options": {**options, "goals": "some.parquet"}}))
        evaluate.refuse_other_results(tmp_path, PlanOptions(goals="some.parquet"))

    def test_a_sweep_writes_a_folder_for_each_setting(self, planned: Path) -> None:
        line = f"--run {{run}} {QUICK}"
        for flags in ("", "--samples 5", "--no-strict", "--seed 3"):
            assert run(f"{line} {flags}", run=planned).exit_code == 0
        assert len(list(planned.glob("plan-all-x1-*/results.json"))) == 4

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            ("--goals random-stat", "neither random-state, dataset, random-action"),
            ("--goals dataset --goal-steps 60", "lower --goal-steps"),
            ("--goals dataset --goal-steps 5", "raise --goal-steps, or take pairs of any distance with --no-strict"),
            ("--threshold 9", "--no-strict"),
            ("--proprio none", "wmtrain --proprio none"),
            ("--observed 2", "raise --context"),
            ("--solver guess", "no solver 'guess'; known are cem, icem, mppi, gd"),
            ("--solver gd", "solver gd has no option samples"),
            ("--alpha -1", "--alpha is -1.0; it must be 0 or more"),
            ("--elites 7", "elites is 7; it must lie between 2 and samples, 6"),
            ("--goal-steps 0", "--goal-steps is 0; it must be above 0"),
        ],
    )
    def test_what_cannot_be_planned_is_refused_in_a_line(
        self, planned: Path, tmp_path: Path, flags: str, said: str
    ) -> None:
        result = run(f"--run {{run}} {QUICK} --out {{out}} {flags}", run=planned, out=tmp_path / "plan")
        assert result.exit_code == 1
        assert result.stdout == ""
        assert result.stderr.startswith("Error: ")
        assert said in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert not (tmp_path / "plan").exists()


def test_planning_is_measured_against_dino_wms_way(planned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "LIMIT_SIZE", 64)
    words = ["bench", "plan", "--run", str(planned), "--samples", "20", "--elites", "4", "--device", "cpu", "--json"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert (figures["reference_encoder_frames"], figures["ours_encoder_frames"]) == (21, 2)
    assert figures["cost_difference_float32"] < 1e-3


@pytest.mark.parametrize(
    "line", ["--run nowhere", "imagine --run nowhere --decoder nowhere --cache nowhere.zarr"], ids=["wmplan", "imagine"]
)
def test_a_missing_ffmpeg_is_named_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store_path: Path, line: str
) -> None:
    program = tmp_path / "no ffmpeg"
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))
    words = line.replace("nowhere.zarr", str(store_path)).split()
    result = CliRunner().invoke(main if words[0] == "imagine" else wmplan, words)
    assert result.exit_code == 1
    assert f"ffmpeg cannot be started (No such file or directory): {program}" in result.stderr
