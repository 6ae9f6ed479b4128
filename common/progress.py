"""Progress bars."""

from __future__ import annotations

import sys


def seconds_between_updates() -> float:
    """Return how often a progress bar is drawn: ten times a second on a terminal, every 10 seconds in a log file."""
    return 0.1 if sys.stderr.isatty() else 10.0
