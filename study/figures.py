"""The figures of a study's page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from wmcache.common.figures import png_bytes
from wmcache.planner.episodes import THRESHOLDS
from wmcache.planner.report import COLOURS, RC
from wmcache.study.options import StudyOptions
from wmcache.study.table import Row, pooled
from wmcache.trainer.train import ROLLOUT_STEPS

MARKERS = "osD^vP*X<>"


@matplotlib.rc_context(RC)
def draw_success(options: StudyOptions, rows: Sequence[Row], table: Sequence[Row]) -> bytes:
    """Draw success by threshold at the largest fraction: a line for each encoder or baseline, a panel for each evaluation."""
    names, count = [line["encoder"] for line in table], len(options.plan)
    figure = Figure(figsize=(3.0 + 2.6 * count, 1.0 + 0.36 * len(names)), layout="constrained")
    panels = figure.subplots(1, count, sharey=True, squeeze=False)
    for axes, plan in zip(panels[0], options.plan, strict=True):
        for shift, at, colour in zip((-0.2, 0.0, 0.2), THRESHOLDS, COLOURS, strict=False):
            for height, line in enumerate(table):
                if (actions := line["actions"]) is None:
                    known = pooled(_select(rows, line["encoder"], options.fractions[-1], plan.name), at)
                else:
                    known = pooled(baseline_rows(rows, actions, plan.name), at, f"{actions}_successes")
                if known is not None:
                    axes.plot(known[2], [height + shift] * 2, color=colour, linewidth=1.6, alpha=0.6)
                    label = f"within {at}" if height == 0 else None
                    axes.plot(rate(known), height + shift, "o", color=colour, markersize=4.5, label=label)
        axes.set(xlim=(-0.02, 1.02), xlabel="episodes that reached the goal", title=plan.name)
        axes.set_yticks(range(len(names)), names)
    panels[0, 0].invert_yaxis()
    handles = panels[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper right", ncols=len(THRESHOLDS))
    return png_bytes(figure, dpi=150)


@matplotlib.rc_context(RC)
def draw_skill(options: StudyOptions, rows: Sequence[Row], table: Sequence[Row]) -> bytes:
    """Draw open-loop rollouts by model step: skill against copying the observed frame, and error as a share of the frames' variance."""
    kinds = {"skill": "skill: 1 - error / error of copying", "error": "error / variance of the frames"}
    figure = Figure(figsize=(9.4, 3.3), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, (kind, label) in zip(panels, kinds.items(), strict=True):
        for number, line in enumerate(table):
            mine = _select(rows, line["encoder"], options.fractions[-1], options.plan[0].name)
            steps = range(1, ROLLOUT_STEPS + 1)
            known = [(k, np.mean(values)) for k in steps if (values := numbers(mine, f"{kind}_{k}"))]
            if known:
                axes.plot(*zip(*known, strict=True), **_style(number), label=line["encoder"])
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
            points = {at: pooled(_select(rows, line["encoder"], at, plan.name)) for at in options.fractions}
            known = {at: success for at, success in points.items() if success is not None}
            rates = [rate(success) for success in known.values()]
            # Shifted, so that intervals at the same share do not hide each other.
            shares = [at * 1.012 ** (number - len(table) / 2) for at in known]
            if known:
                bars = np.abs(np.array([success[2] for success in known.values()]).T - rates)
                axes.errorbar(shares, rates, yerr=bars, elinewidth=0.8, **_style(number), label=line["encoder"])
        axes.set(xscale="log", ylim=(-0.02, 1.02), title=plan.name, xlabel="share of the train episodes")
        axes.set_xticks(options.fractions, [f"{at:.0%}" for at in options.fractions])
        axes.minorticks_off()
    panels[0, 0].set_ylabel("episodes that reached the goal")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right upper")
    return png_bytes(figure, dpi=150)


def _select(rows: Sequence[Row], encoder: str, fraction: float, protocol: str) -> list[Row]:
    wanted = (encoder, fraction, protocol)
    return [row for row in rows if (row["encoder"], row["fraction"], row["protocol"]) == wanted]


def _style(number: int) -> dict[str, Any]:
    colour = matplotlib.colormaps["tab10"](number % 10)
    return {"color": colour, "marker": MARKERS[number % len(MARKERS)], "markersize": 4.5, "linewidth": 1.3}


def baseline_rows(rows: Sequence[Row], actions: str, protocol: str) -> list[Row]:
    """A row with this baseline, if there is one: all rows of an evaluation have the same episodes, and so the same baselines."""
    return [row for row in rows if row["protocol"] == protocol and row[f"{actions}_successes"] is not None][:1]


def numbers(rows: Sequence[Row], name: str) -> list[float]:
    """The values of a column that are numbers."""
    return [row[name] for row in rows if isinstance(row[name], int | float)]


def rate(success: tuple[int, int, list[float]] | None) -> float:
    """The success rate of `pooled`; -1 if it is not known."""
    return success[0] / success[1] if success else -1.0
