"""A clock for benchmarks. Tests here import `model_tools` from the tests of the trainer."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from wmcache.bench import timing

sys.path.insert(0, str(Path(__file__).parents[1] / "trainer"))


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """By this clock all that is timed takes a second."""
    ticks = itertools.count()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
