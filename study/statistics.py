"""Which differences between systems (a model on an encoder) are real: paired tests over the same planning episodes.

The unit is the episode. Episode n has the same start, goal and search noise for every system and seed, so the results of the seeds on one
episode are not independent: they count as one. Two systems are compared by the difference of their successes on each episode, summed over
the seeds, with an exact sign-flip test; with one seed this is the exact McNemar test (McNemar 1947). The tests hold for the world models
that were trained; they do not generalise to other seeds.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from scipy.stats import t as student

from wmcache.study.branches import Branch
from wmcache.study.cells import Workspace
from wmcache.study.options import StudyOptions
from wmcache.trainer.train import ROLLOUT_STEPS

LEVEL = 0.05

Reached = Mapping[str, Mapping[int, NDArray[np.bool_]]]
"""System -> seed -> which episodes were solved, [episodes]."""


@dataclass(frozen=True)
class Pair:
    """Two systems over the same episodes.

    Attributes:
        first_ahead, second_ahead: episodes on which one has more successes over the seeds than the other.
        adjusted: `p` of the sign-flip test, adjusted by Holm over all pairs.
        real: whether they differ at LEVEL.
    """

    first: str
    second: str
    episodes: int
    seeds: int
    first_ahead: int
    second_ahead: int
    p: float
    adjusted: float
    real: bool


def sign_flip(differences: NDArray[np.int64]) -> float:
    """Exact two-sided p of the sum of integer differences [episodes], if each could as well have the opposite sign."""
    sizes = np.abs(differences[differences != 0])
    chances = np.ones(1)
    for size in sizes.tolist():
        # Adds plus or minus `size` to the sum; index k of `chances` is the sum k - (len(chances) - 1) / 2.
        step = np.zeros(2 * size + 1)
        step[[0, -1]] = 0.5
        chances = np.convolve(chances, step)
    sums = np.arange(len(chances)) - len(chances) // 2
    return min(1.0, float(chances[np.abs(sums) >= abs(int(differences.sum()))].sum()))


def holm(values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979): the k-th smallest of m times m - k + 1, never falling, at most 1."""
    order = np.argsort(values, kind="stable")
    adjusted = np.empty(len(values))
    adjusted[order] = np.maximum.accumulate(np.asarray(values)[order] * np.arange(len(values), 0, -1)).clip(max=1)
    return adjusted.tolist()


def compare(reached: Reached) -> list[Pair]:
    """Every pair of systems, over the seeds that both have."""
    found = []
    for first, second in itertools.combinations(reached, 2):
        if seeds := [seed for seed in reached[first] if seed in reached[second]]:
            a, b = (np.stack([reached[name][seed] for seed in seeds]).sum(0) for name in (first, second))
            counts = (len(a), len(seeds), int((a > b).sum()), int((b > a).sum()))
            found.append((first, second, *counts, sign_flip(a - b)))
    adjusted = holm([p for *_, p in found])
    return [Pair(*pair, value, value < LEVEL) for pair, value in zip(found, adjusted, strict=True)]


def smallest_p(pairs: Sequence[Pair]) -> float:
    """The smallest adjusted p that any data could give: one system ahead on every episode, and all signs alike."""
    episodes = max((pair.episodes for pair in pairs), default=0)
    return min(1.0, len(pairs) * 2.0 ** (1 - episodes))


def episodes_needed(pairs: Sequence[Pair]) -> int:
    """Episodes on which one system has to be ahead, and the other on none, for one of the pairs to differ."""
    return next(count for count in itertools.count(1) if max(1, len(pairs)) * 2.0 ** (1 - count) < LEVEL)


def _differ_and_rates(reached: Reached, pairs: Sequence[Pair]) -> tuple[set[frozenset[str]], dict[str, float]]:
    # The highest rate first.
    differ = {frozenset((pair.first, pair.second)) for pair in pairs if pair.real}
    rates = {name: float(np.mean(list(seeds.values()))) for name, seeds in reached.items() if seeds}
    return differ, dict(sorted(rates.items(), key=lambda item: -item[1]))


def rank(reached: Reached, pairs: Sequence[Pair]) -> list[list[str]]:
    """Groups, the best first: the system of the highest success among those left, and all that the tests do not separate from it.

    Systems without any success are a group of their own. There are no groups where no data could separate two systems.
    """
    differ, rates = _differ_and_rates(reached, pairs)
    if len(rates) > 1 and smallest_p(pairs) >= LEVEL:
        return []
    left, groups = list(rates), []
    while left:
        best = left[0]
        alike = [name for name in left if frozenset((best, name)) not in differ and (rates[name] or not rates[best])]
        groups.append(alike)
        left = [name for name in left if name not in alike]
    return groups


def separated(reached: Reached, pairs: Sequence[Pair]) -> tuple[str | None, list[str]]:
    """The system of the highest success, where it differs from every other; and the systems that differ from it."""
    differ, rates = _differ_and_rates(reached, pairs)
    best = next(iter(rates), None)
    below = [name for name in reached if frozenset((best, name)) in differ]
    return (best if below and len(below) == len(rates) - 1 else None), below


def interval(rates: Sequence[float], episodes: int) -> list[float]:
    """95 % interval of the mean success rate of seeds that were tried on the same episodes, over episodes and over seeds.

    It is Wilson's of an effective number of episodes (Korn and Graubard 1998): `episodes`, not trials, less where the seeds differ. The
    variances of episodes and seeds add up, with the degrees of freedom of Satterthwaite (1946). With one seed it is Wilson's.
    """
    rate, z, size = float(np.mean(rates)), float(norm.ppf(0.975)), float(episodes)
    between = float(np.var(rates, ddof=1)) / len(rates) if len(rates) > 1 else 0.0
    if between:
        total = between + rate * (1 - rate) / episodes
        freedom = (len(rates) - 1) * (total / between) ** 2
        size = rate * (1 - rate) / total * (z / float(student.ppf(0.975, freedom))) ** 2
    centre = (rate + z**2 / (2 * size)) / (1 + z**2 / size)
    half = z / (1 + z**2 / size) * float(np.sqrt(rate * (1 - rate) / size + (z / (2 * size)) ** 2))
    return [max(0.0, centre - half), min(1.0, centre + half)]


STORE = (
    *("token_dim", "bytes_per_frame", "frames", "extract_seconds", "extracted_together", "derived", "source"),
    *("encode_frames_per_second", "encoder_parameters", "weights_sha256", "identity"),
)
PROBE = (
    *("spearman", "stuck", "nearest", "nearest_90", "effective_rank", "channels", "moves", "mig"),
    *("frames", "held_out"),
)
PLAN = (
    *("episodes", "successes", "success_rate", "threshold", "mean_env_steps", "budget_env_steps"),
    *("seconds_per_replan", "operations_per_decision", "encoder_frames"),
)
Row = dict[str, Any]


def tabulate(
    options: StudyOptions, branches: Sequence[Branch], work: Workspace, failures: Mapping[str, str]
) -> list[Row]:
    """Make a row for each system, seed, fraction and evaluation.

    A figure of a cell that failed is None, and `failed` has the reason, unless an earlier run left its result.
    """
    found = [_row(options, branch, *place, work, failures) for branch in branches for place in branch.plan]
    names = dict.fromkeys(name for row in found for name in row)
    return [{name: row.get(name) for name in names} for row in found]


def _row(
    options: StudyOptions,
    branch: Branch,
    fraction: float,
    protocol: str,
    work: Workspace,
    failures: Mapping[str, str],
) -> Row:
    fit = branch.extract.inputs.get("fit")
    fitted = (fit and work.read(fit)) or {}
    cells = {"extract": branch.extract, "probe": branch.probe, "train": branch.train[fraction]}
    if fraction in branch.actor:
        cells["actor"] = branch.actor[fraction]
    cells["plan"] = branch.plan[fraction, protocol]
    last = fraction == options.fractions[-1]
    extra = {name: cell for (plan, name), cell in branch.baselines.items() if last and plan == protocol}
    done = {stage: work.read(cell) or {} for stage, cell in cells.items()}
    results = {stage: cell.get("result", {}) for stage, cell in done.items()}
    others = {name: (work.read(cell) or {}).get("result", {}) for name, cell in extra.items()}
    judged = {name: result.get("by_threshold", []) for name, result in others.items()}
    baselines = {**dict.fromkeys(options.baselines, ()), **results["plan"].get("baselines", {}), **judged}
    store, run = results["extract"], results["train"]
    used = [*cells.values(), *extra.values()]
    row: Row = {
        "system": branch.label,
        "encoder": branch.choice.label,
        "name": branch.choice.name,
        "model": branch.model.label,
        "seed": branch.seed,
        "fraction": fraction,
        "protocol": protocol,
        "failed": next((failures[cell.key] for cell in used if cell.key in failures), None),
        **_plan_figures(results["plan"], options.thresholds, baselines),
        **{f"{name}_episodes": result.get("episodes") for name, result in others.items()},
        **_model_figures(run, results["probe"]),
        "tokens": (grid := store.get("token_grid")) and grid[0] * grid[1],
        **{name: store.get(name) for name in STORE},
        "fit_seconds": fitted.get("seconds"),
        **{f"{stage}_seconds": cell.get("seconds") for stage, cell in done.items() if stage != "extract"},
        "model_parameters": run.get("parameters"),
        "resumed": any(cell.get("resumed") for cell in done.values()),
    }
    return row | ({"actor_parameters": results["actor"].get("parameters")} if "actor" in results else {})


def _plan_figures(episodes: Mapping[str, Any], thresholds: Sequence[float], baselines: Mapping[str, Any]) -> Row:
    """Successes by threshold, of the planner and of the baselines; results of earlier versions have no baselines."""
    row: Row = {name: episodes.get(name) for name in PLAN}
    row |= dict(zip(("low", "high"), episodes.get("ci95", (None, None)), strict=True))
    judged = _by_threshold(episodes.get("by_threshold", []))
    for at in thresholds:
        row |= {f"{name}_{at}": judged[at].get(name) for name in ("successes", "held")}
        row[f"began_{at}"] = episodes.get("began_at_goal", {}).get(str(at))
        row[f"low_{at}"], row[f"high_{at}"] = judged[at].get("ci95", (None, None))
    row["held"] = judged[row["threshold"]].get("held")
    for actions, judgements in baselines.items():
        judged = _by_threshold(judgements)
        for name in ("successes", "held"):
            row[f"{actions}_{name}"] = judged[row["threshold"]].get(name)
            row |= {f"{actions}_{name}_{at}": judged[at].get(name) for at in thresholds}
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
    rows: Sequence[Row], at: float | None = None, what: str = "successes", of: str = "episodes"
) -> tuple[int, int, list[float]] | None:
    """Successes and trials over the rows of a system's seeds, and the 95 % `interval` of the rate.

    `at` is a threshold, None for the evaluation's own; `what` is `successes` or another count of episodes, such as `held`, and `of` the
    column of their number.
    """
    name = what if at is None else f"{what}_{at}"
    known = [row for row in rows if row[name] is not None]
    if not known:
        return None
    rates = [row[name] / row[of] for row in known]
    return sum(row[name] for row in known), sum(row[of] for row in known), interval(rates, known[0][of])
