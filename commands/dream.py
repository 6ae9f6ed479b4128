"""wmcache dream: episodes that a world model imagines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from wmcache.commands.command import Command
from wmcache.commands.options import options_of
from wmcache.commands.output import show
from wmcache.commands.shared import file_option, json_option, moved_caches_option, moved_weights_option
from wmcache.common.paths import AnyPath
from wmcache.planner.options import DreamOptions


@click.command(cls=Command)
@file_option("--run", required=True, help="Folder of the world model's run.")
@options_of(DreamOptions)
@file_option("--decoder", help="Folder of a decoder, for an encoder that has none of its own.")
@moved_weights_option
@moved_caches_option
@file_option("--out", help="Folder of the results.  [default: RUN/dream-…, named by policy and temperature]")
@json_option
def dream(
    run: Path, decoder: Path | None, weights: Path | None, cache: tuple[AnyPath, ...], out: Path | None, **settings: Any
) -> None:
    """Play episodes in the imagination of a world model: how long they last, what they return, a video and a picture.

    An episode starts from a real frame and ends where the model imagines its end. Where the model imagines neither reward nor end, the
    reward is minus the distance to a held-out frame.
    """
    from wmcache.planner.dream_play import play_dreams

    options, usual = DreamOptions(**settings), DreamOptions()
    if out is None:
        temperature = "" if options.temperature is None else f"{options.temperature:g}"
        policy = "" if options.policy == usual.policy else Path(options.policy).absolute().name
        out = run / "-".join(filter(None, ("dream", policy, temperature)))
    result = play_dreams(run, out, options, decoder=decoder, weights=weights, cache=cache)
    show(result, _lines(result, out))


def _lines(result: dict[str, Any], out: Path) -> Iterator[str]:
    used, ended = result["options"], result["ended"]
    yield f"{used['episodes']} episodes, policy {used['policy']}, temperature {used['temperature']:g}"
    yield f"{'':12} {'mean':>10} {'95 % interval':>22} {'lowest':>10} {'highest':>10}"
    for title, row in (("model steps", result["steps"]), ("return", result["return"])):
        interval = "-" if row["ci95"] is None else "{:.2f} to {:.2f}".format(*row["ci95"])
        yield f"{title:12} {row['mean']:>10.2f} {interval:>22} {row['lowest']:>10.2f} {row['highest']:>10.2f}"
    cut = f"the others were cut after {result['most_steps']} model steps of {result['frameskip']} env steps"
    interval = "{:.3f} - {:.3f}".format(*ended["ci95"])
    yield f"ended: {ended['episodes']} of {used['episodes']}, 95 % interval {interval}; {cut}"
    yield f"results: {out}"
