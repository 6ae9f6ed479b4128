"""wmtrain, wmcache import-run: a world model from cached latents, or from others."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from wmcache import __version__
from wmcache.commands.shared import (
    ANY_PATH,
    INTERRUPTED,
    PATH,
    STOPPED,
    Group,
    Stopped,
    device_option,
    model_options,
    name_of,
    preset_option,
    residence_option,
    say,
    shell_command,
    take_model_options,
)
from wmcache.common.errors import UserError, command
from wmcache.common.files import home
from wmcache.common.paths import AnyPath
from wmcache.trainer.presets import PRESETS


@click.group(cls=Group, invoke_without_command=True)
@click.version_option(__version__, prog_name="wmtrain")
@preset_option("--preset", PRESETS, "Known settings; what is given beside it wins.")
@click.option("--cache", type=ANY_PATH, help="The token store; nothing else is read.  [required]")
@click.option("--out", type=PATH, help="Folder of the run.  [default: $WMCACHE_HOME/runs/<dataset>-<store>]")
@click.option("--model", default="dino-wm", help="World model: dino-wm, ddp-wm.")
@click.option(
    "--stage",
    type=click.Choice(["localization", "primary", "lrm", "all"]),
    default="all",
    help="Stage to train (ddp-wm has three, each continues the one before, and each has --steps).",
)
@click.option("--from", "start", type=PATH, help="Run whose last finished stage is continued.  [default: --out]")
@model_options
@click.option("--history", type=click.IntRange(1), default=3, help="Context frames.")
@click.option("--frameskip", type=click.IntRange(1), default=5, help="Env steps between frames of a window.")
@click.option("--steps", type=click.IntRange(1), default=10_000, help="Optimiser steps.")
@click.option("--epochs", type=click.IntRange(1), help="Passes over all windows, instead of --steps.")
@click.option(
    "--batch-size",
    "batch",
    type=click.IntRange(1),
    default=64,
    help="Windows in each micro-batch, of all devices together.",
)
@click.option("--accumulate", type=click.IntRange(1), default=1, help="Micro-batches in each step.")
@click.option("--lr", "learning_rate", type=float, default=5e-4, help="Learning rate of the constant phase.")
@click.option(
    "--warmup", type=click.FloatRange(0, 1), default=0.05, help="Share of the steps in which the learning rate rises."
)
@click.option(
    "--decay",
    type=click.FloatRange(0, 1),
    default=0.3,
    help="Share of the steps in which the learning rate falls to 0.",
)
@click.option("--beta2", type=click.FloatRange(0, 1, max_open=True), default=0.95, help="Second beta of AdamW.")
@click.option("--weight-decay", type=float, default=1e-2, help="Weight decay of matrices.")
@click.option(
    "--decay-all/--decay-matrices",
    default=False,
    help="Apply weight decay to vectors too (DINO-WM), or to matrices only.",
)
@click.option("--clip", type=float, default=1.0, help="Largest norm of the gradient; 0: no clipping.")
@click.option(
    "--pool",
    type=click.IntRange(1),
    default=1,
    help="Side of the squares of the token grid that are averaged at first; 1: none.",
)
@click.option("--pool-until", type=click.FloatRange(0, 1), default=0.5, help="Share of the steps on that coarser grid.")
@click.option("--dtype", default="auto", help="Compute precision: auto, float32 or bfloat16.")
@device_option
@click.option(
    "--devices",
    type=click.IntRange(1),
    help="Devices of this machine, each with a process: the same batches, cut into slices. A run goes on with any number; what dropout "
    "and --noise draw differs with it.  [default: 1, or as torchrun says]",
)
@residence_option
@click.option("--seed", type=click.IntRange(0), default=0, help="Seed of weights, dropout and order.")
@click.option("--split-seed", type=click.IntRange(0), default=42, help="Seed of the split into train and val episodes.")
@click.option(
    "--fraction",
    "episodes_fraction",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    help="Share of the train episodes; smaller ones are parts of larger ones.",
)
@click.option("--compile", is_flag=True, help="Use torch.compile.")
@click.option("--log-every", type=click.IntRange(1), default=20, help="Steps between two lines of the log.")
@click.option("--validate-every", type=click.IntRange(1), default=500, help="Steps between two validations.")
@click.option("--checkpoint-every", type=click.IntRange(1), default=500, help="Steps between two checkpoints.")
@click.option("--resume", is_flag=True, help="Continue the run in --out; --steps, --epochs and --lr may then differ.")
@click.option("--overwrite", is_flag=True, help="Delete the run in --out and start from scratch.")
def wmtrain(
    cache: AnyPath | None,
    preset: str | None,  # noqa: ARG001 (its values have become the others' defaults)
    out: Path | None,
    start: Path | None,
    devices: int | None,
    resume: bool,
    overwrite: bool,
    **settings: Any,
) -> None:
    """Train a world model purely on cached latents. Run again, it goes on where it stopped."""
    ctx = click.get_current_context()
    if ctx.invoked_subcommand:
        return
    if cache is None:
        raise click.MissingParameter(ctx=ctx, param_type="option", param_hint="'--cache'")
    typed = [name for name in ("steps", "epochs") if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if len(typed) == 2:
        raise click.UsageError("--steps and --epochs are two ways to say how long; give one", ctx)
    if typed == ["steps"]:
        settings["epochs"] = None  # which a preset may have
    from wmcache.engine.ranks import ReportedError, is_distributed, joined
    from wmcache.trainer.options import TrainOptions
    from wmcache.trainer.train import check_slices, train

    out = out or home() / "runs" / name_of(cache)
    chosen = TrainOptions(
        model_options=take_model_options(settings, settings["model"]),
        start=None if start is None else str(start.absolute()),
        **settings,
    )
    if devices and devices > 1 and not is_distributed():
        from wmcache.commands.launch import launch

        check_slices(chosen.batch, devices)
        launch("wmtrain", devices)
    try:
        with joined(chosen.device) as ranks:
            if devices and devices != ranks.local_world:
                raise UserError(
                    f"--devices {devices}, but torchrun has started {ranks.local_world}; leave out --devices"
                )
            train(cache, out, chosen, resume=resume, overwrite=overwrite, ranks=ranks)
    except ReportedError as reported:
        stopped = isinstance(reported.__cause__, KeyboardInterrupt)
        ctx.exit((STOPPED if isinstance(reported.__cause__, Stopped) else INTERRUPTED) if stopped else 1)
    if ranks.is_main and chosen.stage == "localization":
        following = {"localization": "primary", "--stage=localization": "--stage=primary"}
        further = shell_command([following.get(word, word) for word in sys.argv])
        say(f"{out}: knows where something changes; go on with: {further}")
    elif ranks.is_main:
        say(f"{out}: trained; {_next_step(out, cache)}")


def _next_step(run: Path, cache: AnyPath) -> str:
    """What can be done with a trained run: its frames may be of no simulator that wmplan knows."""
    from wmcache.trainer.runs import read_identity

    if read_identity(run)[0].dataset.get("maze"):
        return f"plan with: {command('wmplan', '--run', run)}"
    return (
        "wmplan has no simulator of its frames; to plan in your own see docs/import.md; to see what it imagines, train a decoder with: "
        f"{command('wmtrain', 'decoder', '--cache', cache)}, then: {command('wmcache', 'imagine', '--run', run, '--decoder', 'DECODER')}"
    )


@click.group("import-run", cls=Group)
def import_run() -> None:
    """Make a run of other people's checkpoint, for wmplan."""


@import_run.command("dino-wm")
@click.argument("folder", type=PATH)
@click.option(
    "--cache",
    type=ANY_PATH,
    required=True,
    help="A store of the frames it was trained on; see: wmcache import dino-wm.",
)
@click.option("--out", type=PATH, required=True, help="Folder of the run.")
@click.option("--checkpoint", default="latest", help="Checkpoint to import: latest, or the number of an epoch.")
@click.option("--overwrite", is_flag=True, help="Replace another run.")
def import_run_dino_wm(folder: Path, cache: AnyPath, out: Path, **settings: Any) -> None:
    """Import DINO-WM's checkpoint FOLDER: hydra.yaml, checkpoints/model_*.pth. Nothing in it is run."""
    from wmcache.trainer.import_dino_wm import import_dino_wm as run

    imported = run(folder, cache, out, **settings)
    scale = "by the store's means and deviations" if imported.standardised else "not at all, as hydra.yaml says"
    say(f"{out}: epoch {imported.epoch}, {imported.parameters / 1e6:.2f} M parameters")
    say(f"actions and proprio are standardised {scale}; plan with: {command('wmplan', '--run', out)}")
