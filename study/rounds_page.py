"""The page of rounds: success over collected frames."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from wmcache.common.device import CPU
from wmcache.common.figures import png_bytes
from wmcache.common.files import atomic_write
from wmcache.planner.report import COLOURS, RC, describe_making, write_page
from wmcache.study.rounds import RoundsOptions, Row


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
        command=command,
        settings=json.dumps(asdict(options), indent=2),
        made=describe_making(CPU),
    )


def lines_of(rows: Sequence[Row]) -> list[str]:
    """Format the rounds for a terminal."""
    found = [f"{'round':>5} {'episodes':>9} {'frames':>9} {'steps':>8}  {_heading(rows[0])}"]
    for row in rows:
        counts = f"{row['round']:>5} {row['collected_episodes']:>9} {row['total_frames']:>9} {row['steps']:>8}"
        found.append(f"{counts}  {'  '.join(_cells(row))}")
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
    """Draw success within each threshold, or the mean return, over all collected frames, with 95 % intervals."""
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes, frames = figure.subplots(), [row["total_frames"] for row in rows]
    if "return" in rows[0]:
        _draw_line(
            axes, frames, [row["return"]["mean"] for row in rows], [row["return"]["ci95"] for row in rows], 0, "run"
        )
        for name, found in rows[0]["baselines"].items():
            axes.axhline(found["mean"], color="#888", linestyle=":" if name == "zero" else "--", label=name)
        axes.set(ylabel="mean return")
    else:
        for k, judged in enumerate(rows[0]["by_threshold"]):
            mine = [row["by_threshold"][k] for row in rows]
            values, intervals = [found["success_rate"] for found in mine], [found["ci95"] for found in mine]
            _draw_line(axes, frames, values, intervals, k, f"within {judged['threshold']}")
            for name, found in rows[0]["baselines"].items():
                style: dict[str, Any] = {
                    "color": COLOURS[k % len(COLOURS)],
                    "linewidth": 0.9,
                    "linestyle": ":" if name == "zero" else "--",
                }
                axes.axhline(found[k]["success_rate"], label=f"{name}, within {judged['threshold']}", **style)
        axes.set(ylabel="episodes that reached the goal", ylim=(-0.02, 1.02))
    axes.set(xlabel="collected frames, all rounds", xticks=frames)
    figure.legend(loc="outside right upper", fontsize=7)
    return png_bytes(figure, dpi=150)


def _draw_line(
    axes: Any, frames: Sequence[int], values: Sequence[float], intervals: Sequence[Any], number: int, label: str
) -> None:
    # An interval of a single episode's return is not known.
    ends = [found or (value, value) for value, found in zip(values, intervals, strict=True)]
    bars = [[abs(value - end[k]) for value, end in zip(values, ends, strict=True)] for k in (0, 1)]
    style: dict[str, Any] = {
        "color": COLOURS[number % len(COLOURS)],
        "marker": "o",
        "markersize": 4.5,
        "linewidth": 1.4,
    }
    # Shifted, so that intervals do not hide each other.
    shifted = [at + 0.006 * number * frames[-1] for at in frames]
    axes.errorbar(shifted, values, yerr=bars, elinewidth=0.9, capsize=2, label=label, **style)
