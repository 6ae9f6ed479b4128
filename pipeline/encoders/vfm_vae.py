"""VFM-VAE (arXiv 2510.18457): three layers of a frozen network compressed into a few Gaussian channels that keep its geometry.

A small version of the published model. Left out are the multi-scale generator with its discriminator, LPIPS, which needs other weights,
the equivariance terms, the adaptive weight of the alignment and VA-VAE's margins (arXiv 2501.01423).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from wmcache.common.options import Weight, option
from wmcache.common.schema import Size
from wmcache.pipeline.encoders.base import EARLY, LAST, MIDDLE, Backbone, Features, Head, transformer_layer
from wmcache.pipeline.encoders.fitting import (
    FitData,
    Reconstruction,
    ReconstructionFitting,
    ReconstructionOptions,
    adapter_spec,
)
from wmcache.pipeline.encoders.registry import register_adapter, register_fit
from wmcache.pipeline.encoders.vae import divergence_from_prior

SUMMARY = "VFM-VAE: three layers compressed into a variational latent that keeps their geometry"
SPEC = adapter_spec("vfm-vae", SUMMARY, 32, layer="block 2+block 6+norm")

LEVEL = 32
LOGVAR = (-30.0, 20.0)
COUNTED_STEPS, SLOWEST = 20, 0.02
"""Latent statistics cover the last steps; the weight of a step in the moving mean is at least this share."""


@dataclass(frozen=True)
class VfmVaeOptions(ReconstructionOptions):
    """How it is trained."""

    latent: Size = option(SPEC.token_dim, "Channels of the latent.")
    kl: Weight = option(1e-6, "Weight of the KL divergence from the prior, in nats a frame.")
    align: Weight = option(1.0, "Weight of the alignment with the last layer.")


@register_adapter(SPEC, base="dinov2-layers")
class _VfmVaeHead(Head):
    """The means of the latents, standardised, because the divergence has too little weight to fix their scale."""

    layers = (EARLY, MIDDLE, LAST)

    def __init__(self, backbone: Backbone, options: VfmVaeOptions) -> None:
        super().__init__()
        self.grid, self.dim = backbone.grid, options.latent
        dims = [backbone.dims[layer] for layer in self.layers]
        self.levels = nn.ModuleList(nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, LEVEL)) for dim in dims)
        width = LEVEL * len(dims)
        self.mixer = transformer_layer(width)
        self.moments = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * options.latent))
        self.standardise = nn.BatchNorm1d(options.latent, affine=False)

    def encode(self, features: Features) -> tuple[Tensor, Tensor]:
        # Mean and logarithm of the variance of the latents, each float32 [B, N, latent].
        levels = [level(features.patches(layer)) for layer, level in zip(self.layers, self.levels, strict=True)]
        mean, logvar = self.moments(self.mixer(torch.cat(levels, -1))).float().chunk(2, -1)
        return mean, logvar.clamp(*LOGVAR)

    def forward(self, features: Features) -> Tensor:
        mean, _ = self.encode(features)
        tokens: Tensor = self.standardise(mean.flatten(0, 1)).view(mean.shape)
        return tokens


@register_fit(SPEC.name, VfmVaeOptions)
class VfmVaeFitting(ReconstructionFitting):
    """Features or frames reconstructed from a sample of the latents, with a weak prior and the final features' geometry."""

    kept: _VfmVaeHead
    options: VfmVaeOptions

    def __init__(self, data: FitData, options: VfmVaeOptions) -> None:
        """Make head and decoder."""
        super().__init__(SPEC.name, _VfmVaeHead.layers, data, options)
        self.kept = _VfmVaeHead(data.backbone, options)
        self.kept.standardise.momentum = min(1.0, max(SLOWEST, COUNTED_STEPS / max(1, options.steps)))
        self.reconstruction = Reconstruction(data, options, options.latent, _VfmVaeHead.layers)
        self.project = nn.Linear(options.latent, data.backbone.dims[LAST])

    def loss(self, rows: NDArray[np.integer]) -> dict[str, Tensor]:
        """Compute the decoder's error, the divergence from the prior, and `alignment_loss`."""
        features = self.data.features(rows)
        mean, logvar = self.kept.encode(features)
        with torch.no_grad():
            self.kept.standardise(mean.flatten(0, 1))  # updates its statistics
        latents = mean + (logvar / 2).exp() * torch.randn_like(mean)
        error = self.reconstruction(latents, features, rows)
        kl = divergence_from_prior(mean.flatten(1), logvar.flatten(1)).mean()
        align = alignment_loss(latents, self.project(latents).float(), features.patches(LAST))
        loss = error + self.options.kl * kl + self.options.align * align
        return {"loss": loss, "error": error, "kl": kl, "align": align}


def alignment_loss(latents: Tensor, projected: Tensor, features: Tensor) -> Tensor:
    """Compute the distance of latents [B, N, d], and of their projections [B, N, D], from a frozen network's features [B, N, D].

    Latents are compared by the angles between a frame's tokens, projections by their angle with the features.
    """
    own, target = (F.normalize(values, dim=-1) for values in (latents, features))
    between = (own @ own.mT - target @ target.mT).abs().mean()
    return between + (1 - F.cosine_similarity(projected, features, dim=-1)).mean()
