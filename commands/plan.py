"""wmplan: plan with a run, judge it, report it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import click
from click.core import ParameterSource

from wmcache import __version__
from wmcache.commands import shared
from wmcache.commands.command import Command, take_chosen
from wmcache.commands.options import ByName, Preset, options_of
from wmcache.commands.output import shell_command, show
from wmcache.common.options import declared
from wmcache.planner.options import PlanOptions
from wmcache.planner.protocols import PROTOCOLS

OPTIONS = tuple(known.name for known in declared(PlanOptions))
_solvers = partial(resolve_name, "wmcache.planner.solvers:SOLVERS")


def _policies() -> list[str]:
    """List the policies that are named alone; those of a folder are named by it."""
    from wmcache.planner.belief import FolderPolicy
    from wmcache.planner.policies import PLAN_POLICIES

    known = {name: PLAN_POLICIES.get(name) for name in PLAN_POLICIES}
    return [name for name, kind in known.items() if not (isinstance(kind, type) and issubclass(kind, FolderPolicy))]


@click.command(cls=Command, by=ByName("solver", "solver", _solvers, lambda name: _solvers().get(name)))
@click.version_option(__version__, prog_name="wmplan")
@shared.run_option("--run", type=shared.PATH, required=True, help="Folder of the run.")
@shared.run_option("--protocol", cls=Preset, presets=PROTOCOLS, help="A known evaluation; options beside it win.")
@options_of(PlanOptions, solver={"names": _solvers}, policy={"names": _policies})
@click.option("--untrained", is_flag=True, hidden=True)
@shared.moved_weights_option
@shared.moved_caches_option
@shared.file_option("--out", help="Folder of the results.  [default: RUN/plan-…, named by the settings]")
@shared.cluster_option(also="  Batches are the tasks; results are the same wherever they are planned.")
@shared.json_option
def wmplan(run: Path, **settings: Any) -> None:
    """Act with a trained world model or policy, judge it, and write a report."""
    from wmcache.planner.plan import plan_run

    chosen = PlanOptions(search=take_chosen(settings, given=True), **{name: settings.pop(name) for name in OPTIONS})
    source = click.get_current_context().get_parameter_source("solver")
    found = plan_run(
        run, chosen, command=shell_command(sys.argv), solver_given=source is ParameterSource.COMMANDLINE, **settings
    )
    show(found.values, _lines(found.values, found.path))


def _lines(results: dict[str, Any], out: Path) -> Iterator[str]:
    from wmcache.planner.report import actors_of

    actors = actors_of(results)
    yield from _returns(actors) if "return" in results else _reached(results, actors)
    cost = f"{results['replans']} replans at {results['seconds_per_replan']:.3f} s"
    yield f"{results['budget_env_steps']} env steps an episode, {cost}, {results['encoder_frames']} frames encoded"
    yield f"report: {out / 'report.html'}"


def _returns(actors: dict[str, Any]) -> Iterator[str]:
    yield f"{'actions':9} {'mean return':>12} {'95 % interval':>22} {'lowest':>10} {'highest':>10}"
    for name, row in actors.items():
        interval = "-" if row["ci95"] is None else "{:.2f} to {:.2f}".format(*row["ci95"])
        yield f"{name:9} {row['mean']:>12.2f} {interval:>22} {row['lowest']:>10.2f} {row['highest']:>10.2f}"


def _reached(results: dict[str, Any], actors: dict[str, Any]) -> Iterator[str]:
    from wmcache.planner.report import tasks_of

    head = f"{'within':>6} {'actions':9} {'reached':>12} {'95 % interval':>15} {'held at the end':>15} {'95 % interval':>15}"
    yield f"{head} {'env steps':>9} {'path':>5}"
    for judged in zip(*actors.values(), strict=True):
        for name, row in zip(actors, judged, strict=True):
            reached, held = (f"{row[count]} of {results['episodes']}" for count in ("successes", "held"))
            interval, held_interval = ("{:.3f} - {:.3f}".format(*row[name]) for name in ("ci95", "held_ci95"))
            path = "-" if row["path_ratio"] is None else f"{row['path_ratio']:.2f}"
            line = f"{row['threshold']:>6} {name:9} {reached:>12} {interval:>15} {held:>15} {held_interval:>15}"
            yield f"{line} {row['mean_env_steps']:>9.1f} {path:>5}"
    for task, by_actor in tasks_of(results).items():
        counts = (f"{name} {row['successes']} of {row['episodes']}" for name, row in by_actor.items())
        yield f"task {task}: {', '.join(counts)}"
    began = ", ".join(f"{count} within {threshold}" for threshold, count in results["began_at_goal"].items())
    left = ", ".join(f"{name} {rows[0]['mean_distance']:.3f}" for name, rows in actors.items())
    yield f"began at the goal: {began}, of {results['episodes']} episodes; mean distance at the end: {left}"
