"""Whether a run of a world model continues, and from where: its settings, its stages, and the run that it starts from."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
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


def stages_of(known: tuple[str, ...], wanted: str) -> tuple[str, ...]:
    """Return which of the known stages of a model to train, ("",) for none; raises UserError for an unknown one."""
    if wanted != "all" and wanted not in known:
        hint = f"known are {', '.join(known)} and all" if known else "this model has no stages, leave out --stage"
        raise UserError(f"no stage {wanted!r}; {hint}")
    return (wanted,) if wanted != "all" else known or ("",)


def stage_index(stage: str, model: WorldModel) -> int:
    """Return the position of a stage among those of a model, -1 for none."""
    return model.stages.index(stage) if stage in model.stages else -1


def stages_left(model: WorldModel, stages: Sequence[str], progress: Progress, steps: int) -> list[Progress]:
    """Return where each stage that has steps left begins or continues. Lowering `--steps` does not reopen a finished stage."""
    left: list[Progress] = []
    for stage in stages:
        if stage_index(stage, model) < stage_index(progress.stage, model):
            continue
        begun = progress.begun if stage == progress.stage else progress.step
        if progress.step < begun + steps:
            left.append(Progress(progress.step, stage, begun))
        progress = Progress(max(progress.step, begun + steps), stage, begun, finished=True)
    return left


def find_progress(
    out: Path,
    model: WorldModel,
    stages: Sequence[str],
    identity: Identity,
    config: Mapping[str, Any],
    *,
    overwrite: bool,
) -> Progress:
    """Find how far a run is, without writing anything; where it starts from another run, load that one's weights into `model`.

    Args:
        config: of the run, as it would be written; `start` is a run that has finished the stage before the first of `stages`.

    Raises:
        UserError: the stage before is missing, not finished, or of another store or model; or the run has other stages or too few steps.
    """
    first = max(0, stage_index(stages[0], model))
    previous = model.stages[first - 1] if first else ""
    start, progress = config["start"], Progress()
    if start and not first:
        raise UserError(f"--stage {stages[0] or 'all'} starts from scratch; leave out --from {start}")
    if not overwrite and checkpoints(out):
        progress = read_progress(last_checkpoint(out))
        refused = start and (stage_index(progress.stage, model) < first or read_config(out).get("start") != start)
    else:
        refused = start and Path(start).resolve() == out.resolve()
    if refused:
        raise UserError(f"{out} cannot start from {start}; leave out --from, or choose another --out")
    if start and not progress.stage:
        _load_start(Path(start), model, previous, identity, config)
        progress = Progress(stage=previous, finished=True)
    reached = stage_index(progress.stage, model)
    if reached < first - 1 or (first and reached == first - 1 and not progress.finished):
        raise UserError(
            f"stage {stages[0]} needs a finished stage {previous}, which {out} does not have; "
            f"train it with --stage {previous}, or name a run that has it with --from"
        )
    if progress.stage in stages and not progress.finished and progress.step >= progress.begun + config["steps"]:
        raise UserError(
            f"stage {progress.stage} of {out} has had {progress.step - progress.begun} steps and is not finished; --steps must be more"
        )
    return progress


def _load_start(start: Path, model: WorldModel, stage: str, identity: Identity, config: Mapping[str, Any]) -> None:
    """Load the weights at the end of another run's stage."""
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
    out: Path,
    config: dict[str, Any],
    store: TokenStore,
    free: Collection[str],
    *,
    resume: bool,
    overwrite: bool,
    finished: bool,
) -> bool:
    """Write what a run is, and return whether it has a checkpoint. It may exist with other settings only where these are `free`.

    Raises:
        UserError: the folder is something else, the settings or the store differ, or there is nothing to resume.
    """
    exists = is_run(out)
    if resume and not checkpoints(out):
        raise UserError(f"{out} has no checkpoint to resume; run without --resume")
    if exists and overwrite:
        shutil.rmtree(out)
    elif exists:
        before = read_config(out)
        _check_settings(out, before, config, store, free)
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


def _check_settings(
    out: Path, before: Mapping[str, Any], config: Mapping[str, Any], store: TokenStore, free: Collection[str]
) -> None:
    before = {**asdict(TrainOptions()), **before}
    different = _differences(before, config, {*config, *config["model_options"]} - {*free, "model_options"})
    names = {text.partition(" ")[0] for text in different}
    foreign = foreign_identity(out, store.identity)
    if different or foreign:
        resumes = not foreign and names & MAY_CHANGE_ON_RESUME and checkpoints(out)
        hint = (
            "continue it with --resume and its other options, or choose another --out"
            if resumes
            else "choose another --out"
        )
        raise UserError(f"{out} is a run with other settings ({'; '.join([*different, *foreign])}); {hint}")
