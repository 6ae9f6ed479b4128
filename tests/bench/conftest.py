"""A clock and a small limit for benchmarks. Tests here import `model_tools` from the tests of the trainer."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from wmcache.bench import limit, timing

sys.path.insert(0, str(Path(__file__).parents[1] / "trainer"))


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """By this clock all that is timed takes a second."""
    ticks = itertools.count()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))


@pytest.fixture(autouse=True)
def small_limit(monkeypatch: pytest.MonkeyPatch) -> float:
    """GFLOP of the product that measures the limit; a large one takes seconds on CPUs that emulate its precision."""
    monkeypatch.setattr(limit, "CPU_SIZE", 64)
    return 2 * 64**3 / 1e9
