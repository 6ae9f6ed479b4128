"""DINO-WM with explicit attention under a mask gives the same numbers in every variant."""

from __future__ import annotations

from typing import Any

import torch
from model_tools import each_variant, make_batch, make_trained_model, model_inputs

from wmcache.bench.reference import explicit_predict


@each_variant
def test_it_predicts_the_same(variant: dict[str, Any]) -> None:
    model = make_trained_model(**variant)
    inputs = model_inputs(model, make_batch())
    for found, explicit in zip(model.predict(*inputs), explicit_predict(model, *inputs), strict=True):
        torch.testing.assert_close(found, explicit)


def test_frames_older_than_the_history_are_forgotten() -> None:
    model = make_trained_model(position="rope", depth=1)
    inputs = model_inputs(model, make_batch(frames=5))
    older = (inputs[0].clone(), *inputs[1:])
    older[0][:, 0] += 1
    before, after = explicit_predict(model, *inputs)[0], explicit_predict(model, *older)[0]
    assert torch.equal(before[:, model.shape.history :], after[:, model.shape.history :])
    assert not torch.isclose(before[:, : model.shape.history], after[:, : model.shape.history]).all()
