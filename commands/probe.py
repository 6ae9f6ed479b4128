"""wmcache probe: how much of what a planner needs is in a store's tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click
from wmcache.cache.places import Place
from wmcache.commands.shared import PATH, PLACE, Command, json_option, say

if TYPE_CHECKING:
    from wmcache.pipeline.probe import Probe

COLUMNS = {
    name: max(7, len(name) + 2)
    for name in (
        *("xy lin", "xy MLP", "v lin", "v MLP", "Spearman", "stuck"),
        *("nearest", "90 %", "rank", "channels", "moves"),
    )
}


@click.command("probe", cls=Command)
@click.argument("stores", metavar="STORE...", type=PLACE, nargs=-1, required=True)
@click.option("--dataset", type=PLACE, help="The frames, to take the maze from where the store does not tell it.")
@click.option(
    "--frames", type=click.IntRange(1), default=2000, help="Training frames that the probes learn from, at most."
)
@click.option(
    "--out", type=PATH, help="Folder for the pictures.  [default: beside each STORE, with .probe.png for .zarr]"
)
@json_option
def probe(stores: tuple[Place, ...], dataset: Place | None, frames: int, out: Path | None, as_json: bool) -> None:
    """Measure what a planner can read out of token stores; figures of held-out episodes, and a picture of each.

    xy, v: R^2 of positions and velocities by ridge regression and by a small network; of the whole state where there is no maze. Spearman,
    stuck: how well token distance ranks true distance, and where descending it does not arrive. nearest: distance in the maze to the frame
    with the nearest tokens, median and 90 % quantile. rank, channels: how many dimensions frames and single tokens take up. moves: what
    changes in 5 env steps, as a share of the variance.
    """
    from wmcache.pipeline.probe import draw_probe, picture_paths
    from wmcache.pipeline.probe import probe as run

    pictures = picture_paths(stores, out)
    found = []
    if not as_json:
        click.echo(row(list(COLUMNS), "store"))
    for store, picture in zip(stores, pictures, strict=True):
        result = run(store, dataset=dataset, frames=frames)
        if drawn := result.nearest is not None:
            draw_probe(store, picture, dataset=dataset)
        found.append({**result.to_json(), "picture": str(picture) if drawn else None})
        if not as_json:
            say(row(cells(result), "/".join(store.parts[-2:])))
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for values in found:
        said = (
            f"drawn: {values['picture']}"
            if values["picture"]
            else "not drawn: no maze is known, so no true distance is"
        )
        say(f"{values['store']}: {said}", err=True)


def row(values: list[str], store: str) -> str:
    """A line of the table."""
    return "".join(f"{value:>{width}}" for value, width in zip(values, COLUMNS.values(), strict=True)) + f"  {store}"


def cells(found: Probe) -> list[str]:
    """The row of a table, `-` for what is not known; each R^2 is a mean over columns of the state."""
    velocities = [name for name in found.linear if name in ("vx", "vy")]
    others = [name for name in found.linear if name not in velocities]
    values: list[float | None] = []
    for names in (others, velocities):
        for scores in (found.linear, found.mlp):
            known = [value for name in names if (value := scores[name]) is not None]
            values.append(sum(known) / len(known) if known else None)
    values += [found.spearman, found.stuck, found.nearest, found.nearest_90]
    rounded = ["-" if value is None else f"{value:.3f}" for value in (*values, found.moves)]
    return [*rounded[:-1], f"{found.effective_rank:.1f}", f"{found.channels:.1f}", rounded[-1]]
