"""What world models on patch tokens share: units, embeddings of proprio and action, and the weights of losses."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from wmcache.common.errors import UserError
from wmcache.common.options import ShareBelowOne, option
from wmcache.common.schema import Size
from wmcache.trainer.models import Belief, DataShape, Imagined, WorldModel, take_patches

SizeOrNone = Annotated[int, Field(ge=0, le=2**16)]

Frames = tuple[Tensor, Tensor]
"""Tokens and embeddings of proprio."""


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
        """Refuse options that do not go together."""
        if self.width and not self.head_dim and self.width % self.heads:
            raise UserError(f"--width {self.width} is not a multiple of --heads {self.heads}; or give --head-dim")
        if not self.width and (not self.head_dim or self.proprio == "raw"):
            raise UserError("--width 0 needs a --head-dim (DINO-WM has 64), and --proprio embedding or none")


class UnitOptions(Protocol):
    """What `LatentModel` reads of a model's options; see `LatentOptions`."""

    @property
    def proprio(self) -> Literal["raw", "embedding", "none"]:
        """What is predicted of proprio."""

    @property
    def standardise(self) -> bool:
        """Whether channels of the tokens are standardised."""


class LatentModel(WorldModel):
    """A world model on patch tokens.

    Inside, frames are tokens [B, T, N, D] and an embedding [B, T, M, Q] of proprio, both standardised. M is 1 where all patches share the
    embedding, and N where each predicts its own. With `proprio` = `raw` the embedding is the standardised proprio itself.
    """

    pools = True

    options: UnitOptions
    embed_action: nn.Linear

    def __init__(
        self, shape: DataShape, options: UnitOptions, statistics: Mapping[str, Tensor], proprio: int, action: int
    ) -> None:
        """Build embeddings of proprio and action with so many dimensions; see `WorldModel` for the other arguments.

        A model with 0 dimensions of both has embeddings of its own.
        """
        super().__init__(shape, options, statistics)
        if not options.standardise:
            self.tokens_mean, self.tokens_std = torch.zeros_like(self.tokens_mean), torch.ones_like(self.tokens_std)
        self.proprio_size = {"raw": shape.proprio_dim, "embedding": proprio, "none": 0}[options.proprio]
        self.embed_proprio = nn.Linear(shape.proprio_dim, proprio) if proprio and options.proprio != "none" else None
        if action:
            self.embed_action = nn.Linear(shape.action_dim, action)

    def standardise(self, tokens: Tensor, proprio: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Convert from the store's units to the model's."""
        return (
            (tokens.float() - self.tokens_mean) / self.tokens_std,
            (proprio - self.proprio_mean) / self.proprio_std,
            (action - self.action_mean) / self.action_std,
        )

    def embed(self, proprio: Tensor) -> Tensor:
        """Embed standardised proprio, [B, T, P] -> [B, T, 1, Q]."""
        if self.embed_proprio is not None and self.options.proprio == "embedding":
            proprio = self.embed_proprio(proprio)
        return proprio[:, :, None, : self.proprio_size]

    def encode_proprio(self, proprio: Tensor) -> Tensor:
        """See `WorldModel.encode_proprio`."""
        return self.embed((proprio - self.proprio_mean) / self.proprio_std)[:, :, 0].float()

    def proprio_inputs(self, embedding: Tensor) -> list[Tensor]:
        """Return what the network sees of proprio beside the tokens: one tensor [B, T, M, embedding dimensions], or none."""
        if self.embed_proprio is None:
            return []
        return [self.embed_proprio(embedding) if self.options.proprio == "raw" else embedding]

    def weigh(self, token_loss: Tensor, proprio_loss: Tensor | None, tokens: int = 1) -> dict[str, Tensor]:
        """Join the losses of tokens and proprio, each weighted by its number of dimensions (DINO-WM): one embedding for so many tokens."""
        if proprio_loss is None:
            return {"loss": token_loss, "tokens": token_loss.detach()}
        share = self.proprio_size / (self.proprio_size + self.shape.token_dim * tokens)
        loss = (1 - share) * token_loss + share * proprio_loss
        return {"loss": loss, "tokens": token_loss.detach(), "proprio": proprio_loss.detach()}

    def start(self, count: int) -> Belief:
        """See `WorldModel.start`. A belief has the newest n frames, and the n - 1 actions between them, in the store's units."""
        shape, device = self.shape, self.action_mean.device
        return {
            "tokens": torch.zeros(count, 0, shape.tokens, shape.token_dim, device=device),
            "proprio": torch.zeros(count, 0, shape.proprio_dim, device=device),
            "actions": torch.zeros(count, 0, shape.action_dim, device=device),
        }

    def observe(self, belief: Belief, tokens: Tensor, proprio: Tensor, previous_action: Tensor | None) -> Belief:
        """See `WorldModel.observe`."""
        seen = torch.cat([belief["tokens"], tokens[:, None].float()], 1)[:, -self.observed :]
        known = torch.cat([belief["proprio"], proprio[:, None]], 1)[:, -self.observed :]
        actions = belief["actions"]
        if previous_action is not None:
            actions = torch.cat([actions, previous_action[:, None]], 1)
        return {"tokens": seen, "proprio": known, "actions": actions[:, actions.shape[1] + 1 - seen.shape[1] :]}

    def imagine(
        self,
        belief: Belief,
        actions: Tensor,
        generators: Sequence[torch.Generator] | None = None,  # noqa: ARG002 (see `draws`)
    ) -> Imagined:
        """See `WorldModel.imagine`."""
        lead = actions.shape[:2]
        past = belief["actions"][:, None].expand(-1, lead[1], -1, -1)
        futures = torch.cat([past, actions], 2).flatten(0, 1)
        patches = belief.get("patches")
        tokens, proprio, futures = self.standardise(seen_tokens(belief), belief["proprio"], futures)
        imagined = self.roll_out(tokens, self.embed(proprio), futures, lead[1], self.context, patches)
        latents, embeddings = (torch.cat(frames, 1) for frames in zip(*imagined, strict=True))
        # In place: memory as large as all imagined frames is slow to get.
        latents, embeddings = latents.mul_(self.tokens_std).add_(self.tokens_mean), embeddings[:, :, 0]
        latents, embeddings = (part.reshape(lead + part.shape[1:]) for part in (latents, embeddings))
        return Imagined(latents, embeddings, patches=patches)

    @abstractmethod
    def roll_out(
        self,
        tokens: Tensor,
        embedding: Tensor,
        futures: Tensor,
        samples: int,
        context: int,
        patches: Tensor | None = None,
    ) -> list[Frames]:
        """Imagine with everything standardised.

        Args:
            tokens: [B, n, N, D] observed. embedding: [B, n, 1, Q] of their proprio.
            futures: [B * samples, n - 1 + t, f * A], sorted by observed sequence.
            samples: futures of each observed sequence. context: frames that a step sees.
            patches: [B, N], those of a frame that the tokens are, of a model that `KeepsPatches`; None: all.

        Returns:
            Tokens [B * samples, 1, N, D] and embedding [B * samples, 1, M, Q] of each of the t frames after the observed ones.
        """


def seen_tokens(belief: Belief) -> Tensor:
    """Return the observed tokens [E, n, N, D] that a rollout starts from: all, or those of the patches that are kept."""
    patches = belief.get("patches")
    return belief["tokens"] if patches is None else take_patches(belief["tokens"], patches)


def append(tokens: Tensor, parts: list[Tensor]) -> Tensor:
    """Concatenate the channels of tokens [B, T, N, D] and of parts [B, T, 1 or N, …]."""
    return torch.cat([tokens, *(part.expand(-1, -1, tokens.shape[2], -1) for part in parts)], -1)


def pool_grid(tokens: Tensor, columns: int, pool: int) -> Tensor:
    """Average squares of a token grid: [B, T, N, D] -> [B, T, N / pool², D]; see `WorldModel.check_pool`."""
    if pool == 1:
        return tokens
    grid = rearrange(tokens, "b t (r i c j) d -> b t r c i j d", i=pool, j=pool, c=columns // pool)
    return grid.mean((4, 5)).flatten(2, 3)
