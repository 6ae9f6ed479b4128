"""DINO-WM's plan and this implementation's: the same costs, the frames that each encodes, and explicit attention under a mask."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_tools import each_variant, make_batch, make_trained_model, model_inputs

from wmcache.bench import reference as bench
from wmcache.bench.reference import explicit_predict
from wmcache.planner.context import EvalContext
from wmcache.planner.options import PlanOptions

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "reference": {"width": 0, "head_dim": 8, "proprio": "embedding", "predict": "frame", "standardise": False},
    "jepa-wm": {"condition": "adaln", "position": "rope"},
    "tokens": {"combine": "tokens", "proprio": "none"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_have_the_same_costs_and_plans(
    store_path: Path,
    train_run: Callable[..., Path],
    tiny_plan: PlanOptions,
    monkeypatch: pytest.MonkeyPatch,
    variant: str,
) -> None:
    context = EvalContext(train_run(store_path, **VARIANTS[variant]), tiny_plan)
    encoder, sizes = context.encoder, []

    def recording(frames: Any) -> Any:
        sizes.append(len(frames))
        return encoder(frames)

    monkeypatch.setattr(context, "encoder", recording)
    figures = bench.bench_run(context, samples=40, elites=8, dtype="float32")
    assert figures["cost_difference_float32"] == figures["cost_difference"] < 1e-3
    assert figures["plan_difference_float32"] < 1e-4
    assert figures["cost_rank_correlation"] > 0.999
    assert all(np.isfinite(value) for value in figures.values())
    assert figures["share_of_limit"] == pytest.approx(figures["ours_gflops"] / figures["limit_gflops"])
    assert figures["ratio"] == pytest.approx(figures["reference_seconds"] / figures["ours_seconds"])
    # The goal, the present frame in two precisions, then the reference's copies of it.
    assert sizes[:5] == [1, 1, 1, 30, 10]
    assert (figures["ours_encoder_frames"], figures["reference_encoder_frames"]) == (2, 40 + 1)


@each_variant
def test_explicit_attention_predicts_the_same(variant: dict[str, Any]) -> None:
    model = make_trained_model(**variant)
    inputs = model_inputs(model, make_batch())
    for found, explicit in zip(model.predict(*inputs), explicit_predict(model, *inputs), strict=True):
        torch.testing.assert_close(found, explicit)
