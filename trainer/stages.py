"""Models that are trained in stages: which are to be trained, and what each goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wmcache.cache.errors import UserError
from wmcache.trainer.checkpoint import Progress, finished_stage, last_checkpoint, load_weights, read_progress


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


def take_up(out: Path, model: Any, stages: tuple[str, ...], *, going_on: bool, start: Path | None) -> Progress:
    """Put what a run, or another one that it starts from, has so far into the model.

    Args:
        out: the run. model: as built.
        stages: that are to be trained.
        going_on: whether the run has a checkpoint.
        start: where it has none, a run that has finished the stage before the first.

    Returns:
        How far that is.

    Raises:
        UserError: the stage that comes before is not there, or not finished.
    """
    known, progress = model.stages, Progress()
    first = known.index(stages[0]) if known else 0
    folder = None
    if going_on:
        folder = last_checkpoint(out)
        progress = read_progress(folder)
    elif start is not None:
        if not first:
            raise UserError(f"--stage {stages[0] or 'all'} goes on from no other run; leave out --from {start}")
        folder = finished_stage(start, known[first - 1])
        progress = Progress(0, known[first - 1], 0, finished=True)
    there = known.index(progress.stage) if progress.stage else -1
    if there < first - 1 or (there == first - 1 and first and not progress.finished):
        raise UserError(
            f"stage {stages[0]} goes on from a finished {known[first - 1]}, which {out} does not have; "
            f"train that with --stage {known[first - 1]}, or name a run that has it with --from"
        )
    if folder is not None:
        load_weights(folder, model)
    return progress
