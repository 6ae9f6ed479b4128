"""The page of rounds: success over collected frames."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from wmcache.common.device import CPU
from wmcache.common.figures import png_bytes
from wmcache.common.files import atomic_write
from wmcache.planner.report import COLOURS, RC, describe_making, write_page
from wmcache.study.rounds import Row
from wmcache.study.rounds_options import RoundsOptions

BASELINE_STYLES: dict[str, Any] = {"random": "--", "zero": ":"}


def write_rounds(out: Path, options: RoundsOptions, rows: Sequence[Row], command: str) -> None:
    """Write rounds.html, and its picture success.png."""
    picture = draw_rounds(rows)
    with atomic_write(out / "success.png") as file:
        file.write(picture)
    write_page(
        out / "rounds.html",
        "wmcache.study",
        "rounds.html.jinja",
        options=options,
        rows=rows,
        by_return="return" in rows[0],
        picture=picture,
        controllers=controllers_of(rows) if options.controller else [],
        pictures=_pictures(out, options),
        command=command,
        settings=json.dumps(asdict(options), indent=2),
        made=describe_making(CPU),
    )


def controllers_of(rows: Sequence[Row]) -> list[tuple[int, str, Row]]:
    """List round, name and figures of each controller."""
    return [
        (row["round"], name, found) for row in rows for name, found in [("controller", row), *row["variants"].items()]
    ]


def _pictures(out: Path, options: RoundsOptions) -> list[tuple[str, bytes]]:
    """Read the training curve of each controller of the last round, and the pictures of its dreams, with captions."""
    if not options.controller:
        return []
    found = []
    for suffix in options.actors:
        name = suffix.removeprefix("-") or "controller"
        last = f"round-{options.rounds}{suffix}"
        curve, dream = out / "controllers" / last / "controller.png", out / "dreams" / last / "dream.png"
        found += [
            (f"{name}: {what}", file.read_bytes())
            for what, file in (("training", curve), ("dreams", dream))
            if file.exists()
        ]
    return found


def lines_of(rows: Sequence[Row]) -> list[str]:
    """Format the rounds for a terminal."""
    found = [f"{'round':>5} {'episodes':>9} {'frames':>9} {'steps':>8}  {_heading(rows[0])}"]
    for row in rows:
        counts = f"{row['round']:>5} {row['collected_episodes']:>9} {row['total_frames']:>9} {row['steps']:>8}"
        found.append(f"{counts}  {'  '.join(_cells(row))}")
    if any(row["variants"] or "dream" in row for row in rows):
        dreams = f"{'return in the dream':>20}  {'95 % interval':>20}"
        found.append(f"{'round':>5} {'controller':>18}  {dreams}  {_heading(rows[0])}")
        for number, name, figures in controllers_of(rows):
            dreamed = _cells({"return": figures["dream"]}) if "dream" in figures else ["", ""]
            found.append(f"{number:>5} {name:>18}  {dreamed[0]:>20}  {dreamed[1]:>20}  {'  '.join(_cells(figures))}")
    return found


def _heading(row: Row) -> str:
    if "return" in row:
        return f"{'mean return':>12}  {'95 % interval':>20}"
    return "  ".join(f"{'within ' + str(judged['threshold']):>27}" for judged in row["by_threshold"])


def _cells(row: Row) -> list[str]:
    if "return" in row:
        found = row["return"]
        interval = "-" if found["ci95"] is None else "{:.2f} to {:.2f}".format(*found["ci95"])
        return [f"{found['mean']:>12.2f}", f"{interval:>20}"]
    return [
        "{:>11} {:>15}".format(f"{judged['successes']} of {row['episodes']}", "{:.3f} - {:.3f}".format(*judged["ci95"]))
        for judged in row["by_threshold"]
    ]


@matplotlib.rc_context(RC)
def draw_rounds(rows: Sequence[Row]) -> bytes:
    """Draw success within each threshold, or the mean return, over all collected frames, with 95 % intervals; dashed: baselines."""
    figure, frames = Figure(figsize=(6.4, 3.4), layout="constrained"), [row["total_frames"] for row in rows]
    axes = figure.subplots()
    for number, line in enumerate(_lines(rows)):
        colour = COLOURS[number % len(COLOURS)]
        # An interval of a single episode's return is not known.
        ends = [found or (value, value) for value, found in zip(line.values, line.intervals, strict=True)]
        bars = [[abs(value - end[k]) for value, end in zip(line.values, ends, strict=True)] for k in (0, 1)]
        # Shifted, so that intervals do not hide each other.
        shifted = [at + 0.006 * number * frames[-1] for at in frames]
        axes.errorbar(
            shifted, line.values, yerr=bars, color=colour, marker="o", markersize=4.5, capsize=2, label=line.label
        )
        for name, value in line.baselines.items():
            axes.axhline(value, color=colour, linewidth=0.9, linestyle=BASELINE_STYLES.get(name, "-."))
    handles, _ = axes.get_legend_handles_labels()
    for name in rows[0]["baselines"]:
        style = BASELINE_STYLES.get(name, "-.")
        handles.append(Line2D([], [], color="#666", linewidth=0.9, linestyle=style, label=f"{name} actions"))
    by_return = "return" in rows[0]
    axes.set(ylabel="mean return" if by_return else "episodes that reached the goal", xticks=frames)
    axes.set(xlabel="collected frames, all rounds", ylim=None if by_return else (-0.02, 1.02))
    figure.legend(handles=handles, loc="outside right upper")
    return png_bytes(figure, dpi=150)


@dataclass(frozen=True)
class _Line:
    """A line of the picture: its values and 95 % intervals by round, and the baselines' values."""

    label: str
    values: list[float]
    intervals: list[Any]
    baselines: dict[str, float]


def _lines(rows: Sequence[Row]) -> Iterator[_Line]:
    baselines = rows[0]["baselines"].items()
    if "return" in rows[0]:
        found = [row["return"] for row in rows]
        means = {name: known["mean"] for name, known in baselines}
        yield _Line("model", [one["mean"] for one in found], [one["ci95"] for one in found], means)
        return
    for k, judged in enumerate(rows[0]["by_threshold"]):
        found = [row["by_threshold"][k] for row in rows]
        rates = {name: known[k]["success_rate"] for name, known in baselines}
        values, intervals = [one["success_rate"] for one in found], [one["ci95"] for one in found]
        yield _Line(f"within {judged['threshold']}", values, intervals, rates)
