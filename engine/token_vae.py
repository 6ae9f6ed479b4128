"""A VAE on the tokens of a frame, whose networks a world model trains, and an encoder runs later: [..., N, D] <-> latents [..., Z]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmcache.common.schema import Size
from wmcache.engine.mlp import make_mlp


@dataclass(frozen=True)
class VaeSizes:
    """Tokens in a frame, channels of each, latents, and the hidden units and layers of each network."""

    tokens: Size
    channels: Size
    latents: Size
    hidden: Size
    layers: Size

    @property
    def values(self) -> int:
        """Values of a frame."""
        return self.tokens * self.channels

    def make_encoder(self) -> nn.Sequential:
        """Return the network from standardised frames [..., values] to what `moments` takes."""
        return make_mlp(self.values, self.hidden, self.layers, 2 * self.latents)

    def make_decoder(self) -> nn.Sequential:
        """Return the network from latents to standardised frames [..., values]."""
        return make_mlp(self.latents, self.hidden, self.layers, self.values)


def moments(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and logarithm of the variance of latents, [..., Z] each, of an encoder's outputs."""
    mean, logvar = outputs.float().chunk(2, -1)
    return mean, logvar


def divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """Compute the KL divergence of Gaussians [..., Z] from the standard normal, in nats, [...]."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(-1)


def softmax_divergence(target: Tensor, other: Tensor) -> Tensor:
    """Compute KL(softmax(target) || softmax(other)) of latents [..., Z], in nats, [...].

    An offset of all latents does not change it: only their differences within a frame are compared.
    """
    shares = F.log_softmax(other, -1)
    return F.kl_div(shares, F.log_softmax(target, -1), reduction="none", log_target=True).sum(-1)


class Scaled(nn.Module):
    """A network on standardised frames, with the mean and the deviation of each channel, [D], in the store's units."""

    centre: Tensor
    scale: Tensor

    def __init__(self, sizes: VaeSizes, network: nn.Module) -> None:
        """Begin with mean 0 and deviation 1."""
        super().__init__()
        self.sizes, self.network = sizes, network
        self.register_buffer("centre", torch.zeros(sizes.channels))
        self.register_buffer("scale", torch.ones(sizes.channels))

    def set_units(self, mean: Tensor, std: Tensor) -> None:
        """Set mean and deviation of the channels."""
        self.centre.copy_(mean)
        self.scale.copy_(std)


class MeanEncoder(Scaled):
    """Tokens [..., N, D] in the store's units -> mean of their latents [..., Z]."""

    def __init__(self, sizes: VaeSizes) -> None:
        """Build the network."""
        super().__init__(sizes, sizes.make_encoder())

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        mean, _ = moments(self.network(((tokens.float() - self.centre) / self.scale).flatten(-2)))
        return mean


class TokenDecoder(Scaled):
    """Latents [..., Z] -> tokens [..., N, D] in the store's units."""

    def __init__(self, sizes: VaeSizes) -> None:
        """Build the network."""
        super().__init__(sizes, sizes.make_decoder())

    def forward(self, latents: Tensor) -> Tensor:
        """See the class."""
        frames: Tensor = self.network(latents).unflatten(-1, (self.sizes.tokens, self.sizes.channels))
        return frames * self.scale + self.centre
