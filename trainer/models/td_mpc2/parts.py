"""Networks of TD-MPC2 (arXiv 2310.16828; tdmpc2/common/layers.py and world_model.py), and the losses of what acts on its latents."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from wmcache.trainer.actor_critic import ReturnRange
from wmcache.trainer.models.symlog import TwoHot, symexp, symlog

BINS, LOWEST, HIGHEST = 101, -10.0, 10.0
LOG_STDS = (-10.0, 2.0)
LARGEST_ACTION = math.sqrt(3)
"""In standard deviations of the data's actions: the bound of uniform ones."""
REWARD_WEIGHT, VALUE_WEIGHT, ENTROPY_WEIGHT = 0.1, 0.1, 1e-4
SLOW_RATE = 0.01
HALF_LOG_TAU = math.log(2 * math.pi) / 2


class SimNorm(nn.Module):
    """Simplicial normalisation: groups of a vector become probabilities."""

    def __init__(self, group: int) -> None:
        """Take the size of a group."""
        super().__init__()
        self.group = group

    def forward(self, values: Tensor) -> Tensor:
        """Normalise [..., groups * size]."""
        groups = values.float().reshape(*values.shape[:-1], -1, self.group)
        return groups.softmax(-1).flatten(-2)


def make_mlp(
    inputs: int,
    hidden: Sequence[int],
    outputs: int,
    *,
    norm: nn.Module | None = None,
    dropout: float = 0.0,
    zero: bool = False,
) -> nn.Sequential:
    """Return hidden layers with LayerNorm and Mish, and a linear one.

    Args:
        norm: applied to the outputs, after a LayerNorm.
        dropout: after the first linear layer.
        zero: the outputs are 0 at first.
    """
    layers: list[nn.Module] = []
    for number, units in enumerate(hidden):
        layers.append(nn.Linear(inputs, units))
        if dropout and not number:
            layers.append(nn.Dropout(dropout))
        layers += [nn.LayerNorm(units), nn.Mish()]
        inputs = units
    layers.append(nn.Linear(inputs, outputs))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    if zero:
        nn.init.zeros_(layers[-1].weight)  # type: ignore[arg-type]
    return nn.Sequential(*layers, *([] if norm is None else [nn.LayerNorm(outputs), norm]))


class SymlogTwoHot(TwoHot):
    """A two-hot distribution over `symlog` of values, whose mean is taken there too (tdmpc2/common/math.py)."""

    def __init__(self) -> None:
        """Take TD-MPC2's bins."""
        super().__init__(BINS, LOWEST, HIGHEST)
        self.values = torch.linspace(LOWEST, HIGHEST, BINS)

    def encode(self, target: Tensor) -> Tensor:
        """See `TwoHot.encode`."""
        return super().encode(symlog(target))

    def mean(self, logits: Tensor) -> Tensor:
        """See `TwoHot.mean`."""
        return symexp(super().mean(logits))


class Policy(nn.Module):
    """A Gaussian squashed by tanh, of standardised actions [..., f * A]."""

    def __init__(self, inputs: int, hidden: Sequence[int], actions: int) -> None:
        """Take sizes."""
        super().__init__()
        self.actions = actions
        self.network = make_mlp(inputs, hidden, 2 * actions)

    def forward(self, states: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the actions that noise [..., f * A] chooses, with gradients, and their negative log-density [...]."""
        mean, raw = self.network(states).float().chunk(2, -1)
        low, high = LOG_STDS
        log_std = low + (high - low) * (torch.tanh(raw) + 1) / 2
        squashed = torch.tanh(mean + log_std.exp() * noise)
        surprise = noise.square() / 2 + log_std + HALF_LOG_TAU + (F.relu(1 - squashed.square()) + 1e-6).log()
        return LARGEST_ACTION * squashed, surprise.sum(-1)


class Critics(nn.Module):
    """Several networks, each of which predicts the return after an action."""

    def __init__(self, count: int, inputs: int, hidden: Sequence[int], dropout: float) -> None:
        """Take their number and sizes."""
        super().__init__()
        members = (make_mlp(inputs, hidden, BINS, dropout=dropout, zero=True) for _ in range(count))
        self.members = nn.ModuleList(members)

    def forward(self, inputs: Tensor, chosen: Sequence[int] | None = None) -> Tensor:
        """Return logits of all, or of the chosen ones, [critics, ..., bins]."""
        numbers = range(len(self.members)) if chosen is None else chosen
        return torch.stack([self.members[number](inputs) for number in numbers])


class Agent(nn.Module):
    """Reward, values and policy. States [..., L] are latents, which a goal's latent may be joined to; actions are standardised."""

    def __init__(
        self,
        states: int,
        actions: int,
        hidden: Sequence[int],
        *,
        critics: int,
        dropout: float,
        discount: float,
        has_end: bool,
    ) -> None:
        """Take sizes; `has_end`: predict whether a step ends the episode."""
        super().__init__()
        self.discount = discount
        self.two_hot = SymlogTwoHot()
        self.reward = make_mlp(states + actions, hidden, BINS, zero=True)
        self.end = make_mlp(states + actions, hidden, 1) if has_end else None
        self.policy = Policy(states, hidden, actions)
        self.critics = Critics(critics, states + actions, hidden, dropout)
        self.slow = copy.deepcopy(self.critics).requires_grad_(False)
        self.range = ReturnRange()

    def train(self, mode: bool = True) -> Self:
        """Set the mode; the slow critics have no dropout."""
        super().train(mode)
        self.slow.eval()
        return self

    def losses(
        self,
        states: Tensor,
        actions: Tensor,
        following: Tensor,
        rewards: Tensor,
        ended: Tensor | None,
        weights: Tensor,
    ) -> dict[str, Tensor]:
        """Compute the losses of reward, values and policy (equations 3 and 4), and of the end.

        Args:
            states: [B, T, L], imagined one from another.
            actions: [B, S, f * A], with S <= T. following: [B, S, L], what frames show after them; no gradient.
            rewards: [B, S]. ended: [B, S]; None where no episode ends.
            weights: [T], of the steps.
        """
        steps, pair = rewards.shape[1], self._draw_pair()
        known = torch.cat([states[:, :steps], actions], -1)
        with torch.no_grad():
            going = self.discount if ended is None else self.discount * (1 - ended)
            target = rewards + going * self.values(following, self.slow, pair).amin(0)
        found = {
            "reward": REWARD_WEIGHT * self.two_hot.loss(self.reward(known), rewards),
            "value": VALUE_WEIGHT * self.two_hot.loss(self.critics(known), target).mean(0),
        }
        if self.end is not None and ended is not None:
            logits = self.end(known)[..., 0].float()
            found["end"] = F.binary_cross_entropy_with_logits(logits, ended, reduction="none")
        losses = {name: (each * weights[:steps]).mean() for name, each in found.items()}
        return {**losses, "policy": (self._policy_losses(states.detach(), pair) * weights).mean()}

    def _policy_losses(self, states: Tensor, pair: Sequence[int]) -> Tensor:
        """Return losses [B, T] whose gradients reach the policy alone."""
        actions, surprise = self.policy(states, self._draw_noise(states))
        frozen = {name: value.detach() for name, value in self.critics.named_parameters()}
        logits = functional_call(self.critics, frozen, (torch.cat([states, actions], -1), pair))
        values = self.two_hot.mean(logits).mean(0)
        # Its code multiplies the entropy by the number of action values.
        gain: Tensor = values / self.range(values[:, 0]) + ENTROPY_WEIGHT * self.policy.actions * surprise
        return -gain

    def values(self, states: Tensor, critics: Critics, chosen: Sequence[int] | None = None) -> Tensor:
        """Return the values of states, whose actions are the policy's, [critics, ...]: while training drawn ones."""
        actions, _ = self.policy(states, self._draw_noise(states))
        found: Tensor = self.two_hot.mean(critics(torch.cat([states, actions], -1), chosen))
        return found

    def value(self, states: Tensor, pessimism: float = 0.0) -> Tensor:
        """Return the mean value [...] over all critics, less so many of their standard deviations."""
        found = self.values(states, self.critics)
        return torch.mean(found, 0) - (pessimism * torch.std(found, 0) if pessimism else 0)

    def rewards(self, states: Tensor, actions: Tensor) -> Tensor:
        """Return predicted rewards [...]."""
        found: Tensor = self.two_hot.mean(self.reward(torch.cat([states, actions], -1)))
        return found

    def continues(self, states: Tensor, actions: Tensor) -> Tensor:
        """Return the discount of what follows a step, times the chance that the episode goes on, [...]."""
        if self.end is None:
            return states.new_full(states.shape[:-1], self.discount)
        logits = self.end(torch.cat([states, actions], -1))[..., 0]
        return self.discount * torch.sigmoid(-logits.float())

    @torch.no_grad()
    def follow(self) -> None:
        """Move the slow critics towards the critics."""
        for slow, fast in zip(self.slow.parameters(), self.critics.parameters(), strict=True):
            slow.lerp_(fast, SLOW_RATE)

    def _draw_noise(self, states: Tensor) -> Tensor:
        size = (*states.shape[:-1], self.policy.actions)
        return torch.randn(size, device=states.device) if self.training else states.new_zeros(size)

    def _draw_pair(self) -> list[int]:
        """Choose two critics, at random while training."""
        count = len(self.critics.members)
        return torch.randperm(count)[:2].tolist() if self.training else [0, 1]
