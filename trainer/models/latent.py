"""What the world models on patch tokens share: how tokens, proprio and actions enter them, in which units, and what an error weighs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from wmcache.cache.schema import Size
from wmcache.trainer.models.base import DataShape

SizeOrNone = Annotated[int, Field(ge=0, le=2**16)]
Share = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class LatentOptions:
    """What every such model can be told.

    Attributes:
        proprio: `raw` predicts standardised proprio; `embedding` its learned code, as DINO-WM; `none` neither sees nor predicts any.
        predict: `change` from the frame before, or the next `frame` itself, as DINO-WM.
        standardise: tokens per channel; DINO-WM takes them as they come.
        embedding: dimensions of the action and of the proprio embedding.
    """

    proprio: Literal["raw", "embedding", "none"] = "raw"
    predict: Literal["change", "frame"] = "change"
    standardise: bool = True
    embedding: Size = 10


class LatentModel(nn.Module):
    """The ways in and out. Frames go through as tokens [B, T, N, D] and a code [B, T, M, Q] of the proprio, both standardised; M is 1 where
    all patches share the code, and N where each keeps a prediction of its own.

    Attributes:
        stages: what is trained one after another, each on what the one before has left; none where all is trained at once.
        code_dim: Q; 0 for a model that sees no proprio.
    """

    stages: tuple[str, ...] = ()

    def __init__(
        self,
        shape: DataShape,
        options: Any,
        statistics: Mapping[str, Tensor],
        *,
        embedding: int,
        action_embedding: int,
    ) -> None:
        """Args: `embedding` of proprio and `action_embedding`, dimensions of them; the others as for every model, see `DinoWm`."""
        super().__init__()
        self.shape, self.options = shape, options
        for name, value in statistics.items():
            kept = value.float().clamp_min(1e-6) if name.endswith("std") else value.float()
            if name.startswith("tokens") and not options.standardise:
                kept = torch.full_like(kept, float(name.endswith("std")))
            self.register_buffer(name, kept)
        self.code_dim = {"raw": shape.proprio_dim, "embedding": embedding, "none": 0}[options.proprio]
        self.embed_proprio = nn.Linear(shape.proprio_dim, embedding) if options.proprio != "none" else None
        self.embed_action = nn.Linear(shape.action_dim, action_embedding)

    def standardised(self, tokens: Tensor, proprio: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From the store's units to the model's; a model that takes tokens as they come has a mean of 0 and a deviation of 1 for them."""
        return (
            (tokens.float() - self.tokens_mean) / self.tokens_std,
            (proprio - self.proprio_mean) / self.proprio_std,
            (action - self.action_mean) / self.action_std,
        )

    def code(self, proprio: Tensor) -> Tensor:
        """Standardised proprio [B, T, P] -> its code [B, T, 1, Q]; Q is 0 for a model that sees none."""
        if self.embed_proprio is None:
            return proprio[:, :, None, :0]
        return (self.embed_proprio(proprio) if self.options.proprio == "embedding" else proprio)[:, :, None]

    def proprio_code(self, proprio: Tensor) -> Tensor:
        """See `WorldModel.proprio_code`."""
        return self.code((proprio - self.proprio_mean) / self.proprio_std)[:, :, 0].float()

    def embedded_code(self, code: Tensor) -> list[Tensor]:
        """What a code [B, T, M, Q] adds to the tokens, [B, T, M, embedding]; nothing for a model that sees none."""
        if self.embed_proprio is None:
            return []
        return [self.embed_proprio(code) if self.options.proprio == "raw" else code]

    def weighted(self, token_loss: Tensor, code_loss: Tensor | None, tokens_a_code: int = 1) -> dict[str, Tensor]:
        """Losses, in which each error weighs as its dimensions have it (DINO-WM): a code on every patch, or one for so many tokens."""
        if code_loss is None:
            return {"loss": token_loss, "tokens": token_loss.detach()}
        of_tokens, of_code = float(self.shape.token_dim * tokens_a_code), float(self.code_dim)
        share = of_code / (of_code + of_tokens)
        loss = (1 - share) * token_loss + share * code_loss
        return {"loss": loss, "tokens": token_loss.detach(), "proprio": code_loss.detach()}

    tokens_mean: Tensor
    tokens_std: Tensor
    proprio_mean: Tensor
    proprio_std: Tensor
    action_mean: Tensor
    action_std: Tensor


def append(tokens: Tensor, parts: list[Tensor]) -> Tensor:
    """Tokens [B, T, N, D], each with what its frame has beside them, parts [B, T, 1 or N, …]."""
    return torch.cat([tokens, *(part.expand(-1, -1, tokens.shape[2], -1) for part in parts)], -1)
