"""What rounds and online training share: one process for each folder, its settings, and how a part is encoded and evaluated."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from wmcache.common.errors import UserError
from wmcache.common.jsonfiles import read_json, write_json
from wmcache.common.locks import exclusive
from wmcache.pipeline import encoders
from wmcache.pipeline.extract import extract_together, with_log_variances
from wmcache.pipeline.fit import fit
from wmcache.pipeline.frames import FrameDataset
from wmcache.planner.context import EvalContext
from wmcache.planner.controllers.options import ControllerOptions
from wmcache.planner.evaluate import evaluate, remove_unfinished
from wmcache.planner.options import PlanOptions
from wmcache.planner.report import write_episodes
from wmcache.planner.videos import write_videos
from wmcache.study.cells import ENCODER_OPTIONS
from wmcache.study.options import EncoderChoice
from wmcache.trainer.options import NEWER, TrainOptions

HINT = "restore it, or choose another --out"
MAY_CHANGE = {"cluster", "batch", "plan.batch"}
"""Also each part's device."""
FIGURES = (
    "episodes",
    "successes",
    "success_rate",
    "ci95",
    "held",
    "held_ci95",
    "mean_env_steps",
    "threshold",
    "return",
    "by_threshold",
)
"""Of an evaluation's results, those that rows have."""
Row = dict[str, Any]


@contextmanager
def alone(out: Path, program: str) -> Iterator[None]:
    """Keep other processes from working in a folder; raises UserError where one already does."""
    with exclusive(out / ".lock", out, wait=False) as locked:
        if not locked:
            raise UserError(f"another {program} is running in {out}; wait for it, or choose another --out")
        yield


def refuse_other_settings(options: Any, file: Path, may_change: Collection[str] = ()) -> None:
    """Raise UserError where a folder was started with other settings, which `file` has, or has files and no settings.

    Args:
        options: dataclass of all settings. may_change: names of those that may differ, beside `MAY_CHANGE`.
    """
    out = file.parent
    if not file.exists():
        if out.exists() and any(path.name != ".lock" for path in out.iterdir()):
            raise UserError(f"{out} exists and has no {file.name}; choose another --out")
        return
    # Options that are newer than the folder had their defaults.
    newer = {
        "draw": PlanOptions.draw,
        "min_distance": PlanOptions.min_distance,
        "squash": ControllerOptions.squash,
        **{name: getattr(TrainOptions(), name) for name in NEWER},
    }
    before = _flat(read_json(file, HINT).get("options", {}))
    now, free = _flat(asdict(options)), MAY_CHANGE.union(may_change)
    different = [
        f"{name} {before.get(name)} != {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name, newer.get(name.split(".")[-1])) != now.get(name)
        and name not in free
        and name.split(".")[-1] != "device"
    ]
    if different:
        raise UserError(f"{out} was started with other settings ({'; '.join(different)}); choose another --out")


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in table.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def encode(
    frames: Path,
    store: Path,
    choice: EncoderChoice,
    first: Path,
    fitted: Path,
    *,
    device: str,
    batch: int,
    cluster: str,
) -> None:
    """Encode a part's frames by the encoder of all parts; run again, it does what is missing.

    Args:
        first: frames that the encoder is fitted on, where it needs a fit. fitted: file of its weights then.
    """
    dataset, weights = FrameDataset.open(frames), choice.weights and Path(choice.weights)
    if weights is None and encoders.get_entry(choice.name).fit:
        weights, how = fitted, encoders.fit_options(choice.name, choice.fit)
        shown = FrameDataset.open(first)
        fit(shown, choice.name, weights, how, max_frames=choice.max_frames, device=device, measure=False)
    own = {name: getattr(choice, name) for name in ENCODER_OPTIONS}
    encoder = encoders.create(choice.name, weights=weights, device=device, **own)
    stores = with_log_variances([(encoder, store)])
    extract_together(dataset, stores, dtype=choice.store_dtype, batch=batch, cluster=cluster)


def evaluate_part(
    run: Path, plan: PlanOptions, out: Path, cluster: str, *, baselines: bool = True, videos: int = 0
) -> None:
    """Act in the episodes of an evaluation, unless that is done; results.json in `out` has its results.

    Args:
        baselines: evaluate those of `plan` too. videos: how many episodes to show in `out/videos`.
    """
    if (out / "results.json").exists():
        return
    plan = plan if baselines else replace(plan, baselines="")
    context = EvalContext(run, plan)
    episodes, found = evaluate(context, plan, out, cluster)
    write_episodes(out / "episodes.parquet", episodes, found)
    if videos:
        write_videos(out / "videos", episodes, context, context.settled(plan), videos)
    write_json(out / "results.json", found)
    remove_unfinished(out)


def figures_of(results: Row) -> Row:
    """Return the figures of an evaluation that rows have."""
    return {name: results[name] for name in FIGURES if name in results}
