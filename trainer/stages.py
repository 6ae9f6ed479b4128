"""Models that are trained in stages: which are to be trained, and what each goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wmcache.cache.errors import UserError
from wmcache.cache.identity import Identity
from wmcache.trainer.checkpoint import (
    Progress,
    checkpoints,
    finished_stage,
    last_checkpoint,
    load_weights,
    read_identity,
    read_progress,
)


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


def place_of(stage: str, model: Any) -> int:
    """Of a stage among those of a model; -1 for none."""
    return model.stages.index(stage) if stage in model.stages else -1


def take_up(
    out: Path, model: Any, stages: tuple[str, ...], identity: Identity, *, start: Path | None, overwrite: bool
) -> Progress:
    """How far a run is, before anything is written; what another one that it starts from has goes into the model.

    Args:
        out: the run. model: as built.
        stages: that are to be trained. identity: of the store.
        start: where it has no checkpoint, a run that has finished the stage before the first.
        overwrite: whether the run begins anew.

    Raises:
        UserError: the stage that comes before is not there, not finished, or of another store.
    """
    known, progress = model.stages, Progress()
    first = known.index(stages[0]) if known else 0
    if not overwrite and checkpoints(out):
        progress = read_progress(last_checkpoint(out))
    elif start is not None:
        if not first:
            raise UserError(f"--stage {stages[0] or 'all'} goes on from no other run; leave out --from {start}")
        folder = finished_stage(start, known[first - 1])
        if different := read_identity(start)[1].differences(identity):
            raise UserError(f"{start} was trained on another store ({'; '.join(different)}); name another --from")
        load_weights(folder, model)
        progress = Progress(0, known[first - 1], 0, finished=True)
    there = place_of(progress.stage, model)
    if there < first - 1 or (there == first - 1 and first and not progress.finished):
        raise UserError(
            f"stage {stages[0]} goes on from a finished {known[first - 1]}, which {out} does not have; "
            f"train that with --stage {known[first - 1]}, or name a run that has it with --from"
        )
    return progress
