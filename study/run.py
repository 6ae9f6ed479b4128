"""Running a study: the cells that are not done, in this process one after another, or on a cluster as their inputs are done.

Fits on frames come first, then one pass over the frames for each seed, in which encoders on one backbone share it, then the cells that
need stores alone.
"""

from __future__ import annotations

import functools
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from wmcache.cluster.tasks import open_pool
from wmcache.common.errors import UserError, one_line, reason
from wmcache.common.files import make_folder
from wmcache.common.folders import home
from wmcache.common.jsonfiles import write_json
from wmcache.common.locks import exclusive
from wmcache.common.paths import absolute, as_path, exists
from wmcache.common.progress import seconds_between_updates
from wmcache.envs import distraction_of, find_environment, open_environment
from wmcache.pipeline.collect import collect
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.extract import extract_together, with_log_variances
from wmcache.pipeline.frames import DatasetCard, FrameDataset
from wmcache.pipeline.options import CollectOptions
from wmcache.planner.judge import reported_thresholds
from wmcache.study.branches import Branch, make_branches
from wmcache.study.cells import Cell, Workspace, create_encoder, do_cell
from wmcache.study.models import Evaluation
from wmcache.study.options import StudyOptions

Task = tuple[Cell, ...]
"""Cells that are done together: one, or the extractions of a seed, for which frames are decoded once."""


def open_frames(options: StudyOptions) -> FrameDataset:
    """Open the study's frames, collected first if they are missing; raise UserError where their settings are not the study's."""
    wanted = options.collect
    world = open_environment((wanted or CollectOptions()).env).spec
    path = as_path(options.dataset) if options.dataset else home() / world.dataset
    if wanted is not None and not exists(path / "dataset.json"):
        settings = asdict(wanted)
        collect(settings.pop("env"), path, cluster=options.cluster, **settings)
    dataset = FrameDataset.open(path)
    if wanted is not None:
        there = {**asdict(dataset.card), "length": dataset.card.frames // dataset.card.episodes}
        settings = asdict(wanted)
        same = (world.layout, world.distraction) == (dataset.card.layout, distraction_of(dataset.card.env))
        if world.layout and same:
            del settings["env"]  # it has several names
        if dataset.steps.described.keys() & {"terminated", "truncated"}:
            del settings["length"]  # episodes may be shorter
        if different := [f"{key} {there[key]} != {value}" for key, value in settings.items() if there[key] != value]:
            raise UserError(
                f"{path} has frames of other settings than the study's ({'; '.join(different)}); choose another dataset"
            )
    return dataset


def settled(options: StudyOptions, card: DatasetCard) -> StudyOptions:
    """Fill in the thresholds of evaluations; raises UserError where the environment has no goal."""
    return replace(options, plan=tuple(_with_thresholds(plan, card) for plan in options.plan))


def _with_thresholds(plan: Evaluation, card: DatasetCard) -> Evaluation:
    chosen = plan.options
    if chosen.judge_columns:
        assert chosen.threshold is not None
        return replace(plan, thresholds=(chosen.threshold,))
    try:
        find_environment(card.env, card.layout)
    except UserError:  # imported frames: evaluations fail, and the rest of the study is done
        return plan
    name, layout = (chosen.env, ()) if chosen.env else (card.env, card.layout)
    env = open_environment(name, layout=layout)
    env.close()
    if not (thresholds := env.spec.thresholds):
        raise UserError(
            f"plan {plan.name}: environment {env.spec.id} has no goal; add judge_columns and a threshold to [[plan]]"
        )
    reported = tuple(reported_thresholds(thresholds, chosen.threshold))
    return replace(plan, options=replace(chosen, threshold=chosen.threshold or thresholds[0]), thresholds=reported)


def run_study(options: StudyOptions, out: Path) -> tuple[StudyOptions, list[Branch], Workspace, dict[str, str]]:
    """Run the cells of a study that are not done yet.

    Args:
        out: its folder, for one process at a time. Studies of different options may share it, and with it their common cells; study.json
            is the last one's.

    Returns:
        The options with what depends on the frames, the cells, where their results are, and key -> reason for those that failed.
    """
    with exclusive(out / ".lock", out, wait=False) as alone:
        if not alone:
            raise UserError(f"another wmcache study is running in {out}; wait for it, or choose another --out")
        dataset = open_frames(options)
        options = settled(options, dataset.card)
        # Workers have working directories of their own.
        work = Workspace(out.absolute(), as_path(absolute(dataset.path)), options.device, options.batch)
        branches = make_branches(options, dataset.card.fingerprint)
        write_json(out / "study.json", {"options": asdict(options), "dataset": asdict(dataset.card)})
        tasks = group(pending(work, [cell for branch in branches for cell in branch.cells()]))
        return options, branches, work, _do(work, tasks, options.cluster) if tasks else {}


def _do(work: Workspace, tasks: Sequence[Task], cluster: str) -> dict[str, str]:
    """Do each task as soon as those that it needs are done or have failed; returns key -> reason for cells that failed."""
    failures: dict[str, str] = {}
    needed = {task: {other.key for cell in task for other in cell.inputs.values()} for task in tasks}
    waiting, ahead = list(tasks), {cell.key for task in tasks for cell in task}
    with (
        open_pool(cluster, most=len(tasks), label="study") as pool,
        tqdm(total=len(ahead), desc="study", unit=" cells", mininterval=seconds_between_updates()) as bar,
    ):
        while waiting or pool.running:
            for task in [task for task in waiting if not needed[task] & ahead]:
                waiting.remove(task)
                known = {key: why for key, why in failures.items() if key in needed[task]}
                # Not as a Dask graph, in which a killed process would also fail all tasks that depend on it.
                pool.submit([(task, functools.partial(run_task, work, task, known))])
            for task, outcome in pool.finished():
                keys = [cell.key for cell in task]
                # A task returns its own failures; a UserError means that its worker was killed.
                failures |= dict.fromkeys(keys, str(outcome)) if isinstance(outcome, UserError) else outcome
                ahead.difference_update(keys)
                bar.set_postfix_str(f"done: {task[-1].label}", refresh=False)
                bar.update(len(task))
                for cell in task:
                    if (why := failures.get(cell.key)) and not any(i.key in failures for i in cell.inputs.values()):
                        bar.write(one_line(f"{cell.label}: {why}"), file=sys.stderr)
    return failures


def pending(work: Workspace, cells: Sequence[Cell]) -> list[Cell]:
    """The cells without a result, and those whose product was deleted and is needed again; each after its inputs."""
    known: dict[str, Cell] = {}
    for cell in cells:
        known.setdefault(cell.key, cell)
    wanted: set[str] = set()
    needed: set[str] = set()
    for cell in reversed(known.values()):
        if work.read(cell) is None or (cell.key in needed and not work.product(cell).exists()):
            wanted.add(cell.key)
            needed.update(other.key for other in cell.ancestors())
    return [cell for cell in known.values() if cell.key in wanted]


def group(cells: Sequence[Cell]) -> list[Task]:
    """Group cells into tasks, each after those that it needs: fits on frames, one pass over the frames for each seed, then the rest."""
    first = [cell for cell in cells if cell.stage in ("fit", "extract") and "base" not in cell.inputs]
    passes: dict[int, list[Cell]] = {}
    unseeded: list[Cell] = []
    for cell in first:
        if cell.stage == "extract":
            fit = cell.inputs.get("fit")
            (unseeded if fit is None else passes.setdefault(fit.settings["options"]["seed"], [])).append(cell)
    together = list(passes.values()) or [[]]
    together[0] += unseeded
    return [
        *((cell,) for cell in first if cell.stage == "fit"),
        *(tuple(part) for part in together if part),
        *((cell,) for cell in cells if cell not in first),
    ]


def run_task(work: Workspace, task: Task, known: dict[str, str]) -> dict[str, str]:
    """Do those cells of a task whose inputs are not among the `known` failures; returns key -> reason for cells that fail."""
    reasons = {cell: [known[i.key] for i in cell.inputs.values() if i.key in known] for cell in task}
    failures = {cell.key: why[0] for cell, why in reasons.items() if why}
    ready = [cell for cell in task if not reasons[cell]]
    started = {cell.key for cell in ready if work.is_started(cell)}
    shared = _extract_at_once(work, ready) if len(ready) > 1 else {}
    # A pass that failed is continued below, so its cells are not timed as a whole either.
    started |= {cell.key for cell in ready if cell.key not in shared and work.is_started(cell)}
    for cell in ready:
        with _log(work, cell) as log:
            try:
                do_cell(work, cell, resumed=cell.key in started, shared=shared.get(cell.key, {}))
            except UserError as error:
                failures[cell.key] = str(error)
            except Exception as error:  # noqa: BLE001 (an error of one library must not cost the other cells hours of work)
                traceback.print_exc()
                failures[cell.key] = f"{type(error).__name__}: {reason(error)} (see {log})"
    return failures


def _extract_at_once(work: Workspace, cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    # Returns key -> figures for the cells of passes that succeeded. A failure is reported later, when each store is finished by itself.
    found: dict[str, dict[str, Any]] = {}
    with _log(work, cells[0]):
        made: dict[str, dict[Cell, Encoder]] = {}
        for cell in cells:
            with suppress(Exception):
                made.setdefault(cell.settings["store_dtype"], {})[cell] = create_encoder(work, cell)
        for dtype, encoders in made.items():
            started, count = time.perf_counter(), len(encoders)
            stores = [(encoder, work.product(cell)) for cell, encoder in encoders.items()]
            try:
                extract_together(
                    FrameDataset.open(work.dataset), with_log_variances(stores), dtype=dtype, batch=work.batch
                )
            except Exception:  # noqa: BLE001 (each store's own attempt reports it)
                traceback.print_exc()
                continue
            spent = (time.perf_counter() - started) / count
            found |= {cell.key: {"extract_seconds": spent, "extracted_together": count} for cell in encoders}
    return found


@contextmanager
def _log(work: Workspace, cell: Cell) -> Iterator[Path]:
    # So that the terminal has one progress bar.
    path = work.out / "logs" / f"{cell.stage}-{cell.key}.log"
    make_folder(path.parent)
    with path.open("a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        yield path
