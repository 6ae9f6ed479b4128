"""Perceptrons of DreamerV3 (arXiv 2301.04104)."""

from __future__ import annotations

from torch import Tensor, nn


class RmsNorm(nn.RMSNorm):
    """In float32: PyTorch's kernel takes values and weights of one type."""

    def forward(self, values: Tensor) -> Tensor:
        """Normalise [..., units]."""
        return super().forward(values.float())


def make_mlp(inputs: int, hidden: int, layers: int, outputs: int | None = None, *, zero: bool = False) -> nn.Sequential:
    """Return hidden layers with RMSNorm and SiLU, and a linear one to the outputs, if any; `zero`: it is 0 at first."""
    found: list[nn.Module] = []
    for _ in range(layers):
        found += [nn.Linear(inputs, hidden), RmsNorm(hidden), nn.SiLU()]
        inputs = hidden
    if outputs is not None:
        found.append(last := nn.Linear(inputs, outputs))
        if zero:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
    return nn.Sequential(*found)
