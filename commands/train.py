"""wmtrain, wmcache import-run: a world model or policy from cached latents, or from a checkpoint of another project."""

from __future__ import annotations

import itertools
import sys
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import click
from click.core import ParameterSource

from wmcache import __version__
from wmcache.commands.command import Group, take_chosen
from wmcache.commands.options import ByName, Option, Preset, options_of
from wmcache.commands.output import say, shell_command
from wmcache.commands.shared import ANY_PATH, PATH, file_option, path_option, program_path, run_option
from wmcache.common.errors import INTERRUPTED, STOPPED, Stopped, UserError, command
from wmcache.common.folders import default_run
from wmcache.common.paths import AnyPath
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.presets import PRESETS

_models = partial(resolve_name, "wmcache.trainer.models:MODELS")
MODEL = ByName("model", "model", _models, lambda name: _models().get(name).Options)


def _stages() -> list[str]:
    return list(dict.fromkeys(stage for name in _models() for stage in _models().get(name).stages))


@click.group(cls=Group, by=MODEL, invoke_without_command=True)
@click.version_option(__version__, prog_name="wmtrain")
@run_option(
    "--cache",
    "caches",
    type=ANY_PATH,
    multiple=True,
    help="The token store; nothing else is read. Repeat it for several stores of one encoder, which are read as one.  [required]",
)
@run_option("--out", type=PATH, help="Folder of the run.  [default: $WMCACHE_HOME/runs/<dataset>-<store>]")
@run_option("--preset", cls=Preset, presets=PRESETS, expose_value=False, help="Known settings; options beside it win.")
@run_option(
    "--resume",
    is_flag=True,
    help="Continue the run in --out; --steps, --epochs, --lr, --warmup and --decay may then differ.",
)
@run_option("--overwrite", is_flag=True, help="Delete the run in --out and start from scratch.")
@options_of(TrainOptions, model={"names": _models}, stage={"names": _stages}, start={"type": PATH})
@click.option(
    "--devices",
    cls=Option,
    group="Devices",
    type=click.IntRange(1),
    help="Devices of this machine, each with a process: the same batches, cut into slices. A run goes on with any number; what dropout "
    "and --noise draw differs with it.  [default: 1, or the number that torchrun sets]",
)
def wmtrain(
    caches: tuple[AnyPath, ...], out: Path | None, devices: int | None, resume: bool, overwrite: bool, **settings: Any
) -> None:
    """Train a world model or a policy purely on cached latents. Run again, it goes on where it stopped."""
    ctx = click.get_current_context()
    if ctx.invoked_subcommand:
        return
    if not caches:
        raise click.MissingParameter(ctx=ctx, param_type="option", param_hint="'--cache'")
    typed = [name for name in ("steps", "epochs") if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if len(typed) == 2:
        raise click.UsageError("--steps and --epochs both set the length; give one", ctx)
    if typed == ["steps"]:
        settings["epochs"] = None  # which a preset may have
    from wmcache.engine.ranks import ReportedError, is_distributed, joined
    from wmcache.trainer.train import check_slices, train

    out = out or default_run(caches[0])
    settings["start"] = settings["start"] and str(settings["start"].absolute())
    chosen = TrainOptions(model_options=take_chosen(settings), **settings)
    if devices and devices > 1 and not is_distributed():
        from wmcache.engine.launch import launch

        check_slices(chosen.batch, devices)
        launch([program_path("wmtrain"), *sys.argv[1:]], devices)
    try:
        with joined(chosen.device) as ranks:
            if devices and devices != ranks.local_world:
                raise UserError(f"--devices {devices}: torchrun has started {ranks.local_world}; leave it out")
            train(caches[0], out, chosen, more=caches[1:], resume=resume, overwrite=overwrite, ranks=ranks)
    except ReportedError as reported:
        cause = reported.__cause__
        ctx.exit(STOPPED if isinstance(cause, Stopped) else INTERRUPTED if isinstance(cause, KeyboardInterrupt) else 1)
    if ranks.is_main:
        say(f"{out}: {_next_step(out, caches[0], chosen)}")


def _next_step(run: Path, cache: AnyPath, options: TrainOptions) -> str:
    from wmcache.trainer.models import MODELS, read_options
    from wmcache.trainer.runs import read_identity

    kind = MODELS.get(options.model)
    stage, following = options.stage, dict(itertools.pairwise(kind.stages))
    if stage in following:
        words = {stage: following[stage], f"--stage={stage}": f"--stage={following[stage]}"}
        return f"stage {stage} is trained; go on with: {shell_command([words.get(word, word) for word in sys.argv])}"
    decoder = f"draw with: {command('wmtrain', 'decoder', '--cache', cache)}"
    if not kind.needs_actions(read_options(options.model, options.model_options)):
        return f"trained; it predicts videos, and cannot plan; {decoder}"
    card = read_identity(run)[0]
    if card.layout or not str(card.dataset.get("policy", "imported")).startswith("imported"):
        return f"trained; plan with: {command('wmplan', '--run', run)}"
    return f"trained; its frames have no simulator (docs/import.md); {decoder}"


@click.group("import-run", cls=Group)
def import_run() -> None:
    """Make a run of another project's checkpoint, for wmplan."""


@import_run.command("dino-wm")
@click.argument("folder", type=PATH)
@path_option("--cache", required=True, help="A store of the frames it was trained on; see: wmcache import dino-wm.")
@file_option("--out", required=True, help="Folder of the run.")
@click.option("--checkpoint", default="latest", help="Checkpoint to import: latest, or the number of an epoch.")
@click.option("--overwrite", is_flag=True, help="Replace another run.")
def import_run_dino_wm(folder: Path, cache: AnyPath, out: Path, **settings: Any) -> None:
    """Import DINO-WM's checkpoint FOLDER: hydra.yaml, checkpoints/model_*.pth. Nothing in it is run."""
    from wmcache.trainer.import_dino_wm import import_dino_wm as run

    imported = run(folder, cache, out, **settings)
    scale = "standardised" if imported.standardised else "as they are"
    say(f"{out}: epoch {imported.epoch}, {imported.parameters / 1e6:.2f} M parameters, actions and proprio {scale}")
    say(f"plan with: {command('wmplan', '--run', out)}")


@import_run.command("jepa-wm")
@click.argument("file", type=PATH)
@file_option(
    "--config",
    "settings",
    required=True,
    help="Settings of its training or evaluation, from the configs/ of its repository.",
)
@path_option("--cache", required=True, help="A store of PointMaze's frames, of the encoder in the settings.")
@file_option("--out", required=True, help="Folder of the run.")
@click.option("--overwrite", is_flag=True, help="Replace another run.")
def import_run_jepa_wm(file: Path, settings: Path, cache: AnyPath, out: Path, overwrite: bool) -> None:
    """Import JEPA-WM's checkpoint FILE of PointMaze, jepa_wm_pointmaze or dino_wm_pointmaze. Nothing in it is run."""
    from wmcache.trainer.import_jepa_wm import import_jepa_wm as run

    imported = run(file, settings, cache, out, overwrite=overwrite)
    say(f"{out}: epoch {imported.epoch}, {imported.predictor}, {imported.parameters / 1e6:.2f} M parameters")
    say(f"plan with: {command('wmplan', '--run', out, '--protocol', 'open-loop', '--context', 2)}")
