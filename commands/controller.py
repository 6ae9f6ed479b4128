"""wmcache controller: a linear controller on what a world model remembers, trained by CMA-ES."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from wmcache.commands import shared
from wmcache.commands.command import Command
from wmcache.commands.options import options_of
from wmcache.commands.output import show
from wmcache.common.errors import command
from wmcache.planner.controllers.options import ControllerOptions


@click.command(cls=Command)
@shared.run_option("--run", type=shared.PATH, required=True, help="Folder of the world model's run.")
@options_of(ControllerOptions)
@shared.moved_weights_option
@shared.file_option("--out", help="Folder of the controller.  [default: RUN/controller]")
@shared.cluster_option(also="  Candidates in real episodes are the tasks.")
@shared.json_option
def controller(run: Path, out: Path | None, cluster: str, weights: Path | None, **settings: Any) -> None:
    """Train a linear controller by CMA-ES, in a world model's dream or in the real environment.

    Run again, it goes on where it stopped.
    """
    from wmcache.planner.controllers.train import train_controller

    out = out or run / "controller"
    result = train_controller(run, ControllerOptions(**settings), out, cluster=cluster, weights=weights)
    show(result, _lines(result, run, out))


def _lines(result: dict[str, Any], run: Path, out: Path) -> Iterator[str]:
    early = f", stopped by {', '.join(result['stopped'])}" if result["stopped"] else ""
    yield f"{out}: {result['parameters']} parameters, {result['generation']} generations{early}"
    yield f"last generation: best {result['best']:.2f}, mean {result['mean']:.2f}, worst {result['worst']:.2f}"
    if check := result.get("check"):
        yield f"mean parameters in the real environment: {check['mean']:.2f}"
    yield f"act with it: {command('wmplan', '--run', run, '--policy', out)}"
