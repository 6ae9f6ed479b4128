"""What world models that remember every frame share: frames as vectors, and sequences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import Tensor

from wmcache.cache.log_variances import open_log_variances
from wmcache.cache.store import TokenStore
from wmcache.cache.windows import Windows
from wmcache.common.errors import UserError
from wmcache.common.options import Weight, option
from wmcache.trainer.models import DataShape
from wmcache.trainer.models.stepwise import StepwiseModel

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


class RecurrentModel(StepwiseModel):
    """A world model on frames as vectors of V = N * D values; inside, tokens, proprio and actions are standardised.

    A belief has `tokens` [E, V] and `proprio` [E, Q] of the newest frame, and the memory of all frames before it.
    """

    recurrent = True
    options: Any

    def __init__(
        self, shape: DataShape, options: Any, statistics: Mapping[str, Tensor], *, has_tokens: bool = True
    ) -> None:
        """Build the model, see `WorldModel`; raises UserError for a frame of too many values. V is 0 without tokens."""
        self.values = count_values(shape) if has_tokens else 0
        super().__init__(shape, options, statistics)
        self.temperature = options.temperature
        self.proprio_size = shape.proprio_dim if options.proprio == "raw" else 0

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


def count_values(shape: DataShape) -> int:
    """Return the values of a frame as a vector; raises UserError where they are too many."""
    if (values := shape.tokens * shape.token_dim) > LARGEST_FRAME:
        raise UserError(
            f"this model takes frames of at most {LARGEST_FRAME} values, not {shape.tokens} x {shape.token_dim}; "
            "make a store of fewer with wmcache derive"
        )
    return values


def weight_of_steps(batch: Mapping[str, Tensor]) -> Tensor | None:
    """Return the weights of the steps after frames [B, T]: 0 where nothing follows in the window and no end is known; None: all 1.

    The last frame of an episode may have no step: what its row has as reward and end is no measurement.
    """
    if (weight := batch.get("weight")) is None:
        return None
    follows = F.pad(weight[:, 1:], (0, 1)) > 0
    return weight * (follows | batch["terminated"] if "terminated" in batch else follows)
