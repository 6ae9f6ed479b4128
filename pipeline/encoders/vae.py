"""Variational autoencoders, fitted on the dataset's own frames: the V of World Models (arXiv 1803.10122) and DisWM's (arXiv 2503.08751).

Both make one token of a frame, the mean of its latents; only what encodes is kept. The networks and losses are the papers', of which
DisWM's is the part that concerns single frames: it also predicts videos through its latents, which is a world model's part here. Both
papers use Adam at a constant rate (1e-4, 3e-4); here it is AdamW with one cycle, as for all that is fitted (`pipeline/fit.py`).
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
from wmcache.pipeline.encoders.base import LAST, Backbone, EncoderSpec, Loaded, Select
from wmcache.pipeline.encoders.fitting import FitData, FitOptions, Fitting
from wmcache.pipeline.encoders.registry import register, register_fit
from wmcache.pipeline.encoders.weights import load_fitted, not_fitted, read_header, read_json_part

SPEC = EncoderSpec(
    name="vae",
    summary="World Models' variational autoencoder, trained on the dataset's own frames (wmcache fit)",
    image_size=64,
    patch=64,
    token_dim=32,
    normalisation="half",
    layer="mean",
    token_selection="patch",
    source="wmcache fit --encoder vae",
    licence="yours",
    dtype="float32",
)
BETA_SPEC = replace(
    SPEC,
    name="beta-vae",
    summary="DisWM's beta-VAE, trained on the dataset's own frames (wmcache fit)",
    token_dim=20,
    source="wmcache fit --encoder beta-vae",
)

SIDE = 64
BACKGROUND_FRAMES = 1000


@dataclass(frozen=True)
class VaeOptions(FitOptions):
    """How World Models' is trained.

    Without `foreground`, the default steps do not get beyond the mean frame on the U-maze: its squared error is 3.0 a frame, the one after
    400 steps was 3.7, and with `foreground` 1.5.
    """

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
    """Convolutions to one place, then two linear maps.

    Attributes:
        background, contrast: [3, 64, 64] and a scalar, what is subtracted from an image and what the rest is divided by.
    """

    def __init__(self, name: str, latent: int) -> None:
        """Args: `name` of the encoder, `latent` the size of what it gives."""
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
        """What `see` gives -> mean and logarithm of the variance of the latents, each float32 [B, latent]."""
        features = self.convolutions(images)
        return self.mean(features).float(), self.logvar(features).float()

    def see(self, images: Tensor) -> Tensor:
        """Images [B, 3, 64, 64] in [-1, 1] as the network takes them: in the paper's range, or what differs from the mean frame."""
        return (images / 2 + 0.5 - self.background) / self.contrast

    def look_at(self, images: Tensor) -> None:
        """Learn what never moves from images [n, 3, 64, 64] in [-1, 1]: without it a ball of a few pixels is all that is left."""
        self.background.copy_(images.mean(0) / 2 + 0.5)
        self.contrast.copy_((images / 2 + 0.5 - self.background).std())

    background: Tensor
    contrast: Tensor


def make_decoder(name: str, latent: int) -> nn.Sequential:
    """Latents [B, latent] -> what `VaeEncoder.see` gives, [B, 3, 64, 64], before any sigmoid."""
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
    return nn.Sequential(*layers[:-1])


class VaeBackbone(Backbone):
    """The mean of the latents."""

    def __init__(self, encoder: VaeEncoder) -> None:
        """Args: `encoder` with its weights."""
        super().__init__()
        self.encoder = encoder
        self.dims = {LAST: encoder.mean.out_features}
        self.described = {LAST: "mean"}
        self.grid = (1, 1)

    def forward(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """See `Backbone.forward`."""
        mean, _ = self.encoder(self.encoder.see(images))
        return dict.fromkeys(layers, mean[:, None])


@register(SPEC)
@register(BETA_SPEC)
def load(spec: EncoderSpec, image_size: int, weights: Path | None) -> Loaded:
    """The encoding part with fitted weights.

    Raises:
        UserError: no file, one that does not fit, or another image size.
    """
    if image_size != SIDE:
        raise UserError(
            f"--image-size {image_size} does not fit encoder {spec.name}; it sees {SIDE} px, leave that out"
        )
    if weights is None:
        raise not_fitted(spec.name, spec.name)
    header = read_header(weights, spec.name)
    kind = VaeOptions if spec.name == SPEC.name else BetaVaeOptions
    options = parse(kind, read_json_part(header, "options", weights), f"--weights {weights}", "fit it again")
    encoder = VaeEncoder(spec.name, options.latent)
    load_fitted(encoder, weights, spec.name)
    backbone = VaeBackbone(encoder)
    return Loaded(backbone, Select(backbone, spec.token_selection), "file")


class VaeFitting(Fitting):
    """Frames drawn again from a sample of their latents."""

    kept: VaeEncoder

    def __init__(self, name: str, data: FitData, options: VaeOptions) -> None:
        """Args: `name` of the encoder; for the others see `Fitting`.

        Raises:
            UserError: an option is out of its range.
        """
        super().__init__()
        if options.latent < 1 or options.beta < 0 or options.free_bits < 0:
            raise UserError(f"the fit of {name} needs --latent above 0, and --beta and --free-bits not below it")
        self.name, self.data, self.options = name, data, options
        self.kept = VaeEncoder(name, options.latent)
        self.decoder = make_decoder(name, options.latent)
        if name == SPEC.name and not options.foreground:
            self.decoder.append(nn.Sigmoid())
        if options.foreground:
            rng = np.random.default_rng(options.seed)
            some = rng.choice(len(data), min(len(data), BACKGROUND_FRAMES), replace=False)
            self.kept.to(data.device).look_at(data.pixels(np.sort(some)))

    def rows(self, rng: np.random.Generator) -> NDArray[np.integer]:
        """Any frames."""
        return rng.integers(len(self.data), size=self.options.batch)

    def loss(self, rows: NDArray[np.integer]) -> dict[str, Tensor]:
        """The papers' losses: the mean over the batch of sums over a frame's pixels and latents."""
        seen = self.kept.see(self.data.pixels(rows))
        mean, logvar = self.kept(seen)
        drawn = self.decoder(mean + (logvar / 2).exp() * torch.randn_like(mean)).float()
        # World Models has the squared error itself, DisWM the likelihood under a Gaussian of variance 1.
        # Both in units of pixels, so that beta weighs the same with the foreground alone.
        weight = (1.0 if self.name == SPEC.name else 0.5) * self.kept.contrast.square()
        error = weight * (drawn - seen).square().sum((1, 2, 3)).mean()
        divergence = divergence_from_prior(mean, logvar)
        charged = divergence.clamp_min(self.options.free_bits * self.options.latent).mean()
        return {"loss": error + self.options.beta * charged, "error": error, "kl": divergence.mean()}


@register_fit(SPEC.name, VaeOptions)
def make_vae(data: FitData, options: VaeOptions) -> VaeFitting:
    """World Models' V."""
    return VaeFitting(SPEC.name, data, options)


@register_fit(BETA_SPEC.name, BetaVaeOptions)
def make_beta_vae(data: FitData, options: BetaVaeOptions) -> VaeFitting:
    """DisWM's."""
    return VaeFitting(BETA_SPEC.name, data, options)


def divergence_from_prior(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL divergence of Gaussians from the standard one, in nats: [B, latent], [B, latent] -> [B]."""
    return (mean.square() + logvar.exp() - 1 - logvar).sum(1) / 2
