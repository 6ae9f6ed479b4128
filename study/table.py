"""The results of a study as rows, and sums over the seeds of an encoder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from wmcache.planner.baselines import BASELINES
from wmcache.planner.episodes import THRESHOLDS
from wmcache.study.cells import Branch, Workspace
from wmcache.study.statistics import interval
from wmcache.trainer.train import ROLLOUT_STEPS

STORE = (
    *("token_dim", "bytes_per_frame", "frames", "extract_seconds", "extracted_together", "derived", "source"),
    *("encode_frames_per_second", "encoder_parameters", "weights_sha256", "identity"),
)
PROBE = ("spearman", "stuck", "nearest", "nearest_90", "effective_rank", "channels", "moves", "frames", "held_out")
PLAN = (
    *("episodes", "successes", "success_rate", "threshold", "mean_env_steps", "budget_env_steps"),
    *("seconds_per_replan", "encoder_frames"),
)
Row = dict[str, Any]


def tabulate(branches: Sequence[Branch], work: Workspace, failures: Mapping[str, str]) -> list[Row]:
    """Make a row for each encoder, seed, fraction and evaluation.

    A figure of a cell that failed is None, and `failed` has the reason, unless an earlier run left its result.
    """
    found = []
    for branch in branches:
        fit = branch.extract.inputs.get("fit")
        fitted = (fit and work.read(fit)) or {}
        for (fraction, protocol), plan in branch.plan.items():
            cells = {"extract": branch.extract, "probe": branch.probe, "train": branch.train[fraction], "plan": plan}
            done = {stage: work.read(cell) or {} for stage, cell in cells.items()}
            store, probed, run, episodes = (cell.get("result", {}) for cell in done.values())
            row = {
                "encoder": branch.choice.label,
                "name": branch.choice.name,
                "seed": branch.seed,
                "fraction": fraction,
                "protocol": protocol,
                "failed": next((failures[cell.key] for cell in cells.values() if cell.key in failures), None),
                **_plan_figures(episodes),
                **_model_figures(run, probed),
                "tokens": (grid := store.get("token_grid")) and grid[0] * grid[1],
                **{name: store.get(name) for name in STORE},
                "fit_seconds": fitted.get("seconds"),
                **{f"{stage}_seconds": done[stage].get("seconds") for stage in ("probe", "train", "plan")},
                "model_parameters": run.get("parameters"),
                "resumed": any(cell.get("resumed") for cell in done.values()),
            }
            found.append(row)
    names = dict.fromkeys(name for row in found for name in row)
    return [{name: row.get(name) for name in names} for row in found]


def _plan_figures(episodes: Mapping[str, Any]) -> Row:
    """Successes by threshold, of the planner and of the baselines; results of earlier versions have no baselines."""
    row: Row = {name: episodes.get(name) for name in PLAN}
    row |= dict(zip(("low", "high"), episodes.get("ci95", (None, None)), strict=True))
    judged = _by_threshold(episodes.get("by_threshold", []))
    for at in THRESHOLDS:
        row |= {f"{name}_{at}": judged[at].get(name) for name in ("successes", "held")}
        row[f"began_{at}"] = episodes.get("began_at_goal", {}).get(str(at))
        row[f"low_{at}"], row[f"high_{at}"] = judged[at].get("ci95", (None, None))
    row["held"] = judged[row["threshold"]].get("held")
    for actions in BASELINES:
        judged = _by_threshold(episodes.get("baselines", {}).get(actions, []))
        for name in ("successes", "held"):
            row[f"{actions}_{name}"] = judged[row["threshold"]].get(name)
            row |= {f"{actions}_{name}_{at}": judged[at].get(name) for at in THRESHOLDS}
    return row


def _by_threshold(judgements: Sequence[Row]) -> defaultdict[float | None, Row]:
    return defaultdict(dict, {judgement["threshold"]: judgement for judgement in judgements})


def _model_figures(run: Mapping[str, Any], probed: Mapping[str, Any]) -> Row:
    row: Row = {}
    for kind in ("skill", "error", "copying"):
        values = dict(enumerate(run.get(kind, []), start=1))
        row |= {f"{kind}_{k}": values.get(k) for k in range(1, ROLLOUT_STEPS + 1)}
    row |= {f"probe_{name}": probed.get(name) for name in PROBE}
    for kind in ("linear", "mlp"):
        row |= {f"probe_{kind}_{name}": value for name, value in (probed.get(kind) or {}).items()}
    return row


def pooled(
    rows: Sequence[Row], at: float | None = None, what: str = "successes"
) -> tuple[int, int, list[float]] | None:
    """Successes and trials over the rows of an encoder's seeds, and the 95 % interval of the rate.

    All seeds are tried on the same episodes, so the interval is that of this number of episodes, not of trials. `at` is a threshold, None
    for the evaluation's own; `what` is `successes` or another count of episodes, such as `held`.
    """
    name = what if at is None else f"{what}_{at}"
    known = [row for row in rows if row[name] is not None]
    if not known:
        return None
    successes, trials = sum(row[name] for row in known), sum(row["episodes"] for row in known)
    return successes, trials, interval(successes / trials, known[0]["episodes"])
