"""wmplan: plan with a run, judge it, report it."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from wmcache import __version__
from wmcache.commands.command import Command, take_chosen
from wmcache.commands.options import ByName, Option, Preset, options_of
from wmcache.commands.output import print_json, say, shell_command
from wmcache.commands.shared import PATH, cluster_option, json_option, moved_cache_option, moved_weights_option
from wmcache.common.paths import AnyPath
from wmcache.planner.options import PlanOptions
from wmcache.planner.protocols import PROTOCOLS


def _solvers() -> Iterable[str]:
    from wmcache.planner.solvers import SOLVERS

    return SOLVERS


def _solver_options(name: str) -> type:
    from wmcache.planner.solvers import make_solver

    return type(make_solver(name))


@click.command(cls=Command, by=ByName("solver", "solver", names=_solvers, options=_solver_options))
@click.version_option(__version__, prog_name="wmplan")
@click.option("--run", cls=Option, group="Run", type=PATH, required=True, help="Folder of the run.")
@click.option(
    "--protocol", cls=Preset, group="Run", presets=PROTOCOLS, help="A known evaluation; options beside it win."
)
@options_of(PlanOptions, solver={"names": _solvers})
@click.option(
    "--untrained", is_flag=True, help="Evaluate the model with random weights too, as a baseline; takes as long again."
)
@moved_weights_option
@moved_cache_option
@click.option("--out", type=PATH, help="Folder of the results.  [default: RUN/plan-…, named by the settings]")
@cluster_option(also="  Batches are the tasks; results are the same wherever they are planned.")
@json_option
def wmplan(
    run: Path,
    protocol: str | None,
    weights: Path | None,
    cache: AnyPath | None,
    out: Path | None,
    untrained: bool,
    cluster: str,
    as_json: bool,
    **settings: Any,
) -> None:
    """Plan with a trained world model, judge it, and write a report."""
    from wmcache.common.video import ffmpeg
    from wmcache.planner.context import EvalContext
    from wmcache.planner.evaluate import evaluate
    from wmcache.planner.report import write_report
    from wmcache.planner.results import default_out, refuse_other_results

    ffmpeg()  # the report has videos; a missing program is reported before any work
    chosen = PlanOptions(search=take_chosen(settings, given=True), **settings)
    out = out or default_out(run, protocol, chosen)
    refuse_other_results(out, chosen)
    setting = EvalContext(run, chosen, weights=weights, cache=cache)
    episodes, results = evaluate(setting, chosen, out, cluster)
    if untrained:
        random_model = EvalContext(run, chosen, weights=weights, cache=cache, untrained=True)
        results["baselines"]["untrained"] = evaluate(random_model, chosen, out, cluster)[1]["by_threshold"]
    results = {"protocol": protocol, **results}
    results = write_report(out, run, setting, episodes, results, shell_command(sys.argv))
    if as_json:
        print_json(results)
        return
    _print_table(results)
    click.echo(
        f"{results['budget_env_steps']} env steps an episode, {results['replans']} replans at {results['seconds_per_replan']:.3f} s, "
        f"{results['encoder_frames']} frames encoded"
    )
    say(f"report: {out / 'report.html'}")


def _print_table(results: dict[str, Any]) -> None:
    """Print what the planner and the baselines reached and held within each threshold, a line each."""
    actors = {"planner": results["by_threshold"], **results["baselines"]}
    head = f"{'within':>6} {'actions':9} {'reached':>12} {'95 % interval':>15} {'held at the end':>15} {'95 % interval':>15}"
    click.echo(f"{head} {'env steps':>9} {'path':>5}")
    for judged in zip(*actors.values(), strict=True):
        for name, row in zip(actors, judged, strict=True):
            counts = (f"{row[count]} of {results['episodes']}" for count in ("successes", "held"))
            intervals = ("{:.3f} - {:.3f}".format(*row[interval]) for interval in ("ci95", "held_ci95"))
            reached, held, interval, held_interval = *counts, *intervals
            path = "-" if row["path_ratio"] is None else f"{row['path_ratio']:.2f}"
            line = f"{row['threshold']:>6} {name:9} {reached:>12} {interval:>15} {held:>15} {held_interval:>15}"
            click.echo(f"{line} {row['mean_env_steps']:>9.1f} {path:>5}")
    began = ", ".join(f"{count} within {threshold}" for threshold, count in results["began_at_goal"].items())
    click.echo(f"began at the goal: {began}, of {results['episodes']} episodes")
