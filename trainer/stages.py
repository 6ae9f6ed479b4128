"""Models that are trained in stages: which are to be trained, and what each goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wmcache.cache.identity import Identity
from wmcache.common.errors import UserError
from wmcache.trainer.checkpoint import (
    Progress,
    checkpoints,
    finished_stage,
    last_checkpoint,
    load_weights,
    read_config,
    read_identity,
    read_progress,
    settings_of,
)
from wmcache.trainer.models import MODELS, WorldModel


def stages_of(known: tuple[str, ...], wanted: str) -> tuple[str, ...]:
    """The stages that are to be trained, in their order; a single nameless one for a model without stages.

    Args:
        known: of the model. wanted: one of them, or `all`.

    Raises:
        UserError: an unknown stage.
    """
    if wanted != "all" and wanted not in known:
        there = (
            f"known are {', '.join(known)} and all"
            if known
            else "this model is trained in one go, so leave out --stage"
        )
        raise UserError(f"no stage {wanted!r}; {there}")
    return (wanted,) if wanted != "all" else known or ("",)


def place_of(stage: str, model: WorldModel) -> int:
    """Of a stage among those of a model; -1 for none."""
    return model.stages.index(stage) if stage in model.stages else -1


def take_up(
    out: Path,
    model: WorldModel,
    stages: tuple[str, ...],
    identity: Identity,
    config: Mapping[str, Any],
    *,
    start: Path | None,
    overwrite: bool,
) -> Progress:
    """How far a run is, before anything is written; what another one that it starts from has goes into the model.

    Args:
        out: the run. model: as built.
        stages: that are to be trained. identity: of the store. config: of the run, as it would be written.
        start: a run that has finished the stage before the first.
        overwrite: whether the run begins anew.

    Raises:
        UserError: the stage that comes before is not there, not finished, or of another store or model; or the run has stages of its own.
    """
    known, progress = model.stages, Progress()
    first = known.index(stages[0]) if known else 0
    if start is not None and not first:
        raise UserError(f"--stage {stages[0] or 'all'} goes on from no other run; leave out --from {start}")
    if not overwrite and checkpoints(out):
        progress = read_progress(last_checkpoint(out))
        if start is not None and (
            place_of(progress.stage, model) < first or read_config(out).get("start") != str(start)
        ):
            raise UserError(
                f"{out} has stages of its own, so it does not go on from {start}; leave out --from, or choose another --out"
            )
    elif start is not None:
        if overwrite and start.resolve() == out.resolve():
            raise UserError(f"--overwrite would delete {start}, which --from goes on from; choose another --out")
        folder = finished_stage(start, known[first - 1])
        if different := read_identity(start)[1].differences(identity):
            raise UserError(f"{start} was trained on another store ({'; '.join(different)}); name another --from")
        if different := _differences(read_config(start), config, known[first - 1]):
            raise UserError(
                f"{start} is of another model ({'; '.join(different)}); choose the same options, or name another --from"
            )
        load_weights(folder, model)
        progress = Progress(0, known[first - 1], 0, finished=True)
    there = place_of(progress.stage, model)
    if there < first - 1 or (there == first - 1 and first and not progress.finished):
        raise UserError(
            f"stage {stages[0]} goes on from a finished {known[first - 1]}, which {out} does not have; "
            f"train that with --stage {known[first - 1]}, or name a run that has it with --from"
        )
    return progress


def _differences(there: Mapping[str, Any], config: Mapping[str, Any], finished: str) -> list[str]:
    """Between what the parts that a run has trained hang on, and what a run that goes on from them would be."""
    if there["model"] != config["model"]:
        return [f"model {there['model']} != {config['model']}"]
    names = {"history", "frameskip", "split_seed", "episodes_fraction", *config["model_options"]}
    names -= MODELS.get(config["model"]).may_change_after(finished)
    before, now = settings_of(there), settings_of(config)
    return [
        f"{name} {before.get(name)} != {now[name]}" for name in now if name in names and before.get(name) != now[name]
    ]
