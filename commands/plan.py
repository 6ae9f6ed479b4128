"""wmplan: plan with a run, judge it, report it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from wmcache import __version__
from wmcache.commands.shared import (
    ANY_PATH,
    PATH,
    Command,
    cluster_option,
    device_option,
    json_option,
    options,
    preset_option,
    print_json,
    say,
    shell_command,
)
from wmcache.common.paths import AnyPath
from wmcache.planner.protocols import PROTOCOLS

SEARCH = {
    "samples": ("--samples", int, "Candidates in each iteration (cem, icem, mppi); DINO-WM has 300."),
    "elites": ("--elites", int, "Best candidates of each iteration (cem, icem, mppi); DINO-WM has 30."),
    "iterations": ("--iterations", int, "Iterations of the search (cem, icem, mppi); DINO-WM has 10."),
    "sigma": ("--sigma", float, "First standard deviation of the candidates, in env units."),
    "momentum": ("--momentum", float, "Momentum of mean and deviation (cem, icem)."),
    "temperature": ("--temperature", float, "Temperature of the candidates' weights (mppi)."),
    "beta": ("--beta", float, "Colour of the noise (icem); 0 is white."),
    "optimiser": ("--optimiser", click.Choice(["sgd", "adam"]), "Optimiser of gradient descent (gd); DINO-WM has sgd."),
    "steps": ("--gd-steps", int, "Steps of gradient descent (gd); DINO-WM has 1000."),
    "lr": ("--gd-lr", float, "Learning rate of gradient descent (gd)."),
    "restarts": ("--restarts", int, "First guesses that are optimised side by side (gd)."),
    "noise": ("--noise", float, "Noise added after each step (gd); DINO-WM has 0.003."),
}
"""Options of the solvers: field -> flag, type, help. What is not given is the solver's own default."""

search_options = options(
    *(click.option(flag, f"search_{name}", type=kind, help=text) for name, (flag, kind, text) in SEARCH.items())
)


@click.command(cls=Command)
@click.version_option(__version__, prog_name="wmplan")
@preset_option(
    "--protocol", {name: PROTOCOLS.get(name) for name in PROTOCOLS}, "A known evaluation; what is given beside it wins."
)
@click.option("--run", type=PATH, required=True, help="Folder of the run.")
@click.option("--episodes", type=int, default=50, help="Episodes to plan.")
@click.option(
    "--goals", default="random-state", help="Starts and goals: random-state, dataset, random-action, or a Parquet file."
)
@click.option(
    "--goal-steps", type=int, help="Env steps from start to goal (dataset, random-action).  [default: the horizon's]"
)
@click.option(
    "--strict/--no-strict",
    default=True,
    help="Draw start and goal at least the largest reported threshold and one model step apart, or anywhere (DINO-WM).",
)
@click.option("--budget", type=int, default=100, help="Env steps of each episode.")
@click.option(
    "--threshold",
    type=float,
    default=0.5,
    help="Distance below which a goal is reached; 0.5, 0.25 and 0.1 are always reported.",
)
@click.option("--horizon", type=int, default=5, help="Model steps of a plan.")
@click.option("--execute", type=int, default=1, help="Model steps before the next plan.")
@click.option(
    "--objective",
    type=click.Choice(["last", "all"]),
    default="all",
    help="Score the last imagined frame (DINO-WM) or all.",
)
@click.option(
    "--distance",
    type=click.Choice(["latent", "graph"]),
    default="latent",
    help="Distance to the goal: between latents (DINO-WM), or along the cached frames, for goals beyond the horizon.",
)
@click.option("--alpha", type=float, default=0.0, help="Weight of proprio; above 0 the goal is more than an image.")
@click.option(
    "--mask", is_flag=True, help="Score only tokens in which the present frame and the goal's differ (DDP-WM)."
)
@click.option(
    "--proprio", type=click.Choice(["auto", "none"]), default="auto", help="none: refuse a model that sees proprio."
)
@click.option("--context", type=int, help="Frames that an imagined step sees.  [default: 1; without proprio all]")
@click.option("--observed", type=int, help="Live frames that a plan starts from.  [default: 1; without proprio all]")
@click.option("--solver", default="cem", help="Solver: cem, icem, mppi or gd.")
@search_options
@click.option("--batch-size", "batch", type=int, default=50, help="Episodes planned at once.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Number of the first episode.")
@click.option(
    "--untrained", is_flag=True, help="Evaluate the model with random weights too, as a baseline; takes as long again."
)
@click.option("--env", help="Maze to plan in, instead of the data's.")
@click.option("--weights", type=PATH, help="The encoder's weights, if they have moved.")
@click.option("--cache", type=ANY_PATH, help="The store, if it has moved.")
@click.option("--dtype", default="auto", help="Precision of the model: auto, float32 or bfloat16.")
@device_option
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
    from wmcache.planner.options import PlanOptions
    from wmcache.planner.report import write_report
    from wmcache.planner.results import default_out, refuse_other_results

    ffmpeg()  # the report has videos; a missing one is reported before any work
    search = take_search(settings)
    chosen = PlanOptions(search=search, **settings)
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
    """What was reached and held within each threshold, by the planner and by the baselines; a line each."""
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


def take_search(settings: dict[str, Any]) -> dict[str, Any]:
    """The solver's options, taken out of the command's settings. What a protocol says of its own solver is no word on another."""
    from dataclasses import fields

    from wmcache.planner.solvers import SOLVERS

    given = click.get_current_context().get_parameter_source
    known = (
        {field.name for field in fields(SOLVERS.get(settings["solver"]))} if settings["solver"] in SOLVERS else set()
    )
    search = {name: value for name in SEARCH if (value := settings.pop(f"search_{name}")) is not None}
    from_protocol = {name for name in search if given(f"search_{name}") == ParameterSource.DEFAULT_MAP}
    return {name: value for name, value in search.items() if name in known or name not in from_protocol}
