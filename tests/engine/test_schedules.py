"""Learning rates by step, and which parameters decay."""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn

from wmcache.engine.optimisers import decay_groups, warmup_constant_decay, warmup_cosine


def test_warmup_constant_decay() -> None:
    rates = [warmup_constant_decay(step, 100, 2.0, 0.1, 0.4) for step in range(101)]
    np.testing.assert_allclose(rates[:10], 2.0 * np.arange(1, 11) / 10)
    assert rates[10:61] == [2.0] * 51
    np.testing.assert_allclose(rates[60:], 2.0 * (1 - np.sqrt(np.arange(41) / 40)), atol=1e-12)


@pytest.mark.parametrize(("warmup", "decay"), [(0, 0), (1, 0), (0.001, 0.001)])
def test_every_step_has_a_rate_above_0(warmup: float, decay: float) -> None:
    assert all(0 < warmup_constant_decay(step, 7, 2.0, warmup, decay) <= 2.0 for step in range(7))


def test_warmup_cosine() -> None:
    rates = [warmup_cosine(step, 100, 2.0) for step in range(101)]
    np.testing.assert_allclose(rates[:10], 2.0 * np.arange(1, 11) / 10)
    np.testing.assert_allclose(rates[10:], 1 + np.cos(np.pi * np.arange(91) / 90), atol=1e-12)
    assert warmup_cosine(0, 1, 2.0) == 2.0


@pytest.mark.parametrize(("decay_all", "of_vectors"), [(False, 0.0), (True, 0.5)])
def test_vectors_decay_only_with_decay_all(decay_all: bool, of_vectors: float) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2).requires_grad_(requires_grad=False))
    groups = decay_groups([{"params": model.parameters(), "lr": 3.0}], 0.5, decay_all=decay_all)
    decay = {parameter: group["weight_decay"] for group in groups for parameter in group["params"]}
    assert {name: decay[value] for name, value in model.named_parameters() if value in decay} == {
        "0.weight": 0.5,
        "0.bias": of_vectors,
        "1.weight": of_vectors,
        "1.bias": of_vectors,
    }
    assert [group["lr"] for group in groups] == [3.0, 3.0]
