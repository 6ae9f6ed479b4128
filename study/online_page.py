"""The page of online training: return or success over env steps, and what the policy does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from wmcache.common.device import CPU
from wmcache.common.files import atomic_write
from wmcache.planner.report import describe_making, write_page
from wmcache.study import curve
from wmcache.study.online_options import OnlineOptions
from wmcache.study.parts import Row


def write_online(out: Path, options: OnlineOptions, rows: Sequence[Row], command: str) -> None:
    """Write online.html, and its picture curve.png."""
    evaluated = _evaluated(rows)
    picture = draw_online(rows)
    with atomic_write(out / "curve.png") as file:
        file.write(picture)
    last = out / "plans" / f"part-{evaluated[-1]['part']}"
    write_page(
        out / "online.html",
        "wmcache.study",
        "online.html.jinja",
        options=options,
        rows=rows,
        last=evaluated[-1],
        baselines=evaluated[0]["baselines"],
        by_return="return" in evaluated[0],
        picture=picture,
        videos=[file.read_bytes() for file in sorted(last.glob("videos/*.mp4"))],
        command=command,
        settings=json.dumps(asdict(options), indent=2),
        made=describe_making(CPU),
    )


def draw_online(rows: Sequence[Row]) -> bytes:
    """Draw success within each threshold, or the mean return, over env steps."""
    evaluated = _evaluated(rows)
    by_return = "return" in evaluated[0]
    lines = list(curve.lines_of(evaluated, [row["env_steps"] for row in evaluated], "evaluation"))
    if by_return:
        found, at = [row["collected"] for row in rows], [row["env_steps"] for row in rows]
        lines.append(curve.Line("collected", at, [one["mean"] for one in found], [one["ci95"] for one in found]))
    return curve.draw(lines, "env steps", None, by_return=by_return)


def summary(rows: Sequence[Row]) -> list[str]:
    """Format the parts for a terminal, and the baselines."""
    evaluated = _evaluated(rows)
    found = [f"{'part':>9} {'env steps':>9} {'updates':>8} {'collected':>10}  {curve.heading(evaluated[0])}"]
    for row in rows:
        own = "-" if row["collected"] is None else f"{row['collected']['mean']:.2f}"
        figures = "  ".join(curve.cells(row)) if row in evaluated else "-"
        found.append(f"{row['part']:>9} {row['env_steps']:>9} {row['updates']:>8} {own:>10}  {figures}")
    for name, known in evaluated[0]["baselines"].items():
        key = "return" if "return" in evaluated[0] else "by_threshold"
        figures = "  ".join(curve.cells({**evaluated[0], key: known}))
        found.append(f"{name:>9} {'':>9} {'':>8} {'':>10}  {figures}")
    return found


def _evaluated(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if "baselines" in row]
