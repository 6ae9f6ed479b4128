"""What adapters that compress features are trained for: that these, or the frames, can be made again of their latents."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge
from numpy.typing import NDArray
from torch import Tensor, nn

from wmcache.common.errors import UserError
from wmcache.common.options import option
from wmcache.pipeline.encoders.base import Features
from wmcache.pipeline.encoders.decoders import PixelDecoder, TokenDecoder
from wmcache.pipeline.encoders.fitting import FitData, FitOptions

BACKGROUND_FRAMES = 1000
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
    """Channels to mean 0 and deviation 1 over the patches of the training frames; those that never change become 0."""

    def __init__(self, dim: int) -> None:
        """Args: `dim` channels."""
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    def forward(self, values: Tensor) -> Tensor:
        """[..., dim] -> the same."""
        return (values - self.mean) / self.std

    def look_at(self, moments: tuple[Tensor, Tensor]) -> None:
        """Take over a layer's mean and deviation, each [dim]."""
        mean, std = moments
        self.mean.copy_(mean)
        self.std.copy_(std.clamp_min(SMALLEST_DEVIATION))

    mean: Tensor
    std: Tensor


def patch_moments(data: FitData, layers: Sequence[str], seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> mean and deviation, each [channels], of the patches of a sample of frames.

    A store's own statistics are over all its tokens: class and register tokens, which may be many times as large, would be among them.
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
    """A decoder and its error: the mean absolute one of normalised pixels, or the mean squared one of standardised features."""

    def __init__(self, data: FitData, options: ReconstructionOptions, dim: int, layers: Sequence[str]) -> None:
        """Args: `data`, `options` of the fit; `dim` channels of the latents, on the grid of the base; `layers` to make again."""
        super().__init__()
        assert data.base is not None
        self.data = data
        backbone = data.base.backbone
        rows, columns = backbone.grid
        self.targets = nn.ModuleDict()
        self.decoder: PixelDecoder | TokenDecoder
        if options.needs_images:
            self.decoder = PixelDecoder(backbone.grid, dim, data.preprocess.image_size)
            rng = np.random.default_rng(options.seed)
            some = rng.choice(len(data), min(len(data), BACKGROUND_FRAMES), replace=False)
            self.decoder.look_at(data.pixels(np.sort(some)))
        else:
            self.decoder = TokenDecoder(rows * columns, dim, sum(backbone.dims[layer] for layer in layers))
            for layer, moments in patch_moments(data, layers, options.seed).items():
                self.targets[layer] = target = Standardise(backbone.dims[layer])
                target.look_at(moments)

    def forward(self, latents: Tensor, features: Features, rows: NDArray[np.integer]) -> Tensor:
        """Scalar error of what is made of latents [B, N, dim], against their features or the frames `rows`."""
        drawn = self.decoder(latents).float()
        if not self.targets:
            return F.l1_loss(drawn, self.data.pixels(rows))
        target = torch.cat([standardise(features.patches(layer)) for layer, standardise in self.targets.items()], -1)
        return F.mse_loss(drawn, target)


def random_rows(data: FitData, batch: int, rng: np.random.Generator) -> NDArray[np.integer]:
    """Frames of a batch, each at most once, ascending, as a store reads them best."""
    return np.sort(rng.choice(len(data), batch, replace=False))


def require_layers(known: Collection[str], layers: Sequence[str], name: str) -> None:
    """Raises UserError where a store, or a backbone, lacks layers that the adapter of a name reads."""
    if missing := [layer for layer in layers if layer not in known]:
        raise UserError(
            f"{name} reads {', '.join(layers)} features, and here are no {', '.join(missing)} ones; "
            "extract layers of the base, for example with --encoder dinov2-layers, and fit it on those"
        )
