"""Parts of a recurrent state-space model: its memory, and its stochastic latents (arXiv 2301.04104 and 2010.02193)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmcache.engine.mlp import RmsNorm, make_mlp

UNIMIX = 0.01
LEAST_STD = 0.1


class Latent(Protocol):
    """A family of distributions over values [..., size], given by parameters [..., parameters].

    Attributes:
        variables: numbers of the noise of a value.
        draw: draws noise of a size, such as `torch.randn`.
    """

    variables: int
    parameters: int
    size: int
    draw: Callable[..., Tensor]

    def mode(self, parameters: Tensor) -> Tensor:
        """Return the most probable value."""

    def sample(self, parameters: Tensor, noise: Tensor, temperature: float = 1.0) -> Tensor:
        """Return the value that noise [..., variables] chooses, with gradients to the parameters."""

    def divergence(self, parameters: Tensor, other: Tensor) -> Tensor:
        """Compute KL(parameters || other) in nats, [...]."""


class Gaussians:
    """Independent Gaussians; the parameters are means, and what their standard deviations are of: 2 sigmoid(x / 2) + 0.1 (DreamerV2)."""

    def __init__(self, variables: int) -> None:
        """Take the number of Gaussians."""
        self.variables, self.parameters, self.size = variables, 2 * variables, variables
        self.draw: Callable[..., Tensor] = torch.randn

    def moments(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, [..., size] each."""
        mean, raw = parameters.float().chunk(2, -1)
        return mean, 2 * torch.sigmoid(raw / 2) + LEAST_STD

    def mode(self, parameters: Tensor) -> Tensor:
        """See `Latent.mode`."""
        return self.moments(parameters)[0]

    def sample(self, parameters: Tensor, noise: Tensor, temperature: float = 1.0) -> Tensor:
        """See `Latent.sample`."""
        mean, std = self.moments(parameters)
        return mean + math.sqrt(temperature) * std * noise

    def divergence(self, parameters: Tensor, other: Tensor) -> Tensor:
        """See `Latent.divergence`."""
        (mean, std), (other_mean, other_std) = self.moments(parameters), self.moments(other)
        ratio = (std / other_std).square()
        return 0.5 * (ratio + ((mean - other_mean) / other_std).square() - 1 - ratio.log()).sum(-1)


class Categoricals:
    """Independent categorical variables as one-hot vectors, with straight-through gradients; 1 % of each is uniform (DreamerV3)."""

    def __init__(self, variables: int, classes: int) -> None:
        """Take their number, and that of the classes of each."""
        self.variables, self.classes = variables, classes
        self.parameters = self.size = variables * classes
        self.draw: Callable[..., Tensor] = torch.rand

    def probabilities(self, parameters: Tensor) -> Tensor:
        """Return the probability of each class, [..., variables, classes]."""
        shares = parameters.float().reshape(*parameters.shape[:-1], self.variables, self.classes).softmax(-1)
        return (1 - UNIMIX) * shares + UNIMIX / self.classes

    def mode(self, parameters: Tensor) -> Tensor:
        """See `Latent.mode`."""
        shares = self.probabilities(parameters)
        return self._one_hot(shares.argmax(-1), shares)

    def sample(self, parameters: Tensor, noise: Tensor, temperature: float = 1.0) -> Tensor:
        """See `Latent.sample`."""
        shares = self.probabilities(parameters)
        if temperature != 1:
            shares = (shares.log() / temperature).softmax(-1)
        chosen = (shares.cumsum(-1)[..., :-1] <= noise[..., None]).sum(-1)
        return self._one_hot(chosen, shares)

    def divergence(self, parameters: Tensor, other: Tensor) -> Tensor:
        """See `Latent.divergence`."""
        shares = self.probabilities(parameters)
        return (shares * (shares.log() - self.probabilities(other).log())).sum((-2, -1))

    def _one_hot(self, chosen: Tensor, shares: Tensor) -> Tensor:
        value = F.one_hot(chosen, self.classes).to(shares.dtype)
        return (value + (shares - shares.detach())).flatten(-2)


class BlockLinear(nn.Module):
    """A linear layer of its own for each block, [..., blocks, inputs] -> [..., blocks, outputs]."""

    def __init__(self, blocks: int, inputs: int, outputs: int) -> None:
        """Take sizes; weights begin as those of `nn.Linear`."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, inputs, outputs))
        self.bias = nn.Parameter(torch.empty(blocks, outputs))
        for parameter in (self.weight, self.bias):
            nn.init.uniform_(parameter, -(inputs**-0.5), inputs**-0.5)

    def forward(self, values: Tensor) -> Tensor:
        """Apply the layers."""
        return torch.einsum("...gi,gio->...go", values, self.weight) + self.bias


class BlockGru(nn.Module):
    """The memory of DreamerV3: a GRU in blocks, each of which sees its own units, and a projection of all units and of the inputs."""

    def __init__(self, units: int, inputs: tuple[int, ...], hidden: int, blocks: int) -> None:
        """Take sizes; each of the inputs is projected to `hidden` numbers."""
        super().__init__()
        self.blocks, own = blocks, units // blocks
        self.project = nn.ModuleList([make_mlp(size, hidden, 1) for size in (units, *inputs)])
        self.mix = BlockLinear(blocks, own + hidden * len(self.project), own)
        self.norm = RmsNorm(units)
        self.gates = BlockLinear(blocks, own, 3 * own)

    def forward(self, memory: Tensor, *inputs: Tensor) -> Tensor:
        """Return the memory [..., units] after inputs [..., size] each."""
        seen = torch.cat([layer(value) for layer, value in zip(self.project, (memory, *inputs), strict=True)], -1)
        seen = seen[..., None, :].expand(*seen.shape[:-1], self.blocks, -1)
        mixed = self.mix(torch.cat([self._cut(memory), seen], -1)).flatten(-2)
        gates = self.gates(self._cut(F.silu(self.norm(mixed)))).float()
        reset, value, update = (part.flatten(-2) for part in gates.chunk(3, -1))
        value = torch.tanh(torch.sigmoid(reset) * value)
        update = torch.sigmoid(update - 1)  # keeps at first
        return update * value + (1 - update) * memory

    def _cut(self, values: Tensor) -> Tensor:
        return values.reshape(*values.shape[:-1], self.blocks, -1)
