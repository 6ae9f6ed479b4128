"""wmtrain: a world model from cached latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from wmcache import __version__
from wmcache.cache.errors import command
from wmcache.cache.files import home
from wmcache.commands.shared import CONTEXT, PATH, Command, device_option, model_options, residence_option


@click.command(cls=Command, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="wmtrain")
@click.option("--cache", type=PATH, required=True, help="The token store; nothing else is read.")
@click.option("--out", type=PATH, help="Folder of the run.  [default: $WMCACHE_HOME/runs/<dataset>-<store>]")
@click.option("--model", default="dino-wm", help="World model.")
@model_options
@click.option("--history", type=click.IntRange(1), default=3, help="Context frames.")
@click.option("--frameskip", type=click.IntRange(1), default=5, help="Env steps between frames of a window.")
@click.option("--steps", type=click.IntRange(1), default=10_000, help="Optimiser steps.")
@click.option("--batch-size", "batch", type=click.IntRange(1), default=64, help="Windows in each micro-batch.")
@click.option("--accumulate", type=click.IntRange(1), default=1, help="Micro-batches in each step.")
@click.option("--lr", "learning_rate", type=float, default=5e-4, help="Learning rate of the constant phase.")
@click.option("--warmup", type=click.FloatRange(0, 1), default=0.05, help="Share of the steps.")
@click.option("--decay", type=click.FloatRange(0, 1), default=0.3, help="Share of the steps.")
@click.option("--weight-decay", type=float, default=1e-2, help="Of matrices.")
@click.option("--clip", type=float, default=1.0, help="Of the gradient's norm.")
@click.option("--dtype", default="auto", help="auto, float32 or bfloat16.")
@device_option
@residence_option
@click.option("--seed", type=click.IntRange(0), default=0, help="Of weights, dropout and order.")
@click.option("--split-seed", type=click.IntRange(0), default=42, help="Of the split into train and val episodes.")
@click.option("--compile", is_flag=True, help="Use torch.compile.")
@click.option("--log-every", type=click.IntRange(1), default=20, help="Steps.")
@click.option("--validate-every", type=click.IntRange(1), default=500, help="Steps.")
@click.option("--checkpoint-every", type=click.IntRange(1), default=500, help="Steps.")
@click.option("--resume", is_flag=True, help="Insist on going on; --steps may then differ.")
@click.option("--overwrite", is_flag=True, help="Begin anew where a run exists.")
def wmtrain(
    cache: Path,
    out: Path | None,
    width: int,
    depth: int,
    heads: int,
    dropout: float,
    resume: bool,
    overwrite: bool,
    **settings: Any,
) -> None:
    """Train a world model purely on cached latents. Run again, it goes on where it stopped."""
    from wmcache.trainer.loop import TrainOptions, train

    out = out or home() / "runs" / f"{cache.absolute().parent.name}-{cache.stem}"
    model_options = {"width": width, "depth": depth, "heads": heads, "dropout": dropout}
    train(cache, out, TrainOptions(model_options=model_options, **settings), resume=resume, overwrite=overwrite)
    click.echo(f"{out}: trained; plan with: {command('wmplan', '--run', out)}")
