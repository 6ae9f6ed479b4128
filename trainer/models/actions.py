"""Policies that learn from the cache: from a frame and a goal frame to the actions between them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from wmcache.cache.windows import Windows, goal_draws
from wmcache.common.device import autocast
from wmcache.common.options import ShareBelowOne, option
from wmcache.common.schema import Size
from wmcache.trainer.models.trainable import DataShape, Trainable

VALIDATION_WINDOWS, BATCH = 2048, 256
INPUTS = 2048
"""Most numbers of a frame that the network sees: the channels of larger frames are projected, the same way for each token."""


class ActionModel(Trainable):
    """A policy: one forward pass gives the env actions of a model step.

    Attributes:
        ahead: how many subgoals ahead, each about one model step after the one before, the frame is that it steers to.
    """

    ahead: int = 1

    @classmethod
    def window(cls, options: Any, history: int) -> int:  # noqa: ARG003
        """See `Trainable.window`: a single frame, beside the goal's."""
        return 1

    @abstractmethod
    def act(self, tokens: Tensor, proprio: Tensor, goal: Tensor) -> Tensor:
        """Return the actions of the next model step.

        Args:
            tokens: [E, N, D], of the newest frame. proprio: [E, P]. goal: [E, N, D], of the frame to go to.

        Returns:
            [E, f * A], in env units; not clipped to the env's bounds.
        """


@dataclass(frozen=True)
class ActionOptions:
    """Options of every such policy."""

    proprio: Literal["raw", "none"] = option("raw", "See proprio, or pixels alone.", group="Model")
    width: Size = option(512, "Hidden units of each layer.")
    depth: Size = option(3, "Hidden layers.")
    dropout: ShareBelowOne = option(0.0, "Dropout after each hidden layer.")


class GoalReacher(ActionModel):
    """An MLP of a frame, its proprio, a goal frame and what `describe` adds; trained with the MSE of standardised actions."""

    options: ActionOptions

    def __init__(self, shape: DataShape, options: ActionOptions, statistics: Mapping[str, Tensor], more: int) -> None:
        """Build the network, with `more` inputs that `describe` gives; see `Trainable` for the other arguments."""
        super().__init__(shape, options, statistics)
        channels = max(1, INPUTS // shape.tokens)
        self.project = nn.Linear(shape.token_dim, channels) if channels < shape.token_dim else None
        sizes = [2 * shape.tokens * min(channels, shape.token_dim) + more]
        sizes[0] += 0 if self.blind else shape.proprio_dim
        layers: list[nn.Module] = []
        for _ in range(options.depth):
            layers += [nn.Linear(sizes[-1], options.width), nn.GELU(), nn.Dropout(options.dropout)]
            sizes.append(options.width)
        self.network = nn.Sequential(*layers, nn.Linear(options.width, shape.action_dim))

    @property
    def blind(self) -> bool:
        """See `Trainable.blind`."""
        return self.options.proprio == "none" or not self.shape.proprio_dim

    def forward(self, tokens: Tensor, proprio: Tensor, goal: Tensor, more: Tensor | None = None) -> Tensor:
        """Return standardised actions [B, f * A]; arguments as for `act`, and [B, more]."""
        frames = (torch.stack([tokens.float(), goal.float()], 1) - self.tokens_mean) / self.tokens_std
        seen = [(frames if self.project is None else self.project(frames)).flatten(1)]
        if not self.blind:
            seen.append((proprio - self.proprio_mean) / self.proprio_std)
        actions: Tensor = self.network(torch.cat([*seen, *([] if more is None else [more])], 1))
        return actions

    def describe(self, steps: Tensor) -> Tensor | None:  # noqa: ARG002
        """Return what the network sees of the number of model steps to the goal, [B] -> [B, more]; None, the default, for nothing."""
        return None

    def loss(self, batch: Mapping[str, Tensor], pool: int = 1) -> dict[str, Tensor]:  # noqa: ARG002
        """See `Trainable.loss`."""
        more = self.describe(batch["goal_steps"])
        predicted = self(batch["tokens"][:, -1], batch["proprio"][:, -1], batch["goal_tokens"], more)
        wanted = (batch["action"][:, -1] - self.action_mean) / self.action_std
        return {"loss": (predicted.float() - wanted).square().mean()}

    def decide(self, tokens: Tensor, proprio: Tensor, goal: Tensor, steps: int) -> Tensor:
        """Return the actions [E, f * A] for a goal so many model steps away."""
        more = self.describe(torch.full((len(tokens),), steps, device=tokens.device))
        actions: Tensor = self(tokens, proprio, goal, more).float() * self.action_std + self.action_mean
        return actions

    @torch.inference_mode()
    def validate(self, windows: Windows, device: torch.device, dtype: torch.dtype) -> dict[str, float | None]:
        """Return `explained`: 1 - MSE / variance of the held-out actions. Random actions cannot all be known from their result."""
        self.eval()
        chosen = np.random.default_rng(0).permutation(len(windows))[:VALIDATION_WINDOWS]
        draws, losses = goal_draws(0, 0, len(chosen)), []
        for first in range(0, len(chosen), BATCH):
            part = slice(first, first + BATCH)
            data = windows.batch(chosen[part], draws=draws[part])
            with autocast(device, dtype):
                loss = self.loss({name: torch.from_numpy(value).to(device) for name, value in data.items()})["loss"]
            losses.append(float(loss) * len(chosen[part]))
        return {"explained": 1 - sum(losses) / len(chosen)}
