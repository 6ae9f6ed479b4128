"""The table of a study with a row for each evaluation: how far systems transfer to other tasks and worlds."""

from __future__ import annotations

from collections.abc import Sequence

from wmcache.study.options import StudyOptions
from wmcache.study.statistics import Row

SHOWN = 6
"""Columns for which a terminal of 120 characters has room."""


def by_evaluation(options: StudyOptions, lines: Sequence[Row]) -> list[str]:
    """Format goals reached and held in each evaluation.

    Args:
        lines: systems and baselines, the best first, see `report.with_baselines`.
    """
    shown = lines[:SHOWN]
    layout = "{:15.15}" + " {:>16.16}" * len(shown)
    found = ["", layout.format("reached, held", *(line["system"] for line in shown))]
    for plan in options.plan:
        counts = ((line["success"][plan.name], line["held"][plan.name]) for line in shown)
        cells = ("-" if reached is None else f"{reached[0]}, {held[0]} of {reached[1]}" for reached, held in counts)
        found.append(layout.format(plan.name, *cells))
    if more := len(lines) - len(shown):
        found.append(f"{more} more in study.html")
    return found
