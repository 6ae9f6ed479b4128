"""What world models that remember every frame share: frames as vectors, and imagining step by step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from wmcache.common.errors import UserError
from wmcache.common.options import Weight, option
from wmcache.trainer.models import Belief, DataShape, Generators, Imagined, WorldModel

LARGEST_FRAME = 4096
"""Values of a frame: a network on vectors has weights for each."""


@dataclass(frozen=True)
class RecurrentOptions:
    """Options of every such model."""

    proprio: Literal["raw", "none"] = option("raw", "Predict raw proprio, or use pixels alone.", group="Model")
    temperature: Weight = option(0.0, "Temperature of what is drawn in plans; 0: nothing is drawn.")


class RecurrentModel(WorldModel):
    """A world model on frames as vectors of V = N * D values; inside, tokens, proprio and actions are standardised.

    A belief has `tokens` [E, V] and `proprio` [E, Q] of the newest frame, and the memory of all frames before it.
    """

    recurrent = True
    draws = True
    options: Any

    def __init__(
        self, shape: DataShape, options: Any, statistics: Mapping[str, Tensor], *, has_tokens: bool = True
    ) -> None:
        """Build the model, see `WorldModel`; raises UserError for a frame of too many values. V is 0 without tokens."""
        self.values = shape.tokens * shape.token_dim if has_tokens else 0
        if self.values > LARGEST_FRAME:
            raise UserError(
                f"this model takes frames of at most {LARGEST_FRAME} values, not {shape.tokens} x {shape.token_dim}; "
                "make a store of fewer with wmcache derive"
            )
        super().__init__(shape, options, statistics)
        self.temperature = options.temperature
        self.proprio_size = shape.proprio_dim if options.proprio == "raw" else 0

    def encode_proprio(self, proprio: Tensor) -> Tensor:
        """See `WorldModel.encode_proprio`."""
        return ((proprio - self.proprio_mean) / self.proprio_std)[..., : self.proprio_size]

    def imagine(self, belief: Belief, actions: Tensor, generators: Sequence[torch.Generator] | None = None) -> Imagined:
        """See `WorldModel.imagine`. Frames are drawn where the temperature is above 0."""
        samples, frames = actions.shape[1], []
        belief = {name: value.repeat_interleave(samples, 0) for name, value in belief.items()}
        for action in actions.flatten(0, 1).unbind(1):
            belief, frame = self._advance(belief, action, generators, samples)
            frames.append(frame)
        return self._describe(frames, samples)

    def step(self, belief: Belief, action: Tensor, generators: Generators | None = None) -> tuple[Belief, Imagined]:
        """See `Dreams.step`."""
        belief, frame = self._advance(belief, action, generators, 1)
        return belief, self._describe([frame], 1)

    @abstractmethod
    def features(self, belief: Belief) -> dict[str, Tensor]:
        """See `Dreams.features`."""

    @abstractmethod
    def _advance(
        self, belief: Belief, action: Tensor, generators: Generators | None, samples: int
    ) -> tuple[Belief, dict[str, Tensor]]:
        """Imagine a frame of S futures of E episodes.

        Returns:
            The belief after it, and the frame: tokens, proprio, and where the model has such heads reward and the logits of the end,
            [E * S, …] each.
        """

    def _describe(self, frames: Sequence[Mapping[str, Tensor]], samples: int) -> Imagined:
        """Convert T frames of `_advance` to the store's units."""
        stacked = {name: torch.stack([frame[name] for frame in frames], 1) for name in frames[0]}
        every = {name: rearrange(value, "(e s) ... -> e s ...", s=samples) for name, value in stacked.items()}
        latents = rearrange(every["tokens"], "e s t (n d) -> e s t n d", n=self.shape.tokens)
        if self.values:
            latents = latents * self.tokens_std + self.tokens_mean
        reward = every["reward"][..., 0] if "reward" in every else None
        continues = torch.sigmoid(-every["end"][..., 0]) if "end" in every else None
        return Imagined(latents, every["proprio"], reward, continues)

    def _standardise(self, action: Tensor) -> Tensor:
        return (action - self.action_mean) / self.action_std

    def _flatten(self, tokens: Tensor) -> Tensor:
        """Standardise tokens [..., N, D] of the store, [..., V]."""
        return ((tokens.float() - self.tokens_mean) / self.tokens_std).flatten(-2)[..., : self.values]


def draw_noise(
    draw: Callable[..., Tensor], size: tuple[int, ...], generators: Generators, like: Tensor, samples: int
) -> Tensor:
    """Draw noise of a size for S futures of each episode, [E * S, *size]; those of one episode see the same noise.

    Args:
        draw: such as `torch.randn`.
        like: [E * S, …], on the device of the result.
    """
    if isinstance(generators, torch.Generator):
        noise = draw((len(like) // samples, *size), generator=generators, device=generators.device)
    else:
        noise = torch.stack([draw(size, generator=one) for one in generators])
    return noise.to(like.device).repeat_interleave(samples, 0)
