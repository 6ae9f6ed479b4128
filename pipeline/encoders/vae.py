"""Variational autoencoders, fitted on the dataset's own frames: the V of World Models (arXiv 1803.10122) and DisWM's (arXiv 2503.08751).

A frame is one token, the mean of its latents; `vae-logvar` and `beta-vae-logvar` give the logarithm of their variance. Networks and losses
are the papers'; of DisWM's, the part for single frames. Both papers use Adam at a constant rate (1e-4, 3e-4); here it is AdamW with one
cycle, as for every fit. World Models trains 10 epochs in batches of 100.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge
from numpy.typing import NDArray
from torch import Tensor, nn

from wmcache.common.errors import UserError
from wmcache.common.options import Positive, Weight, option
from wmcache.common.schema import Size, parse
from wmcache.pipeline.encoders.base import LAST, Backbone, EncoderSpec, Features, Head, Loaded, Select
from wmcache.pipeline.encoders.fitting import FitData, FitOptions, Fitting
from wmcache.pipeline.encoders.registry import LOG_VARIANCE, family_of, register, register_fit
from wmcache.pipeline.encoders.weights import DECODER, REFIT, load_fitted, read_header, require_fitted

SPEC = EncoderSpec(
    name="vae",
    summary="World Models' variational autoencoder, trained on the dataset's own frames (wmcache fit)",
    image_size=64,
    patch=64,
    token_dim=32,
    layer="mean",
    source="wmcache fit --encoder vae",
    licence="yours",
    dtype="float32",
    log_variance=f"vae{LOG_VARIANCE}",
)
BETA_SPEC = replace(
    SPEC,
    name="beta-vae",
    summary="DisWM's beta-VAE, trained on the dataset's own frames (wmcache fit)",
    token_dim=20,
    source="wmcache fit --encoder beta-vae",
    log_variance=f"beta-vae{LOG_VARIANCE}",
)
LOG_VARIANCES = [
    replace(
        spec,
        name=spec.log_variance,
        summary=f"log-variances of the latents of {spec.name}, from which a world model draws latents",
        layer="logvar",
        log_variance="",
    )
    for spec in (SPEC, BETA_SPEC)
]
LOGVAR = "logvar"

SIDE = 64


@dataclass(frozen=True)
class VaeOptions(FitOptions):
    """How World Models' is trained. Without `foreground`, the default steps do not get beyond the mean frame on the U-maze."""

    steps: Positive = option(300)
    batch: Annotated[int, Ge(2)] = option(32)
    latent: Size = option(SPEC.token_dim, "Channels of the latent.")
    beta: Weight = option(1.0, "Weight of the KL divergence, in nats, against the squared error of a frame.")
    free_bits: Weight = option(0.5, "Nats of each latent channel below which the KL divergence costs nothing.")
    foreground: bool = option(
        False, "Subtract the mean frame first, and divide by the deviation.", flag="--foreground/--whole-image"
    )


@dataclass(frozen=True)
class BetaVaeOptions(VaeOptions):
    """How DisWM's is trained."""

    steps: Positive = option(700)
    latent: Size = option(BETA_SPEC.token_dim)
    beta: Weight = option(0.015)
    free_bits: Weight = option(0.0)


class VaeEncoder(nn.Module):
    """Convolutions to one position, then two linear maps. Images are scaled by a background [3, 64, 64] and a scalar contrast."""

    background: Tensor
    contrast: Tensor

    def __init__(self, name: str, latent: int) -> None:
        """Build the layers of the encoder `name`, with `latent` channels."""
        super().__init__()
        if name == SPEC.name:
            layers: list[nn.Module] = []
            for before, after in ((3, 32), (32, 64), (64, 128), (128, 256)):
                layers += [nn.Conv2d(before, after, 4, stride=2), nn.ReLU()]
            features, background = 4 * 256, 0.0
        else:
            layers = []
            for before, after in ((3, 32), (32, 32), (32, 64), (64, 64)):
                layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.ELU()]
            layers += [nn.Conv2d(64, 256, 4), nn.ELU()]
            features, background = 256, 0.5
        self.convolutions = nn.Sequential(*layers, nn.Flatten())
        self.mean, self.logvar = nn.Linear(features, latent), nn.Linear(features, latent)
        self.register_buffer("background", torch.full((3, SIDE, SIDE), background))
        self.register_buffer("contrast", torch.ones(()))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images of `scale` -> mean and logarithm of the variance of the latents, each float32 [B, latent]."""
        features = self.convolutions(images)
        return self.mean(features).float(), self.logvar(features).float()

    def scale(self, images: Tensor) -> Tensor:
        """Images [B, 3, 64, 64] in [-1, 1] -> in the paper's range, or their scaled difference from the mean frame."""
        return (images / 2 + 0.5 - self.background) / self.contrast

    def fit_statistics(self, images: Tensor) -> None:
        """Set the mean frame of images [n, 3, 64, 64] in [-1, 1] as the background."""
        self.background.copy_(images.mean(0) / 2 + 0.5)
        self.contrast.copy_((images / 2 + 0.5 - self.background).std())


def make_decoder(name: str, options: VaeOptions) -> nn.Sequential:
    """Make the decoder: latents [B, latent] -> images of `VaeEncoder.scale`, [B, 3, 64, 64]."""
    latent = options.latent
    if name == SPEC.name:
        layers: list[nn.Module] = [nn.Linear(latent, 1024), nn.Unflatten(1, (1024, 1, 1))]
        for before, after, kernel in ((1024, 128, 5), (128, 64, 5), (64, 32, 6), (32, 3, 6)):
            layers += [nn.ConvTranspose2d(before, after, kernel, stride=2), nn.ReLU()]
    else:
        layers = [
            nn.Linear(latent, 256),
            nn.ELU(),
            nn.Unflatten(1, (256, 1, 1)),
            nn.ConvTranspose2d(256, 64, 4),
            nn.ELU(),
        ]
        for before, after in ((64, 64), (64, 32), (32, 32), (32, 3)):
            layers += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), nn.ELU()]
    decoder = nn.Sequential(*layers[:-1])
    if name == SPEC.name and not options.foreground:
        decoder.append(nn.Sigmoid())
    return decoder


class VaeDecoder(nn.Module):
    """Draws latents: tokens [B, 1, latent] -> images [B, 3, 64, 64] in [0, 1]."""

    def __init__(self, encoder: VaeEncoder, layers: nn.Sequential) -> None:
        """Draw with the layers of the encoder's fit."""
        super().__init__()
        self.encoder, self.layers = encoder, layers

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class; not clamped."""
        drawn: Tensor = self.layers(tokens.flatten(1)) * self.encoder.contrast + self.encoder.background
        return drawn


class _LogVariance(Head):
    layers, grid = (LOGVAR,), (1, 1)

    def __init__(self, latent: int) -> None:
        super().__init__()
        self.dim = latent

    def forward(self, features: Features) -> Tensor:
        return features.patches(LOGVAR)


class _Vae(Backbone):
    def __init__(self, encoder: VaeEncoder) -> None:
        super().__init__()
        self.encoder, self.grid = encoder, (1, 1)
        self.dims = dict.fromkeys((LOGVAR, LAST), encoder.mean.out_features)
        self.described = {LOGVAR: "logvar", LAST: "mean"}

    def forward(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        mean, logvar = self.encoder(self.encoder.scale(images))
        found = {LAST: mean[:, None], LOGVAR: logvar[:, None]}
        return {layer: found[layer] for layer in layers}


@register(SPEC)
@register(BETA_SPEC)
@register(LOG_VARIANCES[0])
@register(LOG_VARIANCES[1])
def load(spec: EncoderSpec, image_size: int, weights: Path | None) -> Loaded:
    """Load the fitted encoder."""
    if image_size != SIDE:
        raise UserError(f"--image-size {image_size} does not fit {spec.name}, which has {SIDE} px; leave it out")
    family = family_of(spec.name)
    weights = require_fitted(weights, spec.name, family)
    kind = VaeOptions if family == SPEC.name else BetaVaeOptions
    options = parse(kind, read_header(weights, family).get("options"), f"--weights {weights}", REFIT)
    encoder, layers = VaeEncoder(family, options.latent), make_decoder(family, options)
    draws = load_fitted(encoder, weights, family, layers)
    backbone, is_mean = _Vae(encoder), spec.name == family
    head = Select(backbone, spec.token_selection) if is_mean else _LogVariance(options.latent)
    return Loaded(backbone, head, "file", VaeDecoder(encoder, layers) if draws and is_mean else None)


@register_fit(SPEC.name, VaeOptions)
@register_fit(BETA_SPEC.name, BetaVaeOptions)
class VaeFitting(Fitting):
    """Frames reconstructed from a sample of their latents; the options' class decides between the two papers."""

    kept: VaeEncoder

    def __init__(self, data: FitData, options: VaeOptions) -> None:
        """Make encoder and decoder."""
        super().__init__()
        self.is_beta = isinstance(options, BetaVaeOptions)
        name = BETA_SPEC.name if self.is_beta else SPEC.name
        self.data, self.options = data, options
        self.kept = VaeEncoder(name, options.latent)
        self.decoder = make_decoder(name, options)
        if options.foreground:
            self.kept.to(data.device).fit_statistics(data.sample_pixels(options.seed))

    def weights(self) -> dict[str, Tensor]:
        """Return encoder and decoder; see `Fitting.weights`."""
        drawing = {f"{DECODER}{name}": value for name, value in self.decoder.state_dict().items()}
        return {**self.kept.state_dict(), **drawing}

    def rows(self, rng: np.random.Generator) -> NDArray[np.integer]:
        """Draw any frames."""
        return rng.integers(len(self.data), size=self.options.batch)

    def loss(self, rows: NDArray[np.integer]) -> dict[str, Tensor]:
        """Compute the papers' losses: the mean over the batch of sums over a frame's pixels and latents."""
        images = self.kept.scale(self.data.pixels(rows))
        mean, logvar = self.kept(images)
        decoded = self.decoder(mean + (logvar / 2).exp() * torch.randn_like(mean)).float()
        # World Models has the squared error itself, DisWM the likelihood under a Gaussian of variance 1.
        # Both in units of pixels, so that beta has the same weight with the foreground alone.
        weight = (0.5 if self.is_beta else 1.0) * self.kept.contrast.square()
        error = weight * (decoded - images).square().sum((1, 2, 3)).mean()
        divergence = divergence_from_prior(mean, logvar)
        charged = divergence.clamp_min(self.options.free_bits * self.options.latent).mean()
        return {"loss": error + self.options.beta * charged, "error": error, "kl": divergence.mean()}


def divergence_from_prior(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL divergence of Gaussians from the standard normal, in nats: [B, latent], [B, latent] -> [B]."""
    return (mean.square() + logvar.exp() - 1 - logvar).sum(1) / 2
