"""What world models that remember every frame share: frames as vectors, and imagining step by step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from einops import rearrange
from torch import Tensor

from wmcache.cache.log_variances import open_log_variances
from wmcache.cache.store import TokenStore
from wmcache.cache.windows import Windows
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


@dataclass(frozen=True)
class SequenceOptions(RecurrentOptions):
    """Options of those that are trained on sequences."""

    sequence: Annotated[int, Ge(2), Le(1024)] = option(16, "Frames of a training sequence.")
    sequences: Literal["windows", "episodes"] = option(
        "windows", "Train on windows from any frame on, or on whole episodes, cut into pieces of --sequence frames."
    )
    latents: Literal["mean", "drawn"] = option(
        "mean", "Train on cached tokens, or draw latents for each batch; the store then needs log-variances."
    )


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


class SequenceModel(RecurrentModel):
    """A recurrent model that is trained on sequences, of cached tokens or of latents that are drawn for each batch.

    Latents that are drawn are not standardised: a prior keeps these near the standard normal.
    """

    options: SequenceOptions

    def __init__(self, shape: DataShape, options: SequenceOptions, statistics: Mapping[str, Tensor]) -> None:
        """Build the model, see `WorldModel`; raises UserError for a frame of too many values."""
        super().__init__(shape, options, statistics)
        if options.latents == "drawn":
            # The deviation of the means is near 0 for a channel that is mostly noise.
            self.tokens_mean, self.tokens_std = torch.zeros_like(self.tokens_mean), torch.ones_like(self.tokens_std)

    @classmethod
    def window(cls, options: SequenceOptions, history: int) -> int:  # noqa: ARG003
        """See `WorldModel.window`: a sequence, whatever the history."""
        return options.sequence

    @classmethod
    def whole_episodes(cls, options: SequenceOptions) -> bool:
        """See `WorldModel.whole_episodes`."""
        return options.sequences == "episodes"

    @classmethod
    def extras(cls, store: TokenStore, windows: Windows, options: SequenceOptions) -> dict[str, TokenStore]:  # noqa: ARG003
        """See `WorldModel.extras`: log-variances, to draw latents."""
        return {"logvar": open_log_variances(store)} if options.latents == "drawn" else {}

    def _latents(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the latents of a batch, drawn from their Gaussians while training where it has log-variances, [B, T, N, D]."""
        tokens = batch["tokens"].float()
        if not self.training or "logvar" not in batch:
            return tokens
        return tokens + (batch["logvar"].float() / 2).exp() * torch.randn_like(tokens)


def weight_of_steps(batch: Mapping[str, Tensor]) -> Tensor | None:
    """Return the weights of the steps after frames [B, T]: 0 where nothing follows in the window and no end is known; None: all 1.

    The last frame of an episode may have no step: what its row has as reward and end is no measurement.
    """
    if (weight := batch.get("weight")) is None:
        return None
    follows = F.pad(weight[:, 1:], (0, 1)) > 0
    return weight * (follows | batch["terminated"] if "terminated" in batch else follows)


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
