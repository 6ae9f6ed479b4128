"""wmplan on the command line: protocols and the options beside them, solvers and their options, and the results on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from wmcache.common.errors import UserError
from wmcache.planner.options import PlanOptions, refuse_other_results
from wmcache.planner.protocols import PROTOCOLS
from wmcache.planner.solvers import SOLVERS, make_solver, option_names
from wmcache.trainer.train import train

from .conftest import TINY, error_of, flat, parser, run, succeed

Parse = Callable[[str], PlanOptions]
QUICK = "wmplan --run {run} --episodes 2 --budget 10 --horizon 2 --samples 6 --elites 2 --iterations 1 --device cpu"


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Parse:
    return parser(monkeypatch, "wmcache.planner.plan.EvalContext", PlanOptions, "wmplan --run nowhere")


class TestProtocols:
    def test_dino_wm_is_planned_as_in_the_reference(self, parse: Parse) -> None:
        options = parse("--protocol dino-wm")
        assert (options.objective, options.horizon, options.execute, options.observed) == ("last", 5, 5, 1)
        assert options.search == {"samples": 300, "elites": 30, "iterations": 10, "sigma": 0.577}

    @pytest.mark.parametrize("name", list(PROTOCOLS))
    @pytest.mark.parametrize(
        ("flags", "expected"),
        [
            ("", {}),
            ("--horizon 7", {"horizon": 7}),
            ("--objective all", {"objective": "all"}),
            ("--samples 12 --sigma 0.3", {"samples": 12, "sigma": 0.3}),
        ],
    )
    @pytest.mark.parametrize("order", ["{} --protocol {}", "--protocol {1} {0}"], ids=["before", "after"])
    def test_every_value_arrives_and_an_option_beside_a_protocol_wins(
        self, parse: Parse, name: str, flags: str, expected: dict[str, Any], order: str
    ) -> None:
        assert flat(parse(order.format(flags, name)), "search") == {
            **flat(PlanOptions(), "search"),
            **PROTOCOLS.get(name),
            **expected,
        }

    @pytest.mark.parametrize("solver", list(SOLVERS))
    def test_another_solver_receives_the_options_that_it_has(self, parse: Parse, solver: str) -> None:
        options = parse(f"--protocol dino-wm --solver {solver}")
        search = {name: PROTOCOLS.get("dino-wm")[name] for name in ("samples", "elites", "iterations", "sigma")}
        assert options.search == {name: value for name, value in search.items() if name in option_names(solver)}
        make_solver(solver, **options.search)


class TestOptions:
    @pytest.mark.parametrize(
        ("flags", "solver", "search"),
        [
            ("", "cem", {}),
            ("--solver gd --gd-steps 3 --gd-lr 0.5", "gd", {"steps": 3, "lr": 0.5}),
            ("--beta 1 --solver=icem", "icem", {"beta": 1.0}),
            ("--solver mppi --temperature 2", "mppi", {"temperature": 2.0}),
            ("--momentum 0.15 --maxnorm 0.5", "cem", {"momentum": 0.15, "maxnorm": 0.5}),
            ("--samples 64", "cem", {"samples": 64}),
        ],
    )
    def test_a_solver_receives_the_options_that_are_given(
        self, parse: Parse, flags: str, solver: str, search: dict[str, float]
    ) -> None:
        assert parse(flags) == PlanOptions(solver=solver, search=search)

    @pytest.mark.parametrize("solver", list(SOLVERS))
    def test_help_has_the_options_of_the_solver_and_all_names(self, solver: str) -> None:
        text = run(f"wmplan --solver {solver} --help").stdout
        assert ",".join(SOLVERS) in "".join(text.split())  # lines break at spaces and hyphens
        assert ("--gd-steps" in text, "--samples" in text) == (solver == "gd", solver != "gd")


@pytest.fixture(scope="module")
def planned(store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run; each test's results go to folders of their own."""
    path = tmp_path_factory.mktemp("runs") / "tiny"
    train(store_path, path, TINY)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "plan"


def results_in(folder: Path) -> Any:
    return json.loads((folder / "results.json").read_text())


class TestResults:
    def test_results_record_protocol_and_options(self, planned: Path, out: Path) -> None:
        line = f"{QUICK} --protocol mpc-100 --goals random-action --goal-steps 6 --no-strict --out {{out}}"
        succeed(line, run=planned, out=out)
        written = results_in(out)
        assert written["protocol"] == "mpc-100"
        search = {"samples": 6, "elites": 2, "iterations": 1}
        goals = {"goals": "random-action", "goal_steps": 6, "strict": False}
        expected = PlanOptions(episodes=2, budget=10, horizon=2, search=search, device="cpu", threshold=0.5, **goals)  # type: ignore[arg-type]
        assert written["options"] == asdict(expected)
        assert written["candidates_per_replan"] == 6

    def test_the_table_has_a_line_for_each_threshold_and_the_untrained_baseline(self, planned: Path, out: Path) -> None:
        result = succeed(f"{QUICK} --out {{out}} --untrained", run=planned, out=out)
        header, *rows = result.stdout.splitlines()
        actors, thresholds = ["planner", "random", "zero", "untrained"], [0.5, 0.25, 0.1]
        assert [row.split()[:2] for row in rows[:12]] == [
            [str(within), name] for within in thresholds for name in actors
        ]
        assert "began at the goal: 0 within 0.5" in rows[12]
        assert "4 replans" in rows[13]
        # Reached and held are beside each other, each with its interval.
        assert header.index("reached") < header.index("95 %") < header.index("held") < header.rindex("95 %")
        assert [row["threshold"] for row in results_in(out)["baselines"]["untrained"]] == thresholds
        assert "untrained" in (out / "report.html").read_text()
        assert not list(out.glob("unfinished-*"))

    def test_its_own_episodes_can_be_planned_again(self, planned: Path, tmp_path: Path, out: Path) -> None:
        line = f"{QUICK} --json --out {{out}}"
        first = succeed(line, run=planned, out=out)
        again = succeed(f"{line} --goals {out / 'episodes.parquet'}", run=planned, out=tmp_path / "two")
        assert json.loads(first.stdout) == results_in(out)
        assert json.loads(again.stdout)["by_threshold"] == results_in(out)["by_threshold"]

    def test_results_of_other_settings_are_not_overwritten(self, planned: Path, out: Path) -> None:
        line = f"{QUICK} --out {{out}}"
        succeed(line, run=planned, out=out)
        before = (out / "results.json").read_bytes()
        for flags, named in (("--solver mppi", "solver cem != mppi"), ("--distance graph", "distance latent != graph")):
            error = error_of(run(f"{line} {flags}", run=planned, out=out))
            assert named in error
            assert f"--out {out}-2" in error
        assert (out / "results.json").read_bytes() == before

    def test_results_from_before_strict_are_those_of_pairs_of_any_distance(self, tmp_path: Path) -> None:
        options = asdict(PlanOptions())
        del options["strict"]
        (tmp_path / "results.json").write_text(json.dumps({"options": options}))
        refuse_other_results(tmp_path, PlanOptions(strict=False))
        with pytest.raises(UserError, match="strict False != True"):
            refuse_other_results(tmp_path, PlanOptions())
        # The pairs of a file are the same either way.
        (tmp_path / "results.json").write_text(json.dumps({"options": {**options, "goals": "some.parquet"}}))
        refuse_other_results(tmp_path, PlanOptions(goals="some.parquet"))


@pytest.mark.parametrize(
    "line", ["wmplan --run nowhere", "wmcache imagine --run nowhere --decoder nowhere --cache {store}"]
)
def test_a_missing_ffmpeg_is_named_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store_path: Path, line: str
) -> None:
    program = tmp_path / "no ffmpeg"
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))
    assert str(program) in error_of(run(line, store=store_path))
