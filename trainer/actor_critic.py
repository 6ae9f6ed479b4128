"""Actor and critic of DreamerV3 (arXiv 2301.04104), on features of a world model's belief; with `dynamics` DreamerV2's gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from wmcache.common.schema import Size
from wmcache.engine.mlp import make_mlp
from wmcache.trainer.models.symlog import TwoHot
from wmcache.trainer.options import ActorOptions

LEAST_STD, MOST_STD = 0.1, 1.0
LOG_ROOT_TAU = math.log(2 * math.pi) / 2
UNIMIX = 0.01
"""Share of the uniform distribution in that of a discrete action."""
BINS = 255
SLOW_RATE, SLOW_WEIGHT = 0.02, 1.0
RANGE, RANGE_DECAY, LEAST_RANGE = (0.05, 0.95), 0.99, 1.0
"""Returns are divided by the distance of these quantiles, where that is above 1."""


@dataclass(frozen=True)
class ActorShape:
    """What an actor sees and does.

    Attributes:
        size: numbers of the inputs.
        low, high: bounds of env actions, A each. discrete: they are one-hot.
        frameskip: f, env actions of a model step.
    """

    size: Size
    low: Annotated[list[float], Field(min_length=1, max_length=2**16)]
    high: list[float]
    discrete: bool
    frameskip: Size

    @property
    def outputs(self) -> int:
        """Numbers that describe the distribution of a model step's actions."""
        return self.frameskip * len(self.low) * (1 if self.discrete else 2)


class Gaussian(NamedTuple):
    """A normal distribution of each action value, where env actions are in [-1, 1]; mean and std are [..., f * A]."""

    mean: Tensor
    std: Tensor

    def sample(self, generator: torch.Generator) -> Tensor:
        """Draw actions, with gradients to mean and std; they may be beyond the bounds."""
        noise = torch.randn(self.mean.shape, generator=generator).to(self.mean.device)
        return self.mean + self.std * noise

    @property
    def mode(self) -> Tensor:
        """The most probable actions."""
        return self.mean

    def log_prob(self, actions: Tensor) -> Tensor:
        """Compute the log-density [...]."""
        errors = (actions - self.mean) / self.std
        return -(errors.square() / 2 + self.std.log() + LOG_ROOT_TAU).sum(-1)

    def entropy(self) -> Tensor:
        """Compute the entropy [...]."""
        return (self.std.log() + LOG_ROOT_TAU + 0.5).sum(-1)


class OneHots(NamedTuple):
    """A categorical distribution of each of f env actions; log-probabilities [..., f, A]."""

    logs: Tensor

    def sample(self, generator: torch.Generator) -> Tensor:
        """Draw actions [..., f * A], with straight-through gradients."""
        uniform = torch.rand(self.logs.shape, generator=generator).to(self.logs.device)
        gumbel = -(-uniform.clamp_min(1e-20).log()).log()
        drawn, shares = _one_hot(self.logs + gumbel), self.logs.exp()
        return (drawn + shares - shares.detach()).flatten(-2)

    @property
    def mode(self) -> Tensor:
        """The most probable actions."""
        return _one_hot(self.logs).flatten(-2)

    def log_prob(self, actions: Tensor) -> Tensor:
        """Compute the log-probability [...]."""
        return (actions.view(self.logs.shape) * self.logs).sum((-2, -1))

    def entropy(self) -> Tensor:
        """Compute the entropy [...]."""
        return -(self.logs.exp() * self.logs).sum((-2, -1))


Actions = Gaussian | OneHots


class Actor(nn.Module):
    """A distribution of the f env actions of a model step."""

    low: Tensor
    high: Tensor

    def __init__(self, shape: ActorShape, units: int, layers: int) -> None:
        """Build the network."""
        super().__init__()
        self.shape = shape
        self.network = make_mlp(shape.size, units, layers, shape.outputs, scale=0.01)
        for name in ("low", "high"):
            bound = torch.tensor(getattr(shape, name)).repeat(shape.frameskip)
            self.register_buffer(name, bound, persistent=False)

    def forward(self, inputs: Tensor) -> Actions:
        """See the class; inputs are [..., size]."""
        outputs = self.network(inputs)
        if not self.shape.discrete:
            mean, std = outputs.chunk(2, -1)
            return Gaussian(torch.tanh(mean), LEAST_STD + (MOST_STD - LEAST_STD) * torch.sigmoid(std + 2))
        logits = outputs.unflatten(-1, (self.shape.frameskip, -1))
        return OneHots(((1 - UNIMIX) * logits.softmax(-1) + UNIMIX / logits.shape[-1]).log())

    @torch.no_grad()
    def act(self, inputs: Sequence[Tensor], generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Return the most probable actions [E, f * A] in env units, or draw them; inputs are [E, …] each.

        Args:
            generators: of each episode, so that its actions do not depend on the batch.
        """
        actions: Actions = self(torch.cat([*inputs], -1))
        if generators is None:
            return self.to_env(actions.mode)
        kind = type(actions)
        drawn = [kind(*(part[k : k + 1] for part in actions)).sample(one) for k, one in enumerate(generators)]
        return self.to_env(torch.cat(drawn))

    def random(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw actions [count, f * A] that depend on nothing, as `sample` gives them."""
        shape = self.shape
        uniform = torch.rand(count, shape.frameskip, len(shape.low), generator=generator).to(self.low.device)
        return (_one_hot(uniform) if shape.discrete else 2 * uniform - 1).flatten(-2)

    def to_env(self, actions: Tensor) -> Tensor:
        """Convert what was drawn, [..., f * A], to env units, clipped to the bounds."""
        if self.shape.discrete:
            return actions
        return self.low + (self.high - self.low) * (actions.clamp(-1, 1) + 1) / 2


class Trajectory(NamedTuple):
    """H imagined model steps of S episodes.

    Attributes:
        inputs: [H + 1, S, size], what the actor sees before each step, and after the last.
        actions: [H, S, f * A], as drawn.
        rewards, continues: [H, S], of each step.
    """

    inputs: Tensor
    actions: Tensor
    rewards: Tensor
    continues: Tensor


class ReturnRange(nn.Module):
    """The distance of two quantiles of returns, averaged over batches (DreamerV3, equation 7)."""

    ends: Tensor
    weight: Tensor

    def __init__(self) -> None:
        """Begin without any."""
        super().__init__()
        self.register_buffer("ends", torch.zeros(2))
        self.register_buffer("weight", torch.zeros(()))

    @torch.no_grad()
    def forward(self, returns: Tensor) -> Tensor:
        """Return what returns are divided by, a scalar; while training, include these returns first."""
        if self.training:
            found = torch.quantile(returns.detach().float().flatten(), torch.tensor(RANGE, device=returns.device))
            self.ends.lerp_(found, 1 - RANGE_DECAY)
            self.weight.lerp_(torch.ones_like(self.weight), 1 - RANGE_DECAY)
        low, high = self.ends / self.weight
        distance: Tensor = high - low
        return distance.clamp_min(LEAST_RANGE)


class ActorCritic(nn.Module):
    """An actor, its critic, and a copy of the critic that follows it slowly."""

    def __init__(self, shape: ActorShape, options: ActorOptions) -> None:
        """Build the networks."""
        super().__init__()
        self.options = options
        self.actor = Actor(shape, options.units, options.layers)
        self.critic = make_mlp(shape.size, options.units, options.layers, BINS, scale=0.0)
        self.slow = copy.deepcopy(self.critic).requires_grad_(False)
        self.bins, self.range = TwoHot(BINS), ReturnRange()

    @property
    def dynamics(self) -> bool:
        """Whether gradients reach the actor through the world model."""
        return self.options.gradient == "dynamics"

    def loss(self, seen: Trajectory) -> dict[str, Tensor]:
        """Compute the losses of actor and critic; gradients of each reach its own parameters alone."""
        options, inputs = self.options, seen.inputs.detach()
        discounts = (1 - 1 / options.discount_steps) * seen.continues
        logits = self.critic(inputs[:-1])
        if self.dynamics:
            # Gradients go through the values to the actions before them; the slow critic is frozen.
            values = self.bins.mean(self.slow(seen.inputs))
        else:
            with torch.no_grad():
                values = self.bins.mean(self.critic(inputs))
        returns = lambda_returns(seen.rewards, values, discounts, options.trace)
        weights = torch.cat([torch.ones_like(discounts[:1]), discounts[:-1]]).cumprod(0).detach()
        scale, distribution = self.range(returns), self.actor(inputs[:-1])
        if self.dynamics:
            gain = returns / scale
        else:
            advantages = (returns - values[:-1]).detach() / scale
            gain = advantages * distribution.log_prob(seen.actions.detach())
        entropy = distribution.entropy()
        actor = -(weights * (gain + options.entropy_weight * entropy)).mean()
        with torch.no_grad():
            slow = self.bins.mean(self.slow(inputs[:-1]))
        fits = self.bins.loss(logits, returns) + SLOW_WEIGHT * self.bins.loss(logits, slow)
        critic = (weights * fits).mean()
        parts = {"actor": actor, "critic": critic, "entropy": entropy.mean(), "return": returns[0].mean()}
        parts |= {"reward": seen.rewards.mean(), "range": scale}
        return {"loss": actor + critic, **{name: value.detach() for name, value in parts.items()}}

    @torch.no_grad()
    def follow(self) -> None:
        """Move the slow critic towards the critic."""
        for slow, fast in zip(self.slow.parameters(), self.critic.parameters(), strict=True):
            slow.lerp_(fast, SLOW_RATE)


def lambda_returns(rewards: Tensor, values: Tensor, discounts: Tensor, trace: float) -> Tensor:
    """Compute R_t = r_t + d_t ((1 - trace) v_(t+1) + trace R_(t+1)), and R_H = v_H; [H, S] (DreamerV3, equation 5).

    Args:
        rewards, discounts: [H, S], of each step. values: [H + 1, S], before each step and after the last.
    """
    following, found = values[-1], []
    for reward, value, discount in zip(
        rewards.flip(0).unbind(), values[1:].flip(0).unbind(), discounts.flip(0).unbind(), strict=True
    ):
        following = reward + discount * ((1 - trace) * value + trace * following)
        found.append(following)
    return torch.stack(found[::-1])


def _one_hot(scores: Tensor) -> Tensor:
    return F.one_hot(scores.argmax(-1), scores.shape[-1]).float()
