"""wmcache traverse: what each latent of a store draws."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from wmcache.commands.command import Command
from wmcache.commands.options import options_of
from wmcache.commands.output import show
from wmcache.commands.shared import device_option, file_option, json_option, moved_dataset_option, path_option
from wmcache.common.paths import AnyPath, beside
from wmcache.planner.options import TraverseOptions


@click.command(cls=Command)
@path_option("--cache", required=True, help="The token store, of one token a frame.")
@options_of(TraverseOptions)
@file_option("--decoder", help="Folder of a decoder, for an encoder that has none of its own.")
@moved_dataset_option
@file_option("--weights", "--encoder-weights", "weights", help="Location of the encoder's weights, if they have moved.")
@device_option
@file_option("--out", help="The PNG to write.  [default: the store's path, with .traverse.png for .zarr]")
@json_option
def traverse(
    cache: AnyPath,
    decoder: Path | None,
    dataset: AnyPath | None,
    weights: Path | None,
    device: str,
    out: Path | None,
    **settings: Any,
) -> None:
    """Draw a frame while one latent of it is moved, a row for each latent; what was drawn is in a JSON file beside the picture.

    Latents of the largest variance over the store come first. A store with a state also shows how much each latent knows of it.
    """
    from wmcache.planner.traverse import traverse as run

    out = out or beside(cache, ".traverse.png")
    options = TraverseOptions(**settings)
    result = run(cache, out, options, dataset=dataset, weights=weights, decoder=decoder, device=device)
    show(result, _lines(result))


def _lines(result: dict[str, Any]) -> Iterator[str]:
    from wmcache.planner.traverse import most_informed

    yield f"{'latent':>6} {'std':>8} {'change':>8}  knows most of"
    for latent in result["latents"]:
        about = most_informed(latent)
        shown = "-" if about is None else f"{about[0]} {about[1]:.3f}"
        yield f"{latent['latent']:>6} {latent['std']:>8.3f} {latent['change']:>8.5f}  {shown}"
    yield "change: mean absolute difference of the moved images from the one not moved, of values from 0 to 1"
    yield f"picture: {result['picture']}"
