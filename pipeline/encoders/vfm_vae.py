"""VFM-VAE (arXiv 2510.18457): three layers of a frozen network compressed into a few Gaussian channels that keep its geometry.

A small version of the published one: for each layer a projection, attention over all of them, mean and variance on the base's own grid.
Left out are the multi-scale generator with its discriminator, LPIPS, which needs weights that cannot be assumed, the terms of
equivariance, the adaptive weight of the alignment and VA-VAE's margins in it (arXiv 2501.01423). With `--decoder tokens` the fit needs
nothing but the store. Tokens are the means, standardised: the weight of the divergence leaves their scale open.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from wmcache.common.options import Weight, option
from wmcache.common.schema import Size, parse
from wmcache.pipeline.encoders.base import EARLY, LAST, MIDDLE, Backbone, EncoderSpec, Features, Head
from wmcache.pipeline.encoders.fitting import FitData, Fitting
from wmcache.pipeline.encoders.reconstruction import Reconstruction, ReconstructionOptions, random_rows, require_layers
from wmcache.pipeline.encoders.registry import register_adapter, register_fit
from wmcache.pipeline.encoders.vae import divergence_from_prior
from wmcache.pipeline.encoders.weights import load_fitted

SPEC = EncoderSpec(
    name="vfm-vae",
    summary="VFM-VAE: three layers compressed into a variational latent that keeps their geometry (wmcache fit)",
    image_size=196,
    via=(224,),
    patch=14,
    token_dim=32,
    normalisation="half",
    layer="block 2+block 6+norm",
    token_selection="patch",
    source="wmcache fit --encoder vfm-vae",
    licence="yours, on the base's",
)

LEVEL = 32
LOGVAR = (-30.0, 20.0)
COUNTED_STEPS, SLOWEST = 20, 0.02
"""Statistics of the latents are of the last steps, when these hardly change any more; a step counts for this share at least."""


@dataclass(frozen=True)
class VfmVaeOptions(ReconstructionOptions):
    """How it is trained."""

    latent: Size = option(SPEC.token_dim, "Channels of the latent.")
    kl: Weight = option(1e-6, "Weight of the KL divergence from the prior, in nats a frame.")
    align: Weight = option(1.0, "Weight of the alignment with the last layer.")


class VfmVaeHead(Head):
    """The means of the latents, standardised."""

    layers = (EARLY, MIDDLE, LAST)

    def __init__(self, backbone: Backbone, options: VfmVaeOptions) -> None:
        """Args: `backbone` whose features these are, `options` of the fit."""
        super().__init__()
        self.grid, self.dim = backbone.grid, options.latent
        dims = [backbone.dims[layer] for layer in self.layers]
        self.levels = nn.ModuleList(nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, LEVEL)) for dim in dims)
        width = LEVEL * len(dims)
        self.mixer = nn.TransformerEncoderLayer(
            width, nhead=4, dim_feedforward=2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.moments = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * options.latent))
        self.standardise = nn.BatchNorm1d(options.latent, affine=False)

    def encode(self, features: Features) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of the latents, each float32 [B, N, latent]."""
        levels = [level(features.patches(layer)) for layer, level in zip(self.layers, self.levels, strict=True)]
        mean, logvar = self.moments(self.mixer(torch.cat(levels, -1))).float().chunk(2, -1)
        return mean, logvar.clamp(*LOGVAR)

    def forward(self, features: Features) -> Tensor:
        """See `Head.forward`."""
        mean, _ = self.encode(features)
        tokens: Tensor = self.standardise(mean.flatten(0, 1)).view(mean.shape)
        return tokens


@register_adapter(SPEC, base="dinov2-layers")
def adapt(backbone: Backbone, options: dict[str, Any], weights: Path) -> VfmVaeHead:
    """The head with its weights.

    Raises:
        UserError: the file does not fit.
    """
    require_layers(backbone.dims, VfmVaeHead.layers, SPEC.name)
    head = VfmVaeHead(backbone, parse(VfmVaeOptions, options, f"--weights {weights}", "fit it again"))
    load_fitted(head, weights, SPEC.name)
    return head


@register_fit(SPEC.name, VfmVaeOptions)
class VfmVaeFitting(Fitting):
    """Features or frames made again of a sample of the latents, which keep to the prior a little and to the final features' geometry."""

    kept: VfmVaeHead

    def __init__(self, data: FitData, options: VfmVaeOptions) -> None:
        """See `Fitting`.

        Raises:
            UserError: the base's store lacks a layer.
        """
        super().__init__()
        assert data.base is not None
        backbone = data.base.backbone
        require_layers(data.base.head.layers, VfmVaeHead.layers, SPEC.name)
        self.data, self.options = data, options
        self.kept = VfmVaeHead(backbone, options)
        self.kept.standardise.momentum = min(1.0, max(SLOWEST, COUNTED_STEPS / max(1, options.steps)))
        self.reconstruction = Reconstruction(data, options, options.latent, VfmVaeHead.layers)
        self.project = nn.Linear(options.latent, backbone.dims[LAST])

    def rows(self, rng: np.random.Generator) -> NDArray[np.integer]:
        """Any frames."""
        return random_rows(self.data, self.options.batch, rng)

    def loss(self, rows: NDArray[np.integer]) -> dict[str, Tensor]:
        """The decoder's error, the divergence from the prior, and `alignment_loss`."""
        features = self.data.features(rows)
        mean, logvar = self.kept.encode(features)
        with torch.no_grad():
            self.kept.standardise(mean.flatten(0, 1))  # whose statistics follow
        latents = mean + (logvar / 2).exp() * torch.randn_like(mean)
        error = self.reconstruction(latents, features, rows)
        kl = divergence_from_prior(mean.flatten(1), logvar.flatten(1)).mean()
        align = alignment_loss(latents, self.project(latents).float(), features.patches(LAST))
        return {
            "loss": error + self.options.kl * kl + self.options.align * align,
            "error": error,
            "kl": kl,
            "align": align,
        }


def alignment_loss(latents: Tensor, projected: Tensor, features: Tensor) -> Tensor:
    """How far latents are from a frozen network's features: 0 if both have the same angles.

    Args:
        latents: [B, N, d]; the angles between a frame's tokens are to be those between its features.
        projected: [B, N, D], of the latents; the angle of each with its feature is to be 0.
        features: [B, N, D].
    """
    ours, theirs = (F.normalize(values, dim=-1) for values in (latents, features))
    between = (ours @ ours.mT - theirs @ theirs.mT).abs().mean()
    return between + (1 - F.cosine_similarity(projected, features, dim=-1)).mean()
