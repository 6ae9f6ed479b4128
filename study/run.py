"""Doing a study: cells that are not done yet, in this process one after another, or on a cluster as their inputs are done.

Fits on frames come first, then one pass over the frames for each seed, in which encoders on one backbone share it, then all that is made
of stores alone.
"""

from __future__ import annotations

import functools
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from wmcache.cluster.tasks import Pool, open_pool
from wmcache.common.errors import UserError, one_line
from wmcache.common.files import make_folder
from wmcache.common.folders import home
from wmcache.common.jsonfiles import write_json
from wmcache.common.locks import exclusive
from wmcache.common.paths import absolute, as_path
from wmcache.common.progress import seconds_between_updates
from wmcache.envs import find_maze
from wmcache.pipeline.collect import collect
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.extract import extract_together
from wmcache.pipeline.frames import FrameDataset
from wmcache.planner.baselines import BASELINES
from wmcache.planner.judge import THRESHOLDS
from wmcache.study.cells import Branch, Cell, Workshop, create_encoder, do_cell, make_branches
from wmcache.study.options import StudyOptions
from wmcache.study.statistics import interval
from wmcache.trainer.train import ROLLOUT_STEPS

Task = tuple[Cell, ...]
"""Cells that are done in one go: one, or a seed's extractions from frames, which are then decoded once."""


def open_frames(options: StudyOptions) -> FrameDataset:
    """The study's frames, collected where they are not there yet.

    Raises:
        UserError: they are not there and cannot be collected, or are others than the study says.
    """
    wanted = options.collect
    name = "umaze" if wanted is None else find_maze(wanted.env).name.lower()
    path = Path(options.dataset) if options.dataset else home() / f"pointmaze-{name}"
    if wanted is not None and not (path / "dataset.json").exists():
        settings = asdict(wanted)
        collect(settings.pop("env"), path, cluster=options.cluster, **settings)
    dataset = FrameDataset.open(path)
    if wanted is not None:
        there = {**asdict(dataset.card), "length": dataset.card.frames // dataset.card.episodes}
        settings = asdict(wanted)
        if list(find_maze(settings["env"]).rows) == list(dataset.card.maze or ()):
            del settings["env"]  # a maze has several names
        if different := [f"{key} {there[key]} != {value}" for key, value in settings.items() if there[key] != value]:
            raise UserError(
                f"{path} holds frames of other settings than the study's ({'; '.join(different)}); choose another dataset"
            )
    return dataset


def run_study(options: StudyOptions, out: Path) -> tuple[list[Branch], Workshop, dict[str, str]]:
    """Do what is not done yet of a study; run again, it goes on.

    Args:
        options: what to do.
        out: its folder, for one run at a time. Studies of different options may share it, and with it the cells that they have in
            common; study.json is of the last.

    Returns:
        The cells, where their results are, and key -> reason for those that could not be done.

    Raises:
        UserError: the frames cannot be had, weights that are named are not there, or somebody else is at work in the folder.
    """
    with exclusive(out / ".lock", out, wait=False) as alone:
        if not alone:
            raise UserError(f"another wmcache study is at work in {out}; wait for it, or choose another --out")
        return _run(options, out)


def _run(options: StudyOptions, out: Path) -> tuple[list[Branch], Workshop, dict[str, str]]:
    dataset = open_frames(options)
    # Workers have working directories of their own.
    work = Workshop(out.absolute(), as_path(absolute(dataset.path)), options.device, options.batch)
    branches = make_branches(options, dataset.card.fingerprint)
    write_json(out / "study.json", {"options": asdict(options), "dataset": asdict(dataset.card)})
    tasks = group(pending(work, [cell for branch in branches for cell in branch.cells()]))
    failures: dict[str, str] = {}
    if tasks:
        total, update = sum(map(len, tasks)), seconds_between_updates()
        with ExitStack() as stack:
            here = options.cluster == "local:1"
            if not here:
                pool = stack.enter_context(open_pool(options.cluster, most=len(tasks), label="study"))
            bar = stack.enter_context(tqdm(total=total, desc="study", unit=" cells", mininterval=update))
            outcomes = _here(work, tasks, bar) if here else _on_cluster(work, tasks, pool)
            for task, failed in outcomes:
                failures.update(failed)
                if not here:
                    bar.set_postfix_str(f"done: {task[-1].label}", refresh=False)
                bar.update(len(task))
                for cell in task:
                    if (reason := failures.get(cell.key)) and not any(i.key in failures for i in cell.inputs.values()):
                        bar.write(one_line(f"{cell.label}: {reason}"), file=sys.stderr)
    return branches, work, failures


def pending(work: Workshop, cells: Sequence[Cell]) -> list[Cell]:
    """Those without a result, and those whose work has been deleted and is needed again; each after its inputs."""
    known: dict[str, Cell] = {}
    for cell in cells:
        known.setdefault(cell.key, cell)
    wanted: set[str] = set()
    needed: set[str] = set()
    for cell in reversed(known.values()):
        if work.read(cell) is None or (cell.key in needed and not work.place(cell).exists()):
            wanted.add(cell.key)
            needed.update(other.key for other in cell.ancestors())
    return [cell for cell in known.values() if cell.key in wanted]


def group(cells: Sequence[Cell]) -> list[Task]:
    """Tasks, each after those that it needs: fits on frames, one pass over the frames for each seed, then the rest.

    What needs no seed goes with the first.
    """
    fits = [cell for cell in cells if cell.stage == "fit" and "base" not in cell.inputs]
    passes: dict[int, list[Cell]] = {}
    unseeded: list[Cell] = []
    for cell in cells:
        if cell.stage == "extract" and "base" not in cell.inputs:
            fit = cell.inputs.get("fit")
            (unseeded if fit is None else passes.setdefault(fit.settings["options"]["seed"], [])).append(cell)
    first, *others = passes.values() or [[]]
    together = [tuple(part) for part in ([*first, *unseeded], *others) if part]
    early = {cell.key for cell in fits} | {cell.key for part in together for cell in part}
    return [*((cell,) for cell in fits), *together, *((cell,) for cell in cells if cell.key not in early)]


def run_task(work: Workshop, task: Task, known: dict[str, str]) -> dict[str, str]:
    """Do a task's cells, as far as their inputs could be done.

    Args:
        work, task: what to do, and where.
        known: key -> reason, for those that could not be done before.

    Returns:
        Key -> reason, for those of its cells that could not be done.
    """
    failures: dict[str, str] = {}
    ready = []
    for cell in task:
        if reasons := [known[other.key] for other in cell.inputs.values() if other.key in known]:
            failures[cell.key] = reasons[0]
        else:
            ready.append(cell)
    begun = {cell.key for cell in ready if work.is_begun(cell)}
    shared = _extract_at_once(work, ready) if len(ready) > 1 else {}
    # What a pass that failed left is gone on with below, so that is not timed as a whole either.
    begun |= {cell.key for cell in ready if cell.key not in shared and work.is_begun(cell)}
    for cell in ready:
        with _log(work, cell) as log:
            try:
                do_cell(work, cell, resumed=cell.key in begun, shared=shared.get(cell.key, {}))
            except UserError as error:
                failures[cell.key] = str(error)
            except Exception as error:  # noqa: BLE001 (hours of other cells must not be lost to whatever one library raises)
                traceback.print_exc()
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                failures[cell.key] = f"{reason} (see {log})"
    return failures


def _extract_at_once(work: Workshop, cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """Extract several stores in one pass over the frames; whatever fails here fails again where each store is finished by itself.

    Returns:
        Key -> what was measured, for those of a pass that did not fail.
    """
    found: dict[str, dict[str, Any]] = {}
    with _log(work, cells[0]):
        made: dict[str, dict[Cell, Encoder]] = {}
        for cell in cells:
            with suppress(Exception):
                made.setdefault(cell.settings["store_dtype"], {})[cell] = create_encoder(work, cell)
        for dtype, encoders in made.items():
            begun = time.perf_counter()
            stores = [(encoder, work.place(cell)) for cell, encoder in encoders.items()]
            try:
                extract_together(FrameDataset.open(work.dataset), stores, dtype=dtype, batch=work.batch)
            except Exception:  # noqa: BLE001 (whatever it is, each store's own attempt will tell)
                traceback.print_exc()
                continue
            measured = {
                "extract_seconds": (time.perf_counter() - begun) / len(stores),
                "extracted_together": len(stores),
            }
            found |= {cell.key: measured for cell in encoders}
    return found


@contextmanager
def _log(work: Workshop, cell: Cell) -> Iterator[Path]:
    """What is printed goes to the cell's log, so that the study has one bar."""
    path = work.log(cell)
    make_folder(path.parent)
    with path.open("a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        yield path


def _here(work: Workshop, tasks: Sequence[Task], bar: Any) -> Iterator[tuple[Task, dict[str, str]]]:
    failures: dict[str, str] = {}
    for task in tasks:
        bar.set_postfix_str(", ".join(cell.label for cell in task)[:60], refresh=sys.stderr.isatty())
        failed = run_task(work, task, failures)
        failures.update(failed)
        yield task, failed


def _on_cluster(work: Workshop, tasks: Sequence[Task], pool: Pool) -> Iterator[tuple[Task, dict[str, str]]]:
    """The same in other processes, each task as soon as those that it needs are done, or have failed."""
    waiting, ahead = list(tasks), {cell.key for task in tasks for cell in task}
    failures: dict[str, str] = {}
    while waiting or pool.running:
        ready = []
        for task in list(waiting):
            needed = {other.key for cell in task for other in cell.inputs.values()}
            if not needed & ahead:
                waiting.remove(task)
                known = {key: reason for key, reason in failures.items() if key in needed}
                # Not as a graph of Dask's: one whose process is killed would take with it all that comes after.
                ready.append((task, functools.partial(run_task, work, task, known)))
        pool.submit(ready)
        for task, outcome in pool.finished():
            # A task that fails says so itself, so this is of one whose worker was killed.
            failed = dict.fromkeys((c.key for c in task), str(outcome)) if isinstance(outcome, UserError) else outcome
            failures.update(failed)
            ahead.difference_update(cell.key for cell in task)
            yield task, failed


STORE = (
    *("token_dim", "bytes_per_frame", "frames", "extract_seconds", "extracted_together", "derived", "source"),
    *("encode_frames_per_second", "encoder_parameters", "weights_sha256", "identity"),
)
PROBE = ("spearman", "stuck", "nearest", "nearest_90", "effective_rank", "channels", "moves", "frames", "held_out")
PLAN = (
    *("episodes", "successes", "success_rate", "threshold", "mean_env_steps", "budget_env_steps"),
    *("seconds_per_replan", "encoder_frames"),
)


def tabulate(branches: Sequence[Branch], work: Workshop, failures: dict[str, str]) -> list[dict[str, Any]]:
    """What came out: a row for each encoder, seed, fraction and evaluation; None for what could not be done, `failed` says why."""
    found = []
    for branch in branches:
        for (fraction, protocol), plan in branch.plan.items():
            cells = {"extract": branch.extract, "probe": branch.probe, "train": branch.train[fraction], "plan": plan}
            # What an earlier run left of a cell that cannot be done now is still what it is.
            done = {stage: work.read(cell) or {} for stage, cell in cells.items()}
            store, probed, run, episodes = (cell.get("result", {}) for cell in done.values())
            fit = branch.extract.inputs.get("fit")
            grid = store.get("token_grid")
            row: dict[str, Any] = {
                "encoder": branch.choice.label,
                "name": branch.choice.name,
                "seed": branch.seed,
                "fraction": fraction,
                "protocol": protocol,
                "failed": next((failures[cell.key] for cell in cells.values() if cell.key in failures), None),
                **{name: episodes.get(name) for name in PLAN},
                **dict(zip(("low", "high"), episodes.get("ci95", (None, None)), strict=True)),
            }
            judged = {judgement["threshold"]: judgement for judgement in episodes.get("by_threshold", [])}
            for at in THRESHOLDS:
                for name in ("successes", "held"):
                    row[f"{name}_{at}"] = judged.get(at, {}).get(name)
                row[f"began_{at}"] = episodes.get("began_at_goal", {}).get(str(at))
                row[f"low_{at}"], row[f"high_{at}"] = judged.get(at, {}).get("ci95", (None, None))
            row["held"] = judged.get(row["threshold"], {}).get("held")
            # Evaluations of earlier versions have no baselines.
            for actions in BASELINES:
                known = {
                    judgement["threshold"]: judgement for judgement in episodes.get("baselines", {}).get(actions, [])
                }
                for name in ("successes", "held"):
                    row[f"{actions}_{name}"] = known.get(row["threshold"], {}).get(name)
                    row |= {f"{actions}_{name}_{at}": known.get(at, {}).get(name) for at in THRESHOLDS}
            for kind in ("skill", "error", "copying"):
                values = dict(enumerate(run.get(kind, []), start=1))
                row |= {f"{kind}_{k}": values.get(k) for k in range(1, ROLLOUT_STEPS + 1)}
            row |= {f"probe_{name}": probed.get(name) for name in PROBE}
            for kind in ("linear", "mlp"):
                row |= {f"probe_{kind}_{name}": value for name, value in (probed.get(kind) or {}).items()}
            row |= {"tokens": grid and grid[0] * grid[1], **{name: store.get(name) for name in STORE}}
            row["fit_seconds"] = ((work.read(fit) if fit else None) or {}).get("seconds")
            row |= {f"{stage}_seconds": done[stage].get("seconds") for stage in ("probe", "train", "plan")}
            row |= {
                "model_parameters": run.get("parameters"),
                "resumed": any(cell.get("resumed") for cell in done.values()),
            }
            found.append(row)
    names = dict.fromkeys(name for row in found for name in row)
    return [{name: row.get(name) for name in names} for row in found]


def pooled(
    rows: Sequence[dict[str, Any]], at: float | None = None, what: str = "successes"
) -> tuple[int, int, list[float]] | None:
    """Successes and trials over the rows of an encoder's seeds, and the rate's 95 % interval.

    All seeds are tried on the same episodes, so the interval is that of so many episodes, not of so many trials.

    Args:
        rows: of `tabulate`. at: a threshold; the evaluation's own by default. what: `successes`, or another count of episodes, as `held`.
    """
    name = what if at is None else f"{what}_{at}"
    known = [row for row in rows if row[name] is not None]
    if not known:
        return None
    successes, trials = sum(row[name] for row in known), sum(row["episodes"] for row in known)
    return successes, trials, interval(successes / trials, known[0]["episodes"])
