"""Symlog and two-hot targets, against a loop."""

from __future__ import annotations

import math

import pytest
import torch

from wmcache.trainer.models.symlog import TwoHot, symexp, symlog

VALUES = [0.0, 1.0, -3.7, 1e3, -5e6, 1e9, -0.05]


def test_symlog_is_inverted() -> None:
    values = torch.tensor(VALUES)
    torch.testing.assert_close(symexp(symlog(values)), values)
    assert symlog(torch.tensor([-1.0, 0.0, math.e - 1])).tolist() == pytest.approx([-math.log(2), 0, 1])


@pytest.mark.parametrize(("bins", "low", "high"), [(255, -20.0, 20.0), (5, -1.0, 3.0)])
def test_two_bins_have_a_targets_mean(bins: int, low: float, high: float) -> None:
    two_hot = TwoHot(bins, low, high)
    places = [low + (high - low) * k / (bins - 1) for k in range(bins)]
    centres = [math.copysign(math.expm1(abs(place)), place) for place in places]
    logits = torch.randn(len(VALUES), bins, generator=torch.Generator().manual_seed(0))
    losses, means = two_hot.loss(logits, torch.tensor(VALUES)), two_hot.mean(logits)
    for row, value in enumerate(VALUES):
        target = min(max(value, centres[0]), centres[-1])
        k = max(0, max(i for i in range(bins - 1) if centres[i] <= target + 1e-9 * abs(target)))
        share = (target - centres[k]) / (centres[k + 1] - centres[k])
        logs = logits[row].double().log_softmax(0)
        assert float(losses[row]) == pytest.approx(-float((1 - share) * logs[k] + share * logs[k + 1]), rel=1e-4)
        assert float(two_hot.encode(torch.tensor(value)) @ two_hot.values) == pytest.approx(target, rel=1e-5, abs=1e-6)
        mean = sum(float(logs[i].exp()) * centre for i, centre in enumerate(centres))
        scale = sum(float(logs[i].exp()) * abs(centre) for i, centre in enumerate(centres))
        assert abs(float(means[row]) - mean) < 1e-5 * scale
    if low == -high:
        assert two_hot.mean(torch.zeros(3, bins)).tolist() == [0.0] * 3
