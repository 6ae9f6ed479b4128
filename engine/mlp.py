"""Perceptrons of DreamerV3 (arXiv 2301.04104)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RmsNorm(nn.RMSNorm):
    """In float32: PyTorch's kernel takes values and weights of one type."""

    def forward(self, values: Tensor) -> Tensor:
        """Normalise [..., units]."""
        return super().forward(values.float())


def make_mlp(
    inputs: int, hidden: int, layers: int, outputs: int | None = None, *, scale: float | None = None
) -> nn.Sequential:
    """Return hidden layers with RMSNorm and SiLU, and a linear one to the outputs, if any.

    Args:
        scale: of the first weights of that one, whose biases are 0 then; None: both are drawn as usual.
    """
    found: list[nn.Module] = []
    for _ in range(layers):
        found += [nn.Linear(inputs, hidden), RmsNorm(hidden), nn.SiLU()]
        inputs = hidden
    if outputs is not None:
        found.append(last := nn.Linear(inputs, outputs))
        if scale is not None:
            with torch.no_grad():
                last.weight *= scale
                last.bias.zero_()
    return nn.Sequential(*found)
