"""The leading principal components of patch tokens: the simplest smaller representation, without a step of training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from wmcache.common.errors import UserError
from wmcache.common.options import Natural, Positive, option
from wmcache.common.schema import Size
from wmcache.pipeline.encoders.base import LAST, Backbone, Features, Head
from wmcache.pipeline.encoders.fitting import FitData, FitOptions, Fitting, adapter_spec
from wmcache.pipeline.encoders.registry import register_adapter, register_fit

SPEC = adapter_spec(
    "pca",
    "leading principal components of another encoder's patch tokens",
    32,
    token_selection="principal components of the patch tokens",
)


@dataclass(frozen=True)
class PcaOptions(FitOptions):
    """How the components are found, in closed form: batch and learning rate have no effect."""

    steps: Natural = option(0, flag="")
    batch: Positive = option(1)
    dim: Size = option(SPEC.token_dim, "Principal components to keep.")
    sampled_frames: Size = option(2000, "Training frames whose tokens are used.")

    @property
    def needs_images(self) -> bool:
        """Whether the training looks at frames."""
        return False


@register_adapter(SPEC, base="dinov2")
class _PcaHead(Head):
    """Centred patch tokens along the axes; not scaled, so squared distances are those of the tokens without the other components."""

    layers = (LAST,)
    mean: Tensor
    axes: Tensor

    def __init__(self, backbone: Backbone, options: PcaOptions) -> None:
        super().__init__()
        self.grid, self.dim = backbone.grid, options.dim
        self.register_buffer("mean", torch.zeros(backbone.dims[LAST]))
        self.register_buffer("axes", torch.zeros(options.dim, backbone.dims[LAST]))

    def forward(self, features: Features) -> Tensor:
        return (features.patches(LAST) - self.mean) @ self.axes.T


@register_fit(SPEC.name, PcaOptions)
class _PcaFitting(Fitting):
    """The components of a sample of frames, computed without steps."""

    kept: _PcaHead

    def __init__(self, data: FitData, options: PcaOptions) -> None:
        super().__init__()
        assert data.base is not None
        channels = data.backbone.dims[LAST]
        if options.steps:
            raise UserError(f"--steps is {options.steps}, but {SPEC.name} is computed in closed form; leave it out")
        if options.dim > channels:
            raise UserError(f"--dim is {options.dim}, but {data.base.spec.name} has only {channels} channels")
        patches = (features.patches(LAST) for features in data.sample_features(options.sampled_frames, options.seed))
        mean, _, axes = principal_axes(patches)
        self.kept = _PcaHead(data.backbone, options)
        self.kept.mean.copy_(mean)
        self.kept.axes.copy_(axes[: options.dim])


def principal_axes(tokens: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Compute principal components of parts of tokens [..., D], in float64 on the CPU.

    Returns:
        The mean [D], the variances [D], descending, and the axes [D, D], one a row, of length 1, the largest entry of each positive.
    """
    count, total, products = 0, torch.zeros(()).double(), torch.zeros(()).double()
    for part in tokens:
        values = part.detach().cpu().double().flatten(0, -2)
        count, total, products = count + len(values), total + values.sum(0), products + values.T @ values
    mean = total / count
    variances, columns = torch.linalg.eigh(products / count - mean[:, None] * mean)
    axes = columns.T.flip(0)
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    return mean, variances.flip(0).clamp_min(0), axes * largest.sign()
