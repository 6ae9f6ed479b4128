"""wmcache probe: how much of what a planner needs is in the tokens of a store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wmcache.commands.command import Command
from wmcache.commands.output import say, show
from wmcache.commands.shared import ANY_PATH, count_option, file_option, json_option, path_option
from wmcache.common.paths import AnyPath, as_path

if TYPE_CHECKING:
    from wmcache.pipeline.probe import Probe

LEGEND = {
    "xy lin": "R^2 of the position by ridge regression, mean of x and y: 1 is perfect, 0 no better than the mean",
    "xy MLP": "the same by a network with one hidden layer",
    "v lin": "R^2 of the velocity by ridge regression, mean of vx and vy; a single frame does not show it",
    "v MLP": "the same by a network with one hidden layer",
    "Spearman": "rank correlation of token distance and the length of the shortest path: 1 is perfect",
    "stuck": "share of frames from which descending the token distance does not reach the goal",
    "nearest": "distance of the position to that of the frame with the nearest tokens, median",
    "90 %": "the same, 90 % quantile",
    "rank": "effective rank: how many dimensions the frames take up",
    "channels": "participation ratio: how many channels single tokens use",
    "moves": "what changes in 5 env steps, as a share of the variance of the frames",
}
"""Header -> what it means; docs/encoders.md has the same list."""
MIG = "mutual information gap: share of a column's entropy that one channel knows beyond every other; 1 is best"


@click.command("probe", cls=Command)
@click.argument("stores", metavar="STORE...", type=ANY_PATH, nargs=-1, required=True)
@path_option("--dataset", help="The frames, to take the environment's layout from if the store has none.")
@count_option("--frames", default=2000, help="Training frames for the probes, at most.")
@file_option("--out", help="Folder for the pictures.  [default: beside each STORE, with .probe.png for .zarr]")
@json_option
def probe(stores: tuple[AnyPath, ...], dataset: AnyPath | None, frames: int, out: Path | None) -> None:
    """Measure what a planner can read out of token stores, on held-out episodes, and draw a picture of each.

    A row per store. The figures of each state column follow: the R^2 without a geometry, and the mutual information gap where a frame is
    one token. The output ends with what each header means.
    """
    from wmcache.cache.store import TokenStore
    from wmcache.pipeline.pictures import draw_probe, picture_paths
    from wmcache.pipeline.probe import probe as run

    pictures = picture_paths(stores, out)
    for store in stores:  # refused here, before any work
        TokenStore.open(store)
    found: list[dict[str, Any]] = []
    lines = [row(list(LEGEND), "store")]
    for store, picture in zip(stores, pictures, strict=True):
        result = run(store, dataset=dataset, frames=frames)
        if is_drawn := result.nearest is not None:
            draw_probe(store, picture, dataset=dataset)
        found.append({**result.to_json(), "picture": str(picture) if is_drawn else None})
        lines.append(row(cells(result), "/".join(store.parts[-2:])))
    show(found, [*lines, *_explanations(found)])
    for values in found:
        say(f"{values['store']}: drawn: {values['picture'] or 'nothing, no shortest paths are known'}", err=True)


def _explanations(found: list[dict[str, Any]]) -> Iterator[str]:
    """Format what the headers do not show of each store: the columns of its state, and what the headers mean."""
    for values in found:
        if values["linear"] and (values["gaps"] or "x" not in values["linear"]):
            yield from _columns(values)
    yield from ("", *(f"{name:8}  {meaning}" for name, meaning in LEGEND.items()), "-         not known")
    yield f"MIG       {MIG}"
    if without := ["/".join(as_path(values["store"]).parts[-2:]) for values in found if values["mig"] is None]:
        yield f"no MIG    {', '.join(without)}: it needs a state, and one token a frame, of several channels"


def _columns(values: dict[str, Any]) -> Iterator[str]:
    """Format the figures of each state column of a store, a line each, and their means where gaps are known."""
    figures = {"lin": values["linear"], "MLP": values["mlp"]} | ({"MIG": values["gaps"]} if values["gaps"] else {})
    lines = {name: [figure[name] for figure in figures.values()] for name in values["linear"]}
    if values["gaps"]:
        lines["mean"] = [mean_known(figure.values()) for figure in figures.values()]
    width = max(map(len, ("column", *lines)))
    yield from ("", f"R^2{' and MIG' * bool(values['gaps'])} of each state column: {values['store']}")
    yield f"{'column':{width}}" + "".join(f" {title:>8}" for title in figures)
    for name, line in lines.items():
        yield f"{name:{width}}" + "".join(f" {rounded(value):>8}" for value in line)


def mean_known(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are known; None where none is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def row(values: list[str], store: str) -> str:
    """Format a line of the table; a value that is wider than its column moves the others."""
    return " ".join(f"{value:>{max(7, len(name))}}" for value, name in zip(values, LEGEND, strict=True)) + f"  {store}"


def rounded(value: float | None) -> str:
    """Format a figure of the tables."""
    return "-" if value is None else f"{value:.3f}"


def cells(found: Probe) -> list[str]:
    """Format the cells of a row, `-` for what is not known; each R^2 is a mean over two columns of the state."""
    values: list[float | None] = []
    for names in (("x", "y"), ("vx", "vy")):
        values += [mean_known(scores.get(name) for name in names) for scores in (found.linear, found.mlp)]
    values += [found.spearman, found.stuck, found.nearest, found.nearest_90]
    return [*map(rounded, values), f"{found.effective_rank:.1f}", f"{found.channels:.1f}", rounded(found.moves)]
