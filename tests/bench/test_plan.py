"""DINO-WM's way to plan against ours: the same numbers, and the frames that each has encoded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wmcache.bench import plan as bench_module
from wmcache.planner.context import EvalContext
from wmcache.planner.options import PlanOptions

VARIANTS: dict[str, dict[str, Any]] = {
    "ours": {},
    "reference": {"width": 0, "head_dim": 8, "proprio": "embedding", "predict": "frame", "standardise": False},
    "jepa-wm": {"condition": "adaln", "position": "rope"},
    "tokens": {"combine": "tokens", "proprio": "none"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_ways_cost_and_plan_the_same(
    store_path: Path,
    train_run: Callable[..., Path],
    tiny_plan: PlanOptions,
    monkeypatch: pytest.MonkeyPatch,
    variant: str,
) -> None:
    monkeypatch.setattr(bench_module, "LIMIT_SIZE", 64)
    setting = EvalContext(train_run(store_path, **VARIANTS[variant]), tiny_plan)
    figures = bench_module.bench_run(setting, samples=40, elites=8, dtype="float32")
    assert figures["cost_difference_float32"] == figures["cost_difference"] < 1e-3
    assert figures["plan_difference_float32"] < 1e-4
    assert figures["cost_rank_correlation"] > 0.999
    assert all(np.isfinite(value) for value in figures.values())
    assert figures["ratio"] == pytest.approx(figures["reference_seconds"] / figures["ours_seconds"])


def test_it_counts_the_frames_that_each_way_encodes(setting: EvalContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_module, "LIMIT_SIZE", 64)
    encoder, sizes = setting.encoder, []

    def recording(frames: Any) -> Any:
        sizes.append(len(frames))
        return encoder(frames)

    monkeypatch.setattr(setting, "encoder", recording)
    figures = bench_module.bench_run(setting, samples=40, elites=8, dtype="float32")
    # The goal, ours in two precisions, then the reference's copies of the present frame.
    assert sizes[:5] == [1, 1, 1, 30, 10]
    assert figures["ours_encoder_frames"] == 2
    assert figures["reference_encoder_frames"] == 40 + 1
