"""The curve of rounds and of online training: success or return over collected data; and its figures in tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from wmcache.common.figures import png_bytes
from wmcache.planner.report import COLOURS, RC
from wmcache.study.parts import Row

BASELINE_STYLES: dict[str, Any] = {"random": "--", "zero": ":"}


@dataclass(frozen=True)
class Line:
    """A line of the picture: its values and 95 % intervals (None: not known) by what is collected, and the baselines' values."""

    label: str
    at: Sequence[int]
    values: Sequence[float]
    intervals: Sequence[Sequence[float] | None]
    baselines: Mapping[str, float] = field(default_factory=dict)


def lines_of(rows: Sequence[Row], at: Sequence[int], label: str) -> Iterator[Line]:
    """Return the line of returns, which has the label, or a line for each threshold; of rows that were evaluated."""
    baselines = rows[0]["baselines"].items()
    if "return" in rows[0]:
        found = [row["return"] for row in rows]
        means = {name: known["mean"] for name, known in baselines}
        yield Line(label, at, [one["mean"] for one in found], [one["ci95"] for one in found], means)
        return
    for k, judged in enumerate(rows[0]["by_threshold"]):
        found = [row["by_threshold"][k] for row in rows]
        rates = {name: known[k]["success_rate"] for name, known in baselines}
        values, intervals = [one["success_rate"] for one in found], [one["ci95"] for one in found]
        yield Line(f"within {judged['threshold']}", at, values, intervals, rates)


@matplotlib.rc_context(RC)
def draw(lines: Sequence[Line], xlabel: str, ticks: Sequence[int] | None, *, by_return: bool) -> bytes:
    """Draw lines with 95 % intervals; dashed: baselines."""
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes, largest = figure.subplots(), max(line.at[-1] for line in lines)
    for number, line in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        # An interval of a single episode's return is not known.
        ends = [found or (value, value) for value, found in zip(line.values, line.intervals, strict=True)]
        bars = [[abs(value - end[k]) for value, end in zip(line.values, ends, strict=True)] for k in (0, 1)]
        # Shifted, so that intervals do not hide each other.
        shifted = [at + 0.006 * number * largest for at in line.at]
        axes.errorbar(
            shifted, line.values, yerr=bars, color=colour, marker="o", markersize=4.5, capsize=2, label=line.label
        )
        for name, value in line.baselines.items():
            axes.axhline(value, color=colour, linewidth=0.9, linestyle=BASELINE_STYLES.get(name, "-."))
    handles, _ = axes.get_legend_handles_labels()
    for name in dict.fromkeys(name for line in lines for name in line.baselines):
        style = BASELINE_STYLES.get(name, "-.")
        handles.append(Line2D([], [], color="#666", linewidth=0.9, linestyle=style, label=f"{name} actions"))
    axes.set(ylabel="mean return" if by_return else "episodes that reached the goal", xlabel=xlabel)
    axes.set(ylim=None if by_return else (-0.02, 1.02))
    if ticks is not None:
        axes.set(xticks=ticks)
    figure.legend(handles=handles, loc="outside right upper")
    return png_bytes(figure, dpi=150)


def heading(row: Row) -> str:
    """Return the head of the columns that `cells` fills."""
    if "return" in row:
        return f"{'mean return':>12}  {'95 % interval':>20}"
    return "  ".join(f"{'within ' + str(judged['threshold']):>27}" for judged in row["by_threshold"])


def cells(row: Row) -> list[str]:
    """Format the return of a row with its interval, or successes with theirs."""
    if "return" in row:
        found = row["return"]
        interval = "-" if found["ci95"] is None else "{:.2f} to {:.2f}".format(*found["ci95"])
        return [f"{found['mean']:>12.2f}", f"{interval:>20}"]
    return [
        "{:>11} {:>15}".format(f"{judged['successes']} of {row['episodes']}", "{:.3f} - {:.3f}".format(*judged["ci95"]))
        for judged in row["by_threshold"]
    ]
