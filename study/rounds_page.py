"""The page of rounds: success over collected frames."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from wmcache.common.device import CPU
from wmcache.common.files import atomic_write
from wmcache.planner.report import describe_making, write_page
from wmcache.study import curve
from wmcache.study.parts import Row
from wmcache.study.rounds_options import RoundsOptions


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
    found = [f"{'round':>5} {'episodes':>9} {'frames':>9} {'steps':>8}  {curve.heading(rows[0])}"]
    for row in rows:
        counts = f"{row['round']:>5} {row['collected_episodes']:>9} {row['total_frames']:>9} {row['steps']:>8}"
        found.append(f"{counts}  {'  '.join(curve.cells(row))}")
    if any(row["variants"] or "dream" in row for row in rows):
        dreams = f"{'return in the dream':>20}  {'95 % interval':>20}"
        found.append(f"{'round':>5} {'controller':>18}  {dreams}  {curve.heading(rows[0])}")
        for number, name, figures in controllers_of(rows):
            dreamed = curve.cells({"return": figures["dream"]}) if "dream" in figures else ["", ""]
            found.append(
                f"{number:>5} {name:>18}  {dreamed[0]:>20}  {dreamed[1]:>20}  {'  '.join(curve.cells(figures))}"
            )
    return found


def draw_rounds(rows: Sequence[Row]) -> bytes:
    """Draw success within each threshold, or the mean return, over all collected frames."""
    frames = [row["total_frames"] for row in rows]
    lines = list(curve.lines_of(rows, frames, "model"))
    return curve.draw(lines, "collected frames, all rounds", frames, by_return="return" in rows[0])
