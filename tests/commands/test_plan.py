"""wmplan on the command line: protocols and the options beside them, solvers and their options, and the results on disk."""

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
from wmcache.common.errors import UserError
from wmcache.planner import context, results
from wmcache.planner.options import PlanOptions
from wmcache.planner.protocols import PROTOCOLS
from wmcache.planner.solvers import SOLVERS, make_solver
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.train import train

Parse = Callable[[str], PlanOptions]
QUICK = "--episodes 2 --budget 10 --horizon 2 --samples 6 --elites 2 --iterations 1 --device cpu"


def run(line: str, **paths: Path) -> Result:
    return CliRunner().invoke(wmplan, [word.format(**paths) for word in line.split()], prog_name="wmplan")


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Parse:
    """The settings that a command line results in, without planning."""

    def settings_of(line: str) -> PlanOptions:
        received: list[PlanOptions] = []

        def receive(run: Path, options: PlanOptions, **_: Any) -> None:
            received.append(options)
            raise UserError("received")

        monkeypatch.setattr(context, "EvalContext", receive)
        result = run(f"--run {{run}} {line}", run=tmp_path)
        assert result.output.splitlines() == ["Error: received"], result.output
        return received[0]

    return settings_of


def flat(options: PlanOptions) -> dict[str, Any]:
    values = asdict(options)
    return {**values.pop("search"), **values}


def protocol(name: str) -> dict[str, Any]:
    known = PROTOCOLS.get(name)
    assert known is not None
    return dict(known)


class TestProtocols:
    @pytest.mark.parametrize("name", PROTOCOLS)
    def test_every_value_arrives_and_no_other_changes(self, parse: Parse, name: str) -> None:
        assert flat(parse(f"--protocol {name}")) == flat(PlanOptions()) | protocol(name)

    def test_dino_wm_is_planned_as_in_the_reference(self, parse: Parse) -> None:
        options = parse("--protocol dino-wm")
        assert (options.objective, options.horizon, options.execute, options.observed) == ("last", 5, 5, 1)
        assert options.search == {"samples": 300, "elites": 30, "iterations": 10, "sigma": 0.577}

    @pytest.mark.parametrize("name", PROTOCOLS)
    @pytest.mark.parametrize(
        ("flags", "expected"),
        [
            ("--horizon 7", {"horizon": 7}),
            ("--objective all", {"objective": "all"}),
            ("--samples 12 --sigma 0.3", {"samples": 12, "sigma": 0.3}),
        ],
    )
    @pytest.mark.parametrize("order", ["{} --protocol {}", "--protocol {1} {0}"], ids=["before", "after"])
    def test_an_option_beside_a_protocol_wins(
        self, parse: Parse, name: str, flags: str, expected: dict[str, Any], order: str
    ) -> None:
        assert flat(parse(order.format(flags, name))) == flat(PlanOptions()) | protocol(name) | expected

    @pytest.mark.parametrize("solver", SOLVERS)
    def test_another_solver_receives_the_options_that_it_has(self, parse: Parse, solver: str) -> None:
        options = parse(f"--protocol dino-wm --solver {solver}")
        own = {field.name for field in fields(type(make_solver(solver)))}  # type: ignore[arg-type]
        search = {name: protocol("dino-wm")[name] for name in ("samples", "elites", "iterations", "sigma")}
        assert options.search == {name: value for name, value in search.items() if name in own}
        make_solver(solver, **options.search)

    def test_an_unknown_one_is_refused_with_those_that_exist(self, tmp_path: Path) -> None:
        result = run("--run {run} --protocol dreamer", run=tmp_path)
        assert result.exit_code == 2
        assert all(name in result.stderr.splitlines()[-1] for name in PROTOCOLS)


class TestOptions:
    def test_defaults_are_the_library_defaults(self, parse: Parse) -> None:
        assert parse("") == PlanOptions()

    @pytest.mark.parametrize(
        ("flags", "solver", "search"),
        [
            ("--solver gd --gd-steps 3 --gd-lr 0.5", "gd", {"steps": 3, "lr": 0.5}),
            ("--beta 1 --solver=icem", "icem", {"beta": 1.0}),
            ("--solver mppi --temperature 2", "mppi", {"temperature": 2.0}),
            ("--momentum 0.15", "cem", {"momentum": 0.15}),
            ("--samples 64", "cem", {"samples": 64}),
        ],
    )
    def test_a_solver_receives_the_options_that_are_given(
        self, parse: Parse, flags: str, solver: str, search: dict[str, float]
    ) -> None:
        options = parse(flags)
        assert (options.solver, options.search) == (solver, search)

    @pytest.mark.parametrize("solver", SOLVERS)
    def test_help_has_the_options_of_the_solver_and_all_names(self, solver: str) -> None:
        text = run(f"--solver {solver} --help").stdout
        assert ", ".join(SOLVERS) in text
        assert ("--gd-steps" in text, "--samples" in text) == (solver == "gd", solver != "gd")

    def test_goals_and_distances_arrive(self, parse: Parse) -> None:
        options = parse("--goals random-action --goal-steps 12 --distance graph --alpha 0.5 --context 3 --observed 2")
        assert (options.goals, options.goal_steps, options.distance) == ("random-action", 12, "graph")
        assert (options.alpha, options.context, options.observed) == (0.5, 3, 2)

    @pytest.mark.parametrize(
        "line", ["--alpha -1", "--goal-steps 0", "--threshold nan", "--episodes 0", "--objective mean", "--elites 1"]
    )
    def test_a_bad_value_has_exit_status_2(self, tmp_path: Path, line: str) -> None:
        result = run(f"--run {{run}} {line}", run=tmp_path)
        assert result.exit_code == 2
        assert line.split()[0] in result.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def planned(store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run; each test's results go to folders of their own."""
    path = tmp_path_factory.mktemp("runs") / "tiny"
    sizes = {"width": 16, "depth": 1, "heads": 2, "dropout": 0.0}
    train(store_path, path, TrainOptions(model_options=sizes, steps=4, batch=8, dtype="float32", device="cpu"))
    return path


class TestResults:
    def test_results_record_protocol_and_options(self, planned: Path, tmp_path: Path) -> None:
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
        # Reached and held are beside each other, each with its interval.
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

    def test_results_of_other_settings_are_not_overwritten(self, planned: Path, tmp_path: Path) -> None:
        line = f"--run {{run}} {QUICK} --out {{out}}"
        assert run(line, run=planned, out=tmp_path / "plan").exit_code == 0
        before = (tmp_path / "plan" / "results.json").read_bytes()
        for flags, named in (("--solver mppi", "solver cem != mppi"), ("--distance graph", "distance latent != graph")):
            result = run(f"{line} {flags}", run=planned, out=tmp_path / "plan")
            assert result.exit_code == 1
            assert named in result.stderr
            assert len(result.stderr.splitlines()) == 1
            assert f"--out {tmp_path / 'plan'}-2" in result.stderr
        assert (tmp_path / "plan" / "results.json").read_bytes() == before

    def test_results_from_before_strict_are_those_of_pairs_of_any_distance(self, tmp_path: Path) -> None:
        options = asdict(PlanOptions())
        del options["strict"]
        (tmp_path / "results.json").write_text(json.dumps({"options": options}))
        results.refuse_other_results(tmp_path, PlanOptions(strict=False))
        with pytest.raises(UserError, match="strict False != True"):
            results.refuse_other_results(tmp_path, PlanOptions())
        # The pairs of a file are the same either way.
        (tmp_path / "results.json").write_text(json.dumps({"options": {**options, "goals": "some.parquet"}}))
        results.refuse_other_results(tmp_path, PlanOptions(goals="some.parquet"))

    def test_a_sweep_writes_a_folder_for_each_setting(self, planned: Path) -> None:
        line = f"--run {{run}} {QUICK}"
        for flags in ("", "--samples 5", "--no-strict", "--seed 3"):
            assert run(f"{line} {flags}", run=planned).exit_code == 0
        assert len(list(planned.glob("plan-all-x1-*/results.json"))) == 4

    @pytest.mark.parametrize(
        ("flags", "named"),
        [
            ("--goals random-stat", ["random-state", "dataset", "random-action"]),
            ("--goals dataset --goal-steps 60", ["--goal-steps"]),
            ("--goals dataset --goal-steps 5", ["--goal-steps", "--no-strict"]),
            ("--threshold 9", ["--no-strict"]),
            ("--proprio none", ["wmtrain --proprio none"]),
            ("--observed 2", ["--context"]),
            ("--solver guess", ["guess", "cem", "icem", "mppi", "gd"]),
            ("--solver gd", ["gd", "--samples", "cem"]),
            ("--elites 7", ["7", "6"]),
            ("--execute 3", ["--execute 3", "--horizon"]),
            ("--mask --distance graph", ["--mask", "--distance graph"]),
        ],
    )
    def test_options_that_do_not_fit_are_one_line(
        self, planned: Path, tmp_path: Path, flags: str, named: list[str]
    ) -> None:
        result = run(f"--run {{run}} {QUICK} --out {{out}} {flags}", run=planned, out=tmp_path / "plan")
        assert result.exit_code == 1
        assert result.stdout == ""
        assert result.stderr.startswith("Error: ")
        assert all(word in result.stderr for word in named), result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert not (tmp_path / "plan").exists()


def test_planning_is_measured_against_the_reference(planned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert str(program) in result.stderr
