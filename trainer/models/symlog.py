"""Numbers of any size as targets: the symmetric logarithm and the two-hot distribution of DreamerV3 (arXiv 2301.04104)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def symlog(values: Tensor) -> Tensor:
    """Compute sign(x) ln(1 + |x|)."""
    return values.sign() * values.abs().log1p()


def symexp(values: Tensor) -> Tensor:
    """Invert `symlog`."""
    return values.sign() * values.abs().expm1()


class TwoHot(nn.Module):
    """A categorical distribution over values, given by logits [..., bins]: the bins are symexp of equal steps from low to high.

    A target is the two bins around it, weighted so that their mean is the target; values outside become the outermost bin.
    """

    values: Tensor

    def __init__(self, bins: int = 255, low: float = -20.0, high: float = 20.0) -> None:
        """Take the number of bins, and the range of `symlog` of the values."""
        super().__init__()
        values = symexp(torch.linspace(low, high, bins))
        if low == -high:
            values = (values - values.flip(0)) / 2  # vector and scalar instructions round differently
        self.register_buffer("values", values, persistent=False)

    def encode(self, target: Tensor) -> Tensor:
        """Return the probabilities [..., bins] of targets [...]."""
        values = self.values
        target = target.float().clamp(values[0], values[-1])
        above = torch.searchsorted(values, target.contiguous()).clamp(1, len(values) - 1)
        low, high = values[above - 1], values[above]
        share = ((target - low) / (high - low))[..., None]
        weights = torch.zeros(*target.shape, len(values), device=target.device)
        return weights.scatter(-1, above[..., None] - 1, 1 - share).scatter(-1, above[..., None], share)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the cross-entropy [...] of targets [...]; no gradient flows to the targets."""
        return -(self.encode(target.detach()) * F.log_softmax(logits.float(), -1)).sum(-1)

    def mean(self, logits: Tensor) -> Tensor:
        """Compute the mean [...]; opposite bins are added first, so that equal probabilities of a range around 0 give exactly 0."""
        weighted = F.softmax(logits.float(), -1) * self.values
        return (weighted + weighted.flip(-1)).sum(-1) / 2
