"""Doing a study: cells that are not done yet, in this process one after another, or in several under Dask as their inputs are done."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm
from wmcache.cache.errors import UserError
from wmcache.cache.files import home, make_folder, seconds_between_updates, write_json
from wmcache.envs import find_maze
from wmcache.pipeline.cluster import local_client
from wmcache.pipeline.collect import collect
from wmcache.pipeline.extract import extract_together
from wmcache.pipeline.frames import FrameDataset
from wmcache.planner.episodes import THRESHOLDS, wilson
from wmcache.study.cells import Branch, Cell, Workshop, create_encoder, do_cell, make_branches
from wmcache.study.options import StudyOptions
from wmcache.trainer.loop import ROLLOUT_STEPS

Task = tuple[Cell, ...]
"""Cells that are done in one go: one, or all extractions that need nothing but the frames, which are then decoded once."""


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
        collect(settings.pop("env"), path, **settings)
    dataset = FrameDataset.open(path)
    if wanted is not None:
        there = {**asdict(dataset.card), "length": dataset.card.frames // dataset.card.episodes}
        if different := [
            f"{key} {there[key]} != {value}" for key, value in asdict(wanted).items() if there[key] != value
        ]:
            raise UserError(
                f"{path} holds frames of other settings than the study's ({'; '.join(different)}); choose another dataset"
            )
    return dataset


def run_study(options: StudyOptions, out: Path) -> tuple[list[Branch], Workshop, dict[str, str]]:
    """Do what is not done yet of a study; run again, it goes on.

    Args:
        options: what to do. out: its folder.

    Returns:
        The cells, where their results are, and key -> reason for those that could not be done.

    Raises:
        UserError: the frames cannot be had, or weights that are named are not there.
    """
    dataset = open_frames(options)
    work = Workshop(out, dataset.path, options.device, options.batch)
    branches = make_branches(options, dataset.card.fingerprint)
    make_folder(out)
    write_json(out / "study.json", {"options": asdict(options), "dataset": asdict(dataset.card)})
    tasks = group(pending(work, [cell for branch in branches for cell in branch.cells()]))
    failures: dict[str, str] = {}
    if tasks:
        total, update = sum(map(len, tasks)), seconds_between_updates()
        with tqdm(total=total, desc="study", unit=" cells", mininterval=update) as bar:
            outcomes = _here(work, tasks, bar) if options.workers == 1 else _in_processes(work, tasks, options.workers)
            for task, failed in outcomes:
                failures.update(failed)
                if options.workers > 1:
                    bar.set_postfix_str(f"done: {task[-1].label}", refresh=False)
                bar.update(len(task))
                for cell in task:
                    if (reason := failures.get(cell.key)) and not any(i.key in failures for i in cell.inputs.values()):
                        bar.write(f"{cell.label}: {reason}", file=sys.stderr)
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
    """Tasks, each after those that it needs; extractions that wait for nothing are one, the first."""
    together = tuple(cell for cell in cells if cell.stage == "extract" and not cell.inputs)
    return [*([together] if together else []), *((cell,) for cell in cells if cell not in together)]


def run_task(work: Workshop, task: Task, *before: dict[str, str]) -> dict[str, str]:
    """Do a task's cells, as far as their inputs could be done.

    Args:
        work, task: what to do, and where.
        before: what the tasks that it needs returned.

    Returns:
        Key -> reason, for those of its cells that could not be done.
    """
    known = {key: reason for failed in before for key, reason in failed.items()}
    failures: dict[str, str] = {}
    ready = []
    for cell in task:
        if reasons := [known[other.key] for other in cell.inputs.values() if other.key in known]:
            failures[cell.key] = reasons[0]
        else:
            ready.append(cell)
    begun = {cell.key for cell in ready if work.is_begun(cell)}
    shared = _extract_at_once(work, ready) if len(ready) > 1 else {}
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
    """Extract several stores in one pass over the frames; whatever fails here fails again where each store is finished by itself."""
    with _log(work, cells[0]):
        made = {}
        for cell in cells:
            with suppress(Exception):
                made[cell.key] = create_encoder(work, cell), work.place(cell), cell.settings["store_dtype"]
        begun = time.perf_counter()
        for dtype in {dtype for *_, dtype in made.values()}:
            stores = [(encoder, place) for encoder, place, kind in made.values() if kind == dtype]
            with suppress(Exception):
                extract_together(FrameDataset.open(work.dataset), stores, dtype=dtype, batch=work.batch)
    seconds = (time.perf_counter() - begun) / max(1, len(made))
    return {key: {"extract_seconds": seconds, "extracted_together": len(made)} for key in made}


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


def _in_processes(work: Workshop, tasks: Sequence[Task], workers: int) -> Iterator[tuple[Task, dict[str, str]]]:
    """The same as a graph of Dask futures."""
    from distributed import KilledWorker, as_completed

    with local_client(workers) as client:
        of_cell: dict[str, Any] = {}
        of_future: dict[Any, Task] = {}
        for task in tasks:
            inputs = {
                other.key: of_cell[other.key] for cell in task for other in cell.inputs.values() if other.key in of_cell
            }
            future = client.submit(run_task, work, task, *dict.fromkeys(inputs.values()), pure=False)
            of_cell.update({cell.key: future for cell in task})
            of_future[future] = task
        for future in as_completed(list(of_future)):
            task = of_future[future]
            try:
                yield task, future.result()
            except KilledWorker:
                reason = "its worker process was killed again and again; lower --workers"
                yield task, {cell.key: reason for cell in task}


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
                row[f"low_{at}"], row[f"high_{at}"] = judged.get(at, {}).get("ci95", (None, None))
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


def pooled(rows: Sequence[dict[str, Any]], at: float | None = None) -> tuple[int, int, list[float]] | None:
    """Successes, episodes and Wilson's interval over the rows of an encoder's seeds, by the evaluation's threshold or another one."""
    name = "successes" if at is None else f"successes_{at}"
    known = [row for row in rows if row[name] is not None]
    if not known:
        return None
    successes, episodes = sum(row[name] for row in known), sum(row["episodes"] for row in known)
    return successes, episodes, wilson(successes, episodes)
