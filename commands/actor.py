"""wmtrain actor: actor and critic that learn in a world model's imagination."""

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
from wmcache.common.paths import AnyPath
from wmcache.trainer.options import ActorOptions


@click.command(cls=Command)
@shared.run_option("--run", type=shared.PATH, required=True, help="Folder of the world model's run.")
@options_of(ActorOptions)
@shared.moved_caches_option
@shared.file_option("--out", help="Folder of the actor.  [default: RUN/actor]")
@click.option("--overwrite", is_flag=True, help="Delete the actor in --out and start from scratch.")
@shared.json_option
def actor(run: Path, out: Path | None, cache: tuple[AnyPath, ...], overwrite: bool, **settings: Any) -> None:
    """Train an actor and its critic in the imagination of a world model, from its cached latents alone.

    The reward is what the model predicts; where the data has neither reward nor ends, minus the distance to a goal, which is another frame.
    Run again, it goes on where it stopped.
    """
    from wmcache.trainer.actor import train_actor

    out = out or run / "actor"
    result = train_actor(run, out, ActorOptions(**settings), cache=cache or None, overwrite=overwrite)
    show(result, _lines(result, run, out))


def _lines(result: dict[str, Any], run: Path, out: Path) -> Iterator[str]:
    rewards = f"imagined rewards {result['return']:.3f}, of random actions {result['random_return']:.3f}"
    yield f"{out}: {result['step']} steps; from held-out frames {rewards}"
    yield f"act with it: {command('wmplan', '--run', run, '--policy', out)}"
