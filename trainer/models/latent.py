"""What the world models on patch tokens share: how tokens, proprio and actions enter them, in which units, and what an error weighs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from wmcache.common.errors import UserError
from wmcache.common.options import ShareBelowOne, option
from wmcache.common.schema import Size
from wmcache.trainer.models.base import DataShape

SizeOrNone = Annotated[int, Field(ge=0, le=2**16)]

LEAST_DEVIATION = 1e-6
"""Of a channel that never changes."""


@dataclass(frozen=True)
class LatentOptions:
    """Options of every such model."""

    proprio: Literal["raw", "embedding", "none"] = option(
        "raw", "Predict raw proprio, predict a learned embedding of it (DINO-WM), or use pixels alone.", group="Model"
    )
    predict: Literal["change", "frame"] = option("change", "Predict the change, or the next frame (DINO-WM).")
    standardise: bool = option(
        True,
        "Standardise each channel of the tokens, or take them as they are (DINO-WM).",
        flag="--standardise/--as-stored",
    )
    embedding: Size = option(10, "Dimensions of the action and proprio embeddings.")
    width: SizeOrNone = option(384, "Width of the transformer; 0: that of the tokens, without projections (DINO-WM).")
    depth: Size = option(6, "Transformer blocks.")
    heads: Size = option(6, "Attention heads.")
    head_dim: SizeOrNone = option(0, "Dimensions of each attention head; 0: width / heads.")
    mlp: SizeOrNone = option(0, "Hidden units of each MLP; 0: 4 x width.")
    dropout: ShareBelowOne = option(0.1, "Dropout in attention, projections and MLP.")

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        if self.width and not self.head_dim and self.width % self.heads:
            raise UserError(f"--width {self.width} is not a multiple of --heads {self.heads}; or give --head-dim")
        if not self.width and not self.head_dim:
            raise UserError("--width 0 leaves the heads without a size; give --head-dim (DINO-WM has 64)")
        if not self.width and self.proprio == "raw":
            raise UserError("--width 0 has no head for raw proprio; choose --proprio embedding or none, or a --width")


class LatentModel(nn.Module):
    """The ways in and out. Frames go through as tokens [B, T, N, D] and a code [B, T, M, Q] of the proprio, both standardised; M is 1 where
    all patches share the code, and N where each keeps a prediction of its own.

    Attributes:
        stages: what is trained one after another, each on what the one before has left; none where all is trained at once.
        pools: whether it can be trained on a coarser grid of tokens first.
        code_dim: Q; 0 for a model that sees no proprio.
    """

    stages: tuple[str, ...] = ()
    pools: bool = True

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
            kept = value.float().clamp_min(LEAST_DEVIATION) if name.endswith("std") else value.float()
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

    def rollout(
        self, tokens: Tensor, proprio: Tensor, actions: Tensor, context: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `WorldModel.rollout`."""
        many = actions.ndim == 4
        samples = actions.shape[1] if many else 1
        futures = actions.flatten(0, 1) if many else actions
        tokens, proprio, futures = self.standardised(tokens, proprio, futures)
        context = min(context or self.shape.history, self.shape.history)
        imagined = self.imagine(tokens, self.code(proprio), futures, samples, context)
        latents = torch.cat([frame[0] for frame in imagined], 1) * self.tokens_std + self.tokens_mean
        codes = torch.cat([frame[1] for frame in imagined], 1)[:, :, 0]
        if many:
            return rearrange(latents, "(b s) t n d -> b s t n d", s=samples), rearrange(
                codes, "(b s) t q -> b s t q", s=samples
            )
        return latents, codes

    def imagine(
        self, tokens: Tensor, code: Tensor, futures: Tensor, samples: int, context: int
    ) -> list[tuple[Tensor, Tensor]]:
        """A rollout, everything standardised.

        Args:
            tokens: [B, n, N, D] observed. code: [B, n, M, Q] of them.
            futures: [B * samples, n - 1 + t, f * A], of which those of one beginning follow each other.
            samples: futures of each beginning. context: frames that a step sees.

        Returns:
            Tokens [B * samples, 1, N, D] and code [B * samples, 1, M, Q] of each of the t frames after the observed ones.
        """
        raise NotImplementedError

    tokens_mean: Tensor
    tokens_std: Tensor
    proprio_mean: Tensor
    proprio_std: Tensor
    action_mean: Tensor
    action_std: Tensor


def say_nothing_changes(*heads: nn.Linear | None) -> None:
    """Have the last layers of a model that predicts changes start with none, the baseline that every figure is compared with."""
    for head in heads:
        if head is not None:
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)


def append(tokens: Tensor, parts: list[Tensor]) -> Tensor:
    """Tokens [B, T, N, D], each with what its frame has beside them, parts [B, T, 1 or N, …]."""
    return torch.cat([tokens, *(part.expand(-1, -1, tokens.shape[2], -1) for part in parts)], -1)
