"""DINO-WM with explicit attention under a mask gives the same numbers in every variant."""

from __future__ import annotations

from typing import Any

import torch
from model_tools import each_variant, make_batch, make_trained_model, model_inputs

from wmcache.bench.explicit import explicit_predict


@each_variant
def test_it_predicts_the_same(variant: dict[str, Any]) -> None:
    model = make_trained_model(**variant)
    inputs = model_inputs(model, make_batch())
    for found, explicit in zip(model.predict(*inputs), explicit_predict(model, *inputs), strict=True):
        torch.testing.assert_close(found, explicit)
