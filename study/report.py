"""What a study leaves for people: study.parquet, a table for the terminal, and one self-contained page."""

from __future__ import annotations

import base64
import io
import json
import platform
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.figure import Figure

from wmcache.common.cpus import available_cpus
from wmcache.common.files import atomic_write
from wmcache.planner.baselines import BASELINES
from wmcache.planner.judge import THRESHOLDS
from wmcache.planner.report import COLOURS, RC
from wmcache.study.cells import Branch, Workshop
from wmcache.study.options import StudyOptions
from wmcache.study.run import pooled
from wmcache.study.statistics import LEVEL, Reached, compare, episodes_needed, rank, separated, smallest_p
from wmcache.trainer.train import ROLLOUT_STEPS

Row = dict[str, Any]
LIBRARIES = ("wmcache", "torch", "numpy", "timm", "transformers", "mujoco", "scikit-learn")
STATE = {"x": "place", "y": "place", "vx": "velocity", "vy": "velocity"}
"""Columns of a maze's state that are shown as one."""
MARKERS = "osD^vP*X<>"
WIDEST = 32


def write_report(
    out: Path, options: StudyOptions, rows: list[Row], work: Workshop, branches: Sequence[Branch], command: str
) -> dict[str, Any]:
    """Write study.parquet and study.html.

    Args:
        out: the study's folder. options: its settings. rows: of `tabulate`.
        work, branches: of `run_study`, for the episodes and the probes' pictures. command: what the user typed, for the page.

    Returns:
        For each evaluation at its threshold and the largest fraction: `pairs`, the tests; `ranking`, the groups; `best`, the encoder
        that differs from every other; `below`, those that differ from the one of the highest success; `smallest_p`, that any data could
        give; and `episodes_needed` for a difference to show.
    """
    with atomic_write(out / "study.parquet") as file:
        pq.write_table(pa.Table.from_pylist(rows), file)
    results: dict[str, dict[str, Any]] = {}
    for plan in options.plan:
        reached = _reached(options, plan.name, plan.options.threshold, work, branches)
        pairs = compare(reached)
        best, below = separated(reached, pairs)
        results[plan.name] = {
            "pairs": [asdict(pair) for pair in pairs],
            "ranking": rank(reached, pairs),
            "best": best,
            "below": below,
            "smallest_p": smallest_p(pairs),
            "episodes_needed": episodes_needed(pairs),
        }
    table = summarise(options, rows)
    lines = with_baselines(options, rows, table)
    pictures = {"success": draw_success(options, rows, lines), "skill": draw_skill(options, rows, table)}
    if len(options.fractions) > 1:
        pictures["fractions"] = draw_fractions(options, rows, table)
    drawn = {branch.choice.label: work.place(branch.probe) for branch in reversed(branches)}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["figure"] = lambda value, digits=2: (
        "-" if value is None else f"{round(value, digits) + 0.0:,.{digits}f}"
    )
    page = environment.from_string(files("wmcache.study").joinpath("study.html.jinja").read_text())
    html = page.render(
        options=options,
        settings=json.dumps(asdict(options), indent=2),
        rows=rows,
        table=table,
        lines=lines,
        began={plan.name: _began(rows, plan.name) for plan in options.plan},
        evaluations={
            name: {
                **found,
                "matrix": _matrix(found["pairs"]),
                "names": [line["encoder"] for line in table if line["success"][name]],
            }
            for name, found in results.items()
        },
        columns=list(dict.fromkeys(column for line in table for column in line["probes"])),
        pictures={name: base64.b64encode(picture).decode() for name, picture in pictures.items()},
        drawn={
            line["encoder"]: base64.b64encode(drawn[line["encoder"]].read_bytes()).decode()
            for line in table
            if drawn[line["encoder"]].exists()
        },
        thresholds=THRESHOLDS,
        level=LEVEL,
        command=command,
        versions={name: version(name) for name in LIBRARIES},
        machine=f"{platform.platform()}, {available_cpus()} CPUs, Python {platform.python_version()}",
    )
    with atomic_write(out / "study.html") as file:
        file.write(html.encode())
    return results


def _reached(
    options: StudyOptions, protocol: str, threshold: float, work: Workshop, branches: Sequence[Branch]
) -> Reached:
    found: dict[str, dict[int, Any]] = {branch.choice.label: {} for branch in branches}
    for branch in branches:
        known = work.read(branch.plan[options.fractions[-1], protocol])
        if known is not None:
            found[branch.choice.label][branch.seed] = np.array(known["result"]["reached"][str(threshold)], bool)
    return {label: seeds for label, seeds in found.items() if seeds}


def _matrix(pairs: list[Row]) -> dict[tuple[str, str], Row]:
    """Row and column -> their pair, from the row's side."""
    turned = [
        {**pair, "first_ahead": pair["second_ahead"], "second_ahead": pair["first_ahead"], "first": pair["second"]}
        | {"second": pair["first"]}
        for pair in pairs
    ]
    return {(pair["first"], pair["second"]): pair for pair in (*pairs, *turned)}


def summarise(options: StudyOptions, rows: Sequence[Row]) -> list[Row]:
    """A line for each encoder at the largest fraction, by success in the first evaluation, the best first; seeds are summed.

    Returns:
        `encoder`, `failed`, `success` and `held` (evaluation -> successes, episodes and interval, or None), and means over the seeds
        of all else.
    """
    table = []
    for choice in options.encoders:
        mine = [row for row in rows if row["encoder"] == choice.label and row["fraction"] == options.fractions[-1]]
        first = [row for row in mine if row["protocol"] == options.plan[0].name]
        known = {
            name: float(np.mean(values)) if (values := _numbers(first, name)) else None
            for name in first[0]
            if _numbers(first, name) or first[0][name] is None
        }
        table.append(
            {
                **known,
                "encoder": choice.label,
                "name": choice.name,
                "source": first[0]["source"],
                "failed": next((row["failed"] for row in mine if row["failed"]), None),
                "success": {
                    plan.name: pooled([r for r in mine if r["protocol"] == plan.name]) for plan in options.plan
                },
                "held": {
                    plan.name: pooled([r for r in mine if r["protocol"] == plan.name], what="held")
                    for plan in options.plan
                },
                "derived": bool(first[0]["derived"]),
                "probes": _probes(known),
            }
        )
    main = options.plan[0].name
    return sorted(table, key=lambda line: -_rate(line["success"][main]))


def with_baselines(options: StudyOptions, rows: Sequence[Row], table: Sequence[Row]) -> list[Row]:
    """The lines of `summarise`, and among them by success those of the baselines, the same for all encoders.

    Returns:
        For a baseline `encoder`, `actions` (in BASELINES; None for an encoder), `success` and `held`; for an encoder its line, and
        `below_random`: the evaluations in which it reached no more than random actions.
    """
    lines: list[Row] = []
    for actions in BASELINES:
        line: Row = {"encoder": f"{actions} actions", "actions": actions, "failed": None, "below_random": []}
        for key, what in {"success": "successes", "held": "held"}.items():
            line[key] = {
                plan.name: pooled(_of_baseline(rows, actions, plan.name), what=f"{actions}_{what}")
                for plan in options.plan
            }
        if any(line["success"].values()):
            lines.append(line)
    random: Row = next((line["success"] for line in lines if line["actions"] == "random"), {})
    for line in table:
        below = [
            name
            for name, success in line["success"].items()
            if success is not None and _rate(random.get(name)) >= _rate(success)
        ]
        lines.append({**line, "actions": None, "below_random": below})
    main = options.plan[0].name
    # Of equal ones the baseline first: who reaches no more is seen below it.
    return sorted(lines, key=lambda line: (-_rate(line["success"][main]), line["actions"] is None))


def _of_baseline(rows: Sequence[Row], actions: str, protocol: str) -> list[Row]:
    """A row that has this baseline: all rows of an evaluation have the same episodes, and so the same baselines."""
    return [row for row in rows if row["protocol"] == protocol and row[f"{actions}_successes"] is not None][:1]


def _began(rows: Sequence[Row], protocol: str) -> dict[float, int]:
    """Threshold -> how many episodes of an evaluation began within it; empty where that is not known."""
    known = [row for row in rows if row["protocol"] == protocol and row[f"began_{THRESHOLDS[0]}"] is not None]
    return {at: known[0][f"began_{at}"] for at in THRESHOLDS} if known else {}


def _probes(known: Row) -> dict[str, float]:
    """`linear place` and the like -> mean R^2 over the columns of the state that it stands for."""
    found: dict[str, list[float]] = {}
    for name, value in known.items():
        kind, _, column = name.removeprefix("probe_").partition("_")
        if name.startswith(("probe_linear_", "probe_mlp_")) and value is not None:
            found.setdefault(f"{kind} {STATE.get(column, column)}", []).append(value)
    return {name: float(np.mean(values)) for name, values in found.items()}


def _numbers(rows: Sequence[Row], name: str) -> list[float]:
    return [row[name] for row in rows if isinstance(row[name], int | float)]


def _rate(success: tuple[int, int, list[float]] | None) -> float:
    return success[0] / success[1] if success else -1.0


def headline(options: StudyOptions, rows: Sequence[Row]) -> str:
    """The table for a terminal of 120 columns: goals reached and held, by the encoders and the baselines, open-loop skill and a probe."""
    main, others = options.plan[0].name, options.plan[1:2]  # there is no room for more
    lines = [f"{'encoder':{WIDEST}} {'tokens':>7} {main[:10]:>10} {'95 %':>9} {'held':>10} {'95 %':>9}"]
    lines[0] += "".join(f" {plan.name[:14]:>14}" for plan in others) + f" {'skill 1':>7} {'skill 5':>7} {'xy R2':>6}"
    for line in with_baselines(options, rows, summarise(options, rows)):
        size = "-" if line.get("tokens") is None else f"{line['tokens']:.0f}x{line['token_dim']:.0f}"
        text = f"{line['encoder'][:WIDEST]:{WIDEST}} {size:>7}"
        if line["success"][main] is None:
            lines.append(f"{text} {'-':>10}  {line['failed']}"[:120])
            continue
        for counted in (line["success"][main], line["held"][main]):
            between = "-" if counted is None else "{:.2f}-{:.2f}".format(*counted[2])
            text += f" {_of(counted):>10} {between:>9}"
        text += "".join(f" {_of(line['success'][plan.name]):>14}" for plan in others)
        figures = (line.get("skill_1"), line.get("skill_5"), line.get("probes", {}).get("linear place"))
        lines.append(
            text + "".join(f" {'-' if v is None else f'{v:.2f}':>{w}}" for v, w in zip(figures, (7, 7, 6), strict=True))
        )
    return "\n".join(lines)


def _of(success: tuple[int, int, list[float]] | None) -> str:
    return "-" if success is None else f"{success[0]} of {success[1]}"


def summary(options: StudyOptions, results: dict[str, Any]) -> str:
    """Which differences are real, a line for each evaluation."""
    lines = []
    for plan in options.plan:
        found = results[plan.name]
        pairs = found["pairs"]
        real = sum(pair["real"] for pair in pairs)
        line = f"{plan.name}, within {plan.options.threshold}: "
        if not pairs:
            line += "nothing to compare"
        elif found["smallest_p"] >= LEVEL:
            line += (
                f"{pairs[0]['episodes']} episodes are too few for any of {len(pairs)} pairs to differ at {LEVEL:.0%}; "
                f"it takes {found['episodes_needed']} or more"
            )
        else:
            line += f"{real} of {len(pairs)} pairs differ at {LEVEL:.0%} (sign-flip test by episode, Holm); "
            line += f"below the best: {', '.join(found['below']) or '-'}"
        lines.append(textwrap.fill(line, 120, subsequent_indent="  ", break_on_hyphens=False))
    return "\n".join(lines)


def draw_success(options: StudyOptions, rows: Sequence[Row], table: Sequence[Row]) -> bytes:
    """Success by threshold with intervals, an encoder or a baseline a line, an evaluation a panel; the largest fraction."""
    names = [line["encoder"] for line in table]
    with plt.rc_context(RC):
        size = (3.0 + 2.6 * len(options.plan), 1.0 + 0.36 * len(names))
        figure, panels = plt.subplots(
            1, len(options.plan), figsize=size, layout="constrained", sharey=True, squeeze=False
        )
        for axes, plan in zip(panels[0], options.plan, strict=True):
            for shift, at, colour in zip((-0.2, 0.0, 0.2), THRESHOLDS, COLOURS, strict=False):
                for place, line in enumerate(table):
                    if (actions := line["actions"]) is None:
                        known = pooled(_select(rows, line["encoder"], options.fractions[-1], plan.name), at)
                    else:
                        known = pooled(_of_baseline(rows, actions, plan.name), at, f"{actions}_successes")
                    if known is not None:
                        axes.plot(known[2], [place + shift] * 2, color=colour, linewidth=1.6, alpha=0.6)
                        label = f"within {at}" if place == 0 else None
                        axes.plot(_rate(known), place + shift, "o", color=colour, markersize=4.5, label=label)
            axes.set(xlim=(-0.02, 1.02), xlabel="episodes that reached the goal", title=plan.name)
            axes.set_yticks(range(len(names)), names)
        panels[0, 0].invert_yaxis()
        handles = panels[0, 0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper right", ncols=len(THRESHOLDS))
        return _png(figure)


def draw_skill(options: StudyOptions, rows: Sequence[Row], table: Sequence[Row]) -> bytes:
    """Open-loop rollouts by model step: skill against copying the observed frame, and error as a share of the variance of the frames."""
    kinds = {"skill": "skill: 1 - error / error of copying", "error": "error / variance of the frames"}
    with plt.rc_context(RC):
        figure, panels = plt.subplots(1, 2, figsize=(9.4, 3.3), layout="constrained")
        for axes, (kind, label) in zip(panels, kinds.items(), strict=True):
            for number, line in enumerate(table):
                mine = _select(rows, line["encoder"], options.fractions[-1], options.plan[0].name)
                steps = range(1, ROLLOUT_STEPS + 1)
                known = [(k, np.mean(values)) for k in steps if (values := _numbers(mine, f"{kind}_{k}"))]
                if known:
                    axes.plot(*zip(*known, strict=True), **_style(number), label=line["encoder"])
            axes.set(xlabel="model steps ahead", ylabel=label, xticks=steps)
        panels[1].set_ylim(bottom=0)
        if panels[0].get_ylim()[0] < -1:
            panels[0].set_ylim(-1, 1)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
        return _png(figure)


def draw_fractions(options: StudyOptions, rows: Sequence[Row], table: Sequence[Row]) -> bytes:
    """Success against the share of the train episodes, an evaluation a panel, with intervals."""
    with plt.rc_context(RC):
        size = (3.0 + 3.2 * len(options.plan), 3.4)
        figure, panels = plt.subplots(1, len(options.plan), figsize=size, layout="constrained", squeeze=False)
        for axes, plan in zip(panels[0], options.plan, strict=True):
            for number, line in enumerate(table):
                points = {at: pooled(_select(rows, line["encoder"], at, plan.name)) for at in options.fractions}
                known = {at: success for at, success in points.items() if success is not None}
                rates = [_rate(success) for success in known.values()]
                # A little apart, or intervals at the same share would hide each other.
                shares = [at * 1.012 ** (number - len(table) / 2) for at in known]
                bars = [[abs(r - s[2][side]) for r, s in zip(rates, known.values(), strict=True)] for side in (0, 1)]
                if known:
                    axes.errorbar(shares, rates, yerr=bars, elinewidth=0.8, **_style(number), label=line["encoder"])
            axes.set(xscale="log", ylim=(-0.02, 1.02), title=plan.name, xlabel="share of the train episodes")
            axes.set_xticks(options.fractions, [f"{at:.0%}" for at in options.fractions])
            axes.minorticks_off()
        panels[0, 0].set_ylabel("episodes that reached the goal")
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right upper")
        return _png(figure)


def _select(rows: Sequence[Row], encoder: str, fraction: float, protocol: str) -> list[Row]:
    wanted = (encoder, fraction, protocol)
    return [row for row in rows if (row["encoder"], row["fraction"], row["protocol"]) == wanted]


def _style(number: int) -> dict[str, Any]:
    colour = plt.get_cmap("tab10")(number % 10)
    return {"color": colour, "marker": MARKERS[number % len(MARKERS)], "markersize": 4.5, "linewidth": 1.3}


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    plt.close(figure)
    return buffer.getvalue()
