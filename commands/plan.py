"""wmplan: plan with a run, judge it, report it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
from wmcache import __version__
from wmcache.commands.shared import CONTEXT, PATH, Command, device_option, json_option, shell_command


@click.command(cls=Command, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="wmplan")
@click.option("--run", type=PATH, required=True, help="Folder of the run.")
@click.option("--episodes", type=int, default=50, help="How many; start and goal of each are random.")
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
@click.option("--context", type=int, default=1, help="Frames that an imagined step sees.")
@click.option("--samples", type=int, default=64, help="Candidates an iteration; DINO-WM has 300.")
@click.option("--elites", type=int, default=6, help="Of them; DINO-WM has 30.")
@click.option("--iterations", type=int, default=5, help="Of the cross-entropy method; DINO-WM has 10.")
@click.option("--sigma", type=float, default=0.4, help="First standard deviation of the candidates, in env units.")
@click.option("--batch-size", "batch", type=int, default=50, help="Episodes planned at once.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Number of the first episode.")
@click.option("--env", help="Another maze than the data's.")
@click.option("--weights", type=PATH, help="The encoder's weights, if they have moved.")
@click.option("--cache", type=PATH, help="The store, if it has moved.")
@click.option("--dtype", default="auto", help="Of the model: auto, float32 or bfloat16.")
@device_option
@click.option(
    "--out", type=PATH, help="Folder of the results.  [default: RUN/plan-<objective>-x<execute>-<episodes>x<budget>]"
)
@json_option
def wmplan(
    run: Path, weights: Path | None, cache: Path | None, out: Path | None, as_json: bool, **settings: Any
) -> None:
    """Plan with a trained world model, judge it, and write a report."""
    from wmcache.planner.evaluate import PlanOptions, Setting, evaluate, refuse_other_results
    from wmcache.planner.report import write_report

    chosen = PlanOptions(**settings)
    maze = f"-{Path(chosen.env).stem}" if chosen.env else ""
    out = out or run / f"plan-{chosen.objective}-x{chosen.execute}-{chosen.episodes}x{chosen.budget}{maze}"
    refuse_other_results(out, chosen)
    setting = Setting(run, chosen, weights=weights, cache=cache)
    episodes, results = evaluate(setting, chosen, out)
    write_report(out, run, setting, episodes, results, shell_command(sys.argv))
    if as_json:
        click.echo(json.dumps(results, indent=2))
        return
    click.echo(f"{'threshold':>9} {'reached':>12} {'rate':>6} {'95 % interval':>16} {'env steps':>10} {'held':>5}")
    for row in results["by_threshold"]:
        reached = f"{row['successes']} of {results['episodes']}"
        interval = "{:.3f} to {:.3f}".format(*row["ci95"])
        rate, steps = f"{row['success_rate']:>6.3f}", f"{row['mean_env_steps']:>10.1f}"
        click.echo(f"{row['threshold']:>9} {reached:>12} {rate} {interval:>16} {steps} {row['held']:>5}")
    click.echo(
        f"{results['budget_env_steps']} env steps an episode, {results['replans']} replans at {results['seconds_per_replan']:.3f} s, "
        f"{results['encoder_frames']} frames encoded"
    )
    click.echo(f"report: {out / 'report.html'}")
