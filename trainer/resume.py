"""Whether a run of a world model continues, and from where: its settings, its stages, and the run that it starts from."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wmcache.cache.identity import Identity
from wmcache.cache.store import TokenStore
from wmcache.common.errors import UserError
from wmcache.engine.checkpoint import Progress, checkpoints, last_checkpoint, load_weights, read_progress
from wmcache.trainer.models import WorldModel, read_options
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.runs import differences, foreign_identity, is_run, read_config, write_settings

MAY_CHANGE = {
    *("cache", "device", "residence", "compile", "log_every", "validate_every", "checkpoint_every"),
    *("stage", "start"),
}
MAY_CHANGE_ON_RESUME = MAY_CHANGE | {"steps", "epochs", "learning_rate"}
MAY_CHANGE_WITH_THE_STAGE = MAY_CHANGE_ON_RESUME | {
    *("batch", "accumulate", "warmup", "decay", "beta2", "weight_decay", "decay_all", "clip"),
}


def find_stages(
    out: Path, model: WorldModel, config: Mapping[str, Any], identity: Identity, *, overwrite: bool
) -> tuple[list[Progress], bool]:
    """Find what is left to train, without writing anything; where a run starts from another one, load its weights into `model`.

    Returns:
        Where each stage that has steps left begins or continues, and whether the wanted stage follows one that the run has.
    """
    wanted = config["stage"]
    if wanted != "all" and wanted not in model.stages:
        raise UserError(f"no stage {wanted!r}; known are {', '.join((*model.stages, 'all'))}")
    stages = model.stages or ("",) if wanted == "all" else (wanted,)
    progress = _find_progress(out, model, stages[0], config, identity, overwrite=overwrite)
    begins = model.stage_number(wanted) > model.stage_number(progress.stage) > 0
    if progress.stage in stages and not progress.finished and progress.step >= progress.begun + config["steps"]:
        done = progress.step - progress.begun
        raise UserError(f"unfinished stage {progress.stage} of {out} has had {done} steps; --steps must be more")
    left: list[Progress] = []
    for stage in stages:
        # Lowering `--steps` does not reopen a finished stage.
        if model.stage_number(stage) >= model.stage_number(progress.stage):
            begun = progress.begun if stage == progress.stage else progress.step
            if progress.step < begun + config["steps"]:
                left.append(Progress(progress.step, stage, begun))
            progress = Progress(max(progress.step, begun + config["steps"]), stage, begun, finished=True)
    return left, begins


def _find_progress(
    out: Path, model: WorldModel, stage: str, config: Mapping[str, Any], identity: Identity, *, overwrite: bool
) -> Progress:
    before = max(0, model.stage_number(stage) - 1)
    previous = model.stages[before - 1] if before else ""
    start, progress = config["start"], Progress()
    if not overwrite and checkpoints(out):
        progress = read_progress(last_checkpoint(out))
        refused = model.stage_number(progress.stage) <= before or read_config(out).get("start") != start
    else:
        refused = start and Path(start).resolve() == out.resolve()
    if start and (refused or not before):
        raise UserError(f"--stage {stage or 'all'} of {out} cannot start from {start}; leave out --from")
    if start and not progress.stage:
        _load_start(Path(start), model, previous, identity, config)
        progress = Progress(stage=previous, finished=True)
    reached = model.stage_number(progress.stage)
    if reached < before or (before and reached == before and not progress.finished):
        raise UserError(
            f"stage {stage} needs a finished stage {previous}, which {out} does not have; "
            f"train it with --stage {previous}, or name a run that has it with --from"
        )
    return progress


def _load_start(start: Path, model: WorldModel, stage: str, identity: Identity, config: Mapping[str, Any]) -> None:
    folder = finished_stage(start, stage)
    names = {"history", "frameskip", "split_seed", "episodes_fraction", *config["model_options"]}
    different = _differences(read_config(start), config, names - model.may_change_after(stage))
    if different := different + foreign_identity(start, identity):
        raise UserError(
            f"{start} is of another model or store ({'; '.join(different)}); choose the same, or name another --from"
        )
    load_weights(folder, model)


def finished_stage(run: Path, stage: str) -> Path:
    """Return the newest checkpoint that ends a stage; raises UserError where the folder is not a run, or has none."""
    read_config(run)
    for folder in reversed(checkpoints(run)):
        progress = read_progress(folder)
        if progress.stage == stage and progress.finished:
            return folder
    raise UserError(f"{run} has no finished stage {stage}; train it there with --stage {stage}, or name another --from")


def prepare_run(
    out: Path, config: dict[str, Any], store: TokenStore, *, resume: bool, overwrite: bool, begins: bool, finished: bool
) -> bool:
    """Write what a run is, and return whether it has a checkpoint; raises UserError where what differs may not change."""
    exists = is_run(out)
    if resume and not checkpoints(out):
        raise UserError(f"{out} has no checkpoint to resume; run without --resume")
    if exists and overwrite:
        shutil.rmtree(out)
    elif exists:
        before = read_config(out)
        free = MAY_CHANGE_WITH_THE_STAGE if begins else MAY_CHANGE_ON_RESUME if resume else MAY_CHANGE
        names = {*config, *config["model_options"]} - {*free, "model_options"}
        different = _differences({**asdict(TrainOptions()), **before}, config, names)
        foreign = foreign_identity(out, store.identity)
        if different or foreign:
            resumes = not foreign and names & MAY_CHANGE_ON_RESUME & {text.split()[0] for text in different}
            hint = "continue it with --resume and its other options, or " if resumes and checkpoints(out) else ""
            found = "; ".join([*different, *foreign])
            raise UserError(f"{out} is a run with other settings ({found}); {hint}choose another --out")
        config = {**config, "start": config["start"] or before.get("start")}
        if finished:  # with the steps that it has had
            config |= {name: before[name] for name in ("steps", "epochs", "learning_rate") if name in before}
    write_settings(out, config, store)
    return bool(checkpoints(out))


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], names: Collection[str]) -> list[str]:
    """Describe the settings and the model's options among `names` that differ; for another model only that."""
    if before["model"] != now["model"]:
        return [f"model {before['model']} != {now['model']}"]
    # Options that are newer than the run had their defaults.
    old, new = (
        {**config, **asdict(read_options(config["model"], config["model_options"]))} for config in (before, now)
    )
    return differences(old, new, names)
