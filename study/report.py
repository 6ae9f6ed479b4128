"""The report of a study: study.parquet, a table for the terminal, and one self-contained page."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.figure import Figure

from wmcache.common.device import CPU
from wmcache.common.figures import png_bytes
from wmcache.common.files import atomic_write
from wmcache.planner.report import COLOURS, RC, describe_making, write_page
from wmcache.study.branches import Branch
from wmcache.study.cells import Workspace
from wmcache.study.evaluations import by_evaluation
from wmcache.study.models import UNTRAINED, Evaluation
from wmcache.study.options import StudyOptions
from wmcache.study.statistics import LEVEL, Row, compare, episodes_needed, pooled, rank, separated, smallest_p
from wmcache.trainer.train import ROLLOUT_STEPS

LIBRARIES = ("wmcache", "torch", "numpy", "timm", "transformers", "mujoco", "scikit-learn")
STATE = {"x": "position", "y": "position", "vx": "velocity", "vy": "velocity"}
"""Numbers of a state whose probes are averaged."""
MARKERS = "osD^vP*X<>"


def write_report(
    out: Path, options: StudyOptions, rows: list[Row], work: Workspace, branches: Sequence[Branch], command: str
) -> dict[str, Any]:
    """Write study.parquet and study.html.

    Returns:
        For each evaluation at its threshold and the largest fraction: `pairs`, the tests; `ranking`, the groups; `best`, the system
        that differs from every other; `below`, those that differ from the one of the highest success; `smallest_p`, of any possible data;
        and `episodes_needed` for a difference to show.
    """
    with atomic_write(out / "study.parquet") as file:
        pq.write_table(pa.Table.from_pylist(rows), file)
    results = {plan.name: _tests(plan, options.fractions[-1], work, branches) for plan in options.plan}
    table = summarise(options, rows)
    lines = with_baselines(options, rows, table)
    pictures = {"success": draw_success(options, lines), "skill": draw_skill(table)}
    if len(options.fractions) > 1:
        pictures["fractions"] = draw_fractions(options, rows, table)
    probes = {branch.choice.label: work.product(branch.probe) for branch in reversed(branches)}
    best: dict[str, Row] = {}
    for line in table:
        best.setdefault(line["encoder"], line)
    encoders = list(best.values())
    write_page(
        out / "study.html",
        "wmcache.study",
        "study.html.jinja",
        options=options,
        settings=json.dumps(asdict(options), indent=2),
        rows=rows,
        table=table,
        lines=lines,
        encoders=encoders,
        stores={(row["encoder"], row["seed"]): row for row in rows if row["identity"]}.values(),
        began={plan.name: _began(rows, plan) for plan in options.plan},
        evaluations={
            name: {
                **found,
                "matrix": _matrix(found["pairs"]),
                "names": [line["system"] for line in table if line["success"][name]],
            }
            for name, found in results.items()
        },
        columns=list(dict.fromkeys(column for line in encoders for column in line["probes"])),
        pictures=pictures,
        drawn={name: path.read_bytes() for line in encoders if (path := probes[name := line["encoder"]]).exists()},
        thresholds=options.thresholds,
        level=LEVEL,
        command=command,
        versions={name: version(name) for name in LIBRARIES},
        machine=describe_making(CPU)["machine"],
    )
    return results


def _tests(plan: Evaluation, fraction: float, work: Workspace, branches: Sequence[Branch]) -> dict[str, Any]:
    reached: dict[str, dict[int, Any]] = {}
    for branch in branches:
        cell = branch.plan.get((fraction, plan.name))
        if cell is not None and (known := work.read(cell)) is not None:
            episodes = np.array(known["result"]["reached"][str(plan.options.threshold)], bool)
            reached.setdefault(branch.label, {})[branch.seed] = episodes
    pairs = compare(reached)
    best, below = separated(reached, pairs)
    return {
        "pairs": [asdict(pair) for pair in pairs],
        "ranking": rank(reached, pairs),
        "best": best,
        "below": below,
        "smallest_p": smallest_p(pairs),
        "episodes_needed": episodes_needed(pairs),
    }


def _matrix(pairs: list[Row]) -> dict[tuple[str, str], Row]:
    # Row and column -> their pair, from the row's side.
    found = {(pair["first"], pair["second"]): pair for pair in pairs}
    for pair in pairs:
        turned = {"first_ahead": pair["second_ahead"], "second_ahead": pair["first_ahead"]}
        found[pair["second"], pair["first"]] = pair | turned
    return found


def summarise(options: StudyOptions, rows: Sequence[Row]) -> list[Row]:
    """Make a line for each system at the largest fraction, sorted by success in the first evaluation.

    Counts of episodes are those of all seeds, see `_counts`; other figures are means over the seeds, those of an evaluation of the first
    one that the system takes part in. `untrained` is None without such a baseline.
    """
    table = []
    for label, encoder, model in options.systems:
        mine = {plan.name: _select(rows, label, options.fractions[-1], plan.name) for plan in options.plan}
        first = next(found for found in mine.values() if found)
        own = {
            "system": label,
            "encoder": encoder.label,
            "name": encoder.name,
            "model": model.label,
            "trained": model.train,
            "acts": model.acts_by(options.plan),
            "source": first[0]["source"],
            "failed": next((row["failed"] for found in mine.values() for row in found if row["failed"]), None),
            "derived": bool(first[0]["derived"]),
            "costs": {name: _means(found) for name, found in mine.items()},
            "untrained": _counts(options, mine, "untrained_") if UNTRAINED in options.baselines else None,
        }
        known = _means(first)
        table.append({**known, **own, "probes": _probes(known), **_counts(options, mine)})
    return sorted(table, key=lambda line: -rate(line["success"][options.plan[0].name]))


def _means(rows: Sequence[Row]) -> Row:
    """Numbers of rows, means over those that have them; None where none has."""
    known: Row = {}
    for name, value in rows[0].items() if rows else ():
        found = [row[name] for row in rows if isinstance(row[name], int | float)]
        if found or value is None:
            known[name] = float(np.mean(found)) if found else None
    return known


def _counts(options: StudyOptions, by_plan: Mapping[str, Sequence[Row]], actor: str = "") -> Row:
    """Evaluation -> result of `pooled`: of `success`, of `held`, and `within` each threshold and `held_within` it."""
    own = f"{actor}episodes"  # of a baseline that was evaluated by itself
    of = own if any(own in row for rows in by_plan.values() for row in rows) else "episodes"
    return {
        "success": {name: pooled(rows, None, f"{actor}successes", of) for name, rows in by_plan.items()},
        "held": {name: pooled(rows, None, f"{actor}held", of) for name, rows in by_plan.items()},
        **{
            part: {
                name: {at: pooled(rows, at, f"{actor}{what}", of) for at in options.thresholds}
                for name, rows in by_plan.items()
            }
            for part, what in (("within", "successes"), ("held_within", "held"))
        },
    }


def with_baselines(options: StudyOptions, rows: Sequence[Row], table: Sequence[Row]) -> list[Row]:
    """Add the baselines that are the same for all systems to the lines of `summarise`; sorted by success.

    `actions` is the baseline, or None for a system. `below_random`: the evaluations in which it reached no more than random actions.
    """
    lines: list[Row] = []
    for actions in options.baselines:
        if actions == UNTRAINED:
            continue
        known = [row for row in rows if row[f"{actions}_successes"] is not None]
        # All rows of an evaluation have the same episodes, and so the same baselines.
        by_plan = {plan.name: [row for row in known if row["protocol"] == plan.name][:1] for plan in options.plan}
        if known:
            own: Row = {
                "system": f"{actions} actions",
                "actions": actions,
                "failed": None,
                "below_random": [],
                "untrained": None,
            }
            lines.append({**own, **_counts(options, by_plan, f"{actions}_")})
    random: Row = next((line["success"] for line in lines if line["actions"] == "random"), {})
    for line in table:
        reached = line["success"].items()
        below = [name for name, success in reached if success and rate(random.get(name)) >= rate(success)]
        lines.append({**line, "actions": None, "below_random": below})
    # A baseline precedes systems of equal success, which so are seen below it.
    main = options.plan[0].name
    return sorted(lines, key=lambda line: (-rate(line["success"][main]), line["actions"] is None))


def _began(rows: Sequence[Row], plan: Evaluation) -> dict[float, int]:
    # Threshold -> episodes of an evaluation that began within it; empty if that is not known.
    mine = [row for row in rows if row["protocol"] == plan.name]
    known = [row for row in mine if all(row[f"began_{at}"] is not None for at in plan.thresholds)]
    return {at: known[0][f"began_{at}"] for at in plan.thresholds} if known else {}


def _probes(known: Row) -> dict[str, float]:
    # `linear position` and the like -> mean R^2 over its columns of the state.
    found: dict[str, list[float]] = {}
    for name, value in known.items():
        kind, _, column = name.removeprefix("probe_").partition("_")
        if name.startswith(("probe_linear_", "probe_mlp_")) and value is not None:
            found.setdefault(f"{kind} {STATE.get(column, column)}", []).append(value)
    return {name: float(np.mean(values)) for name, values in found.items()}


def headline(options: StudyOptions, rows: Sequence[Row]) -> str:
    """Format the table for a terminal of 120 columns: goals reached and held, open-loop skill and a probe; of models also `_costs`."""
    main, models = options.plan[0].name, bool(options.models)
    others = options.plan[1:3] if models else options.plan[1:2]  # there is no room for more
    layout = "{:28.28}" if models else "{:32.32} {:>7}"
    layout += " {:>10} {:>9} {:>10} {:>9}" + " {:>14.14}" * len(others)
    layout += " {:>10}" if models else " {:>7} {:>7} {:>6}"
    first, last = (
        ((options.what,), ("untrained",)) if models else (("encoder", "tokens"), ("skill 1", "skill 5", "xy R2"))
    )
    lines = [layout.format(*first, main[:10], "95 %", "held", "95 %", *(plan.name for plan in others), *last)]
    table = summarise(options, rows)
    everyone = with_baselines(options, rows, table)
    for line in everyone:
        size = "-" if line.get("tokens") is None else f"{line['tokens']:.0f}x{line['token_dim']:.0f}"
        counts = (line["success"][main], line["held"][main])
        if counts[0] is None and line["failed"]:
            lines.append(f"{line['system']:32.32} {size:>7} {'-':>10}  {line['failed']}"[:120])
            continue
        cells = [line["system"]] if models else [line["system"], size]
        for counted in counts:
            cells += [_of(counted), "-" if counted is None else "{:.2f}-{:.2f}".format(*counted[2])]
        cells += [_of(line["success"][plan.name]) for plan in others]
        figures = (line.get("skill_1"), line.get("skill_5"), line.get("probes", {}).get("linear position"))
        untrained = (line.get("untrained") or {}).get("success", {})
        cells += [_of(untrained.get(main))] if models else [_number(value, 2) for value in figures]
        lines.append(layout.format(*cells))
    lines += _costs(options, table) if models else []
    return "\n".join(lines + (by_evaluation(options, everyone) if len(options.plan) > 1 + len(others) else []))


def _costs(options: StudyOptions, table: Sequence[Row]) -> list[str]:
    """Lines of other thresholds, rollouts and costs, of the first evaluation of each system."""
    main = options.plan[0]
    others = [at for at in main.thresholds if at != main.options.threshold][:2]
    layout = "{:28.28}" + " {:>13}" * len(others) + " {:>7} {:>7} {:>7} {:>8} {:>11} {:>10}"
    names = [f"within {at}" for at in others]
    head = (options.what, *names, "skill 1", "skill 5", "M param", "train s", "ms/decision", "MFLOP")
    lines = ["", layout.format(*head)]
    for line in table:
        spent = [line.get("train_seconds"), line.get("actor_seconds")]
        within, held = line["within"][main.name], line["held_within"][main.name]
        figures = (
            *(_number(line.get(name), 2) for name in ("skill_1", "skill_5")),
            _number(line.get("model_parameters"), 2, 1e-6),
            "-" if spent[0] is None else f"{sum(filter(None, spent)):.0f}",
            _number(line.get("seconds_per_replan"), 1, 1e3),
            _number(line.get("operations_per_decision"), 1, 1e-6),
        )
        reached = ("-" if within[at] is None else f"{within[at][0]}, {held[at][0]} held" for at in others)
        lines.append(layout.format(line["system"], *reached, *figures))
    return lines


def _number(value: float | None, digits: int, scale: float = 1.0) -> str:
    return "-" if value is None else f"{value * scale:.{digits}f}"


def _of(success: tuple[int, int, list[float]] | None) -> str:
    return "-" if success is None else f"{success[0]} of {success[1]}"


def summary(options: StudyOptions, results: dict[str, Any]) -> str:
    """Format which differences are real, a line for each evaluation."""
    lines = []
    for plan in options.plan:
        found = results[plan.name]
        pairs = found["pairs"]
        line = f"{plan.name}, within {plan.options.threshold}: "
        if not pairs:
            line += "nothing to compare"
        elif found["smallest_p"] >= LEVEL:
            line += (
                f"{pairs[0]['episodes']} episodes are too few for any of {len(pairs)} pairs to differ at {LEVEL:.0%}; "
                f"it takes {found['episodes_needed']} or more"
            )
        else:
            real = sum(pair["real"] for pair in pairs)
            line += f"{real} of {len(pairs)} pairs differ at {LEVEL:.0%} (sign-flip test by episode, Holm); "
            line += f"below the best: {', '.join(found['below']) or '-'}"
        lines.append(textwrap.fill(line, 120, subsequent_indent="  ", break_on_hyphens=False))
    return "\n".join(lines)


@matplotlib.rc_context(RC)
def draw_success(options: StudyOptions, lines: Sequence[Row]) -> bytes:
    """Draw success by threshold at the largest fraction: a line for each system or baseline, a panel for each evaluation."""
    names, count = [line["system"] for line in lines], len(options.plan)
    figure = Figure(figsize=(3.0 + 2.6 * count, 1.0 + 0.36 * len(names)), layout="constrained")
    panels = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    for axes, plan in zip(panels, options.plan, strict=True):
        for number, (at, colour) in enumerate(zip(plan.thresholds, COLOURS, strict=False)):
            shift = 0.2 * (number - (len(plan.thresholds) - 1) / 2)
            for height, line in enumerate(lines):
                if known := line["within"][plan.name][at]:
                    axes.plot(known[2], [height + shift] * 2, color=colour, linewidth=1.6, alpha=0.6)
                    label = f"within {at}" if height == 0 else None
                    axes.plot(rate(known), height + shift, "o", color=colour, markersize=4.5, label=label)
        axes.set(xlim=(-0.02, 1.02), xlabel="episodes that reached the goal", title=plan.name)
        axes.set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=max(1, len(options.thresholds))
    )
    return png_bytes(figure, dpi=150)


@matplotlib.rc_context(RC)
def draw_skill(table: Sequence[Row]) -> bytes:
    """Draw open-loop rollouts by model step: skill against copying the observed frame, and error as a share of the frames' variance."""
    kinds = {"skill": "skill: 1 - error / error of copying", "error": "error / variance of the frames"}
    figure, steps = Figure(figsize=(9.4, 3.3), layout="constrained"), range(1, ROLLOUT_STEPS + 1)
    panels = figure.subplots(1, 2)
    for axes, (kind, label) in zip(panels, kinds.items(), strict=True):
        for number, line in enumerate(table):
            if known := {k: value for k in steps if (value := line.get(f"{kind}_{k}")) is not None}:
                axes.plot(*zip(*known.items(), strict=True), **_style(number), label=line["system"])
        axes.set(xlabel="model steps ahead", ylabel=label, xticks=steps)
    panels[1].set_ylim(bottom=0)
    if panels[0].get_ylim()[0] < -1:
        panels[0].set_ylim(-1, 1)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    return png_bytes(figure, dpi=150)


@matplotlib.rc_context(RC)
def draw_fractions(options: StudyOptions, rows: Sequence[Row], table: Sequence[Row]) -> bytes:
    """Draw success against the share of the train episodes with intervals, a panel for each evaluation."""
    figure = Figure(figsize=(3.0 + 3.2 * len(options.plan), 3.4), layout="constrained")
    panels = figure.subplots(1, len(options.plan), squeeze=False)
    for axes, plan in zip(panels[0], options.plan, strict=True):
        for number, line in enumerate(table):
            points = {at: pooled(_select(rows, line["system"], at, plan.name)) for at in options.fractions}
            known = {at: success for at, success in points.items() if success is not None}
            rates = [rate(success) for success in known.values()]
            # Shifted, so that intervals at the same share do not hide each other.
            shares = [at * 1.012 ** (number - len(table) / 2) for at in known]
            if known:
                bars = np.abs(np.array([success[2] for success in known.values()]).T - rates)
                axes.errorbar(shares, rates, yerr=bars, elinewidth=0.8, **_style(number), label=line["system"])
        axes.set(xscale="log", ylim=(-0.02, 1.02), title=plan.name, xlabel="share of the train episodes")
        axes.set_xticks(options.fractions, [f"{at:.0%}" for at in options.fractions])
        axes.minorticks_off()
    panels[0, 0].set_ylabel("episodes that reached the goal")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right upper")
    return png_bytes(figure, dpi=150)


def _select(rows: Sequence[Row], system: str, fraction: float, protocol: str) -> list[Row]:
    wanted = (system, fraction, protocol)
    return [row for row in rows if (row["system"], row["fraction"], row["protocol"]) == wanted]


def _style(number: int) -> dict[str, Any]:
    colour = matplotlib.colormaps["tab10"](number % 10)
    return {
        "color": colour,
        "marker": MARKERS[(number + number // 10) % len(MARKERS)],
        "markersize": 4.5,
        "linewidth": 1.3,
    }


def rate(success: tuple[int, int, list[float]] | None) -> float:
    """The success rate of `pooled`; -1 if it is not known."""
    return success[0] / success[1] if success else -1.0
