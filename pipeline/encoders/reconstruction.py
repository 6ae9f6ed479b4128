"""The loss of adapters that compress features: the features, or the frames, are reconstructed from their latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge
from numpy.typing import NDArray
from torch import Tensor, nn

from wmcache.common.options import option
from wmcache.pipeline.encoders.base import Features
from wmcache.pipeline.encoders.decoders import PixelDecoder, TokenDecoder
from wmcache.pipeline.encoders.fitting import FitData, FitOptions

SAMPLED_FRAMES = 500
SMALLEST_DEVIATION = 1e-5


@dataclass(frozen=True)
class ReconstructionOptions(FitOptions):
    """How they are trained."""

    batch: Annotated[int, Ge(2)] = option(128)
    decoder: Literal["tokens", "pixels"] = option(
        "tokens", "What is reconstructed: tokens, the cached features, or pixels, the frames."
    )

    @property
    def needs_images(self) -> bool:
        """Only pixels need them."""
        return self.decoder == "pixels"


class Standardise(nn.Module):
    """Scales channels to mean 0 and deviation 1 over the patches of the training frames; constant channels become 0."""

    def __init__(self, dim: int) -> None:
        """Set the number of channels."""
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    def forward(self, values: Tensor) -> Tensor:
        """[..., dim] -> the same."""
        return (values - self.mean) / self.std

    def fit_statistics(self, moments: tuple[Tensor, Tensor]) -> None:
        """Set a layer's mean and deviation, each [dim]."""
        mean, std = moments
        self.mean.copy_(mean)
        self.std.copy_(std.clamp_min(SMALLEST_DEVIATION))

    mean: Tensor
    std: Tensor


def patch_moments(data: FitData, layers: Sequence[str], seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Compute for each layer the mean and deviation, each [channels], of the patches of a sample of frames.

    A store's own statistics include class and register tokens, which may be many times as large.
    """
    count, totals, squares = 0, dict.fromkeys(layers, torch.zeros(())), dict.fromkeys(layers, torch.zeros(()))
    for features in data.sample_features(SAMPLED_FRAMES, seed):
        for layer in layers:
            values = features.patches(layer).cpu().double().flatten(0, 1)
            totals[layer], squares[layer] = totals[layer] + values.sum(0), squares[layer] + values.square().sum(0)
        count += len(values)
    means = {layer: total / count for layer, total in totals.items()}
    return {layer: (means[layer], (squares[layer] / count - means[layer] ** 2).clamp_min(0).sqrt()) for layer in layers}


class Reconstruction(nn.Module):
    """A decoder and its error: L1 of normalised pixels, or MSE of standardised features."""

    def __init__(self, data: FitData, options: ReconstructionOptions, dim: int, layers: Sequence[str]) -> None:
        """Make the decoder of latents of `dim` channels on the base's grid; `layers` are the features to reconstruct."""
        super().__init__()
        assert data.base is not None
        self.data = data
        backbone = data.base.backbone
        rows, columns = backbone.grid
        self.targets = nn.ModuleDict()
        self.decoder: PixelDecoder | TokenDecoder
        if options.needs_images:
            self.decoder = PixelDecoder(backbone.grid, dim, data.preprocess.image_size)
            self.decoder.fit_statistics(data.sample_pixels(options.seed))
        else:
            self.decoder = TokenDecoder(rows * columns, dim, sum(backbone.dims[layer] for layer in layers))
            for layer, moments in patch_moments(data, layers, options.seed).items():
                self.targets[layer] = target = Standardise(backbone.dims[layer])
                target.fit_statistics(moments)

    def forward(self, latents: Tensor, features: Features, rows: NDArray[np.integer]) -> Tensor:
        """Return the error of decoded latents [B, N, dim] against their features or the frames `rows`; a scalar."""
        drawn = self.decoder(latents).float()
        if not self.targets:
            return F.l1_loss(drawn, self.data.pixels(rows))
        target = torch.cat([standardise(features.patches(layer)) for layer, standardise in self.targets.items()], -1)
        return F.mse_loss(drawn, target)


def random_rows(data: FitData, batch: int, rng: np.random.Generator) -> NDArray[np.integer]:
    """Draw the frames of a batch, each at most once, ascending: the order in which a store reads fastest."""
    return np.sort(rng.choice(len(data), batch, replace=False))
