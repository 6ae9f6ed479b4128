"""The frame-causal transformer of DINO-WM (arXiv 2411.04983, section 3; models/vit.py, visual_world_model.py), on cached latents.

With the options of the preset `dino-wm` it is the reference's model, number for number; the defaults differ where that planned better.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmcache.common.errors import UserError
from wmcache.common.options import ShareBelowOne, Weight, option
from wmcache.trainer.models import MODELS, DataShape, take_patches
from wmcache.trainer.models.attention import Block, zero_init
from wmcache.trainer.models.frame_transformer import FrameTransformer
from wmcache.trainer.models.latent import Frames, LatentOptions, SizeOrNone, append, pool_grid
from wmcache.trainer.models.masking import Masking, draw_patches

SPATIAL_EPS = 1e-6  # of the layer norms in V-JEPA 2's code


@dataclass(frozen=True)
class DinoWmOptions(LatentOptions):
    """Sizes and variants of the transformer; `adaln`, `rope` and `rollout_loss` are of JEPA-WM (arXiv 2512.24497)."""

    combine: Literal["features", "tokens"] = option(
        "features", "Add proprio and action as features of each token, or as tokens of their own."
    )
    condition: Literal["concat", "adaln"] = option(
        "concat", "Combine the action with the tokens, or let it scale the blocks."
    )
    position: Literal["learned", "rope", "rope-3d"] = option(
        "learned",
        "Position embedding of a frame in the window: learned, rotary in time, or rotary in time, row and column, in the blocks of "
        "V-JEPA 2's code, which have biases (JEPA-WM).",
    )
    proprio_embedding: SizeOrNone = option(0, "Dimensions of the proprio embedding; 0: those of --embedding.")
    rollout_loss: Weight = option(0.0, "Weight of the loss of a second step, predicted from the first one's output.")
    noise: Weight = option(0.0, "Standard deviation of the noise that is added to the latents.")
    token_masking: Masking = option(
        "none",
        "Tokens that training leaves out of a window: random ones, a block, or those that change most (foreground).",
    )
    masked: ShareBelowOne = option(
        0.5, "Largest share of a frame's tokens that --token-masking leaves out; how many is drawn for each batch."
    )

    def __post_init__(self) -> None:
        """Refuse options that do not go together."""
        super().__post_init__()
        size = self.head_dim or self.width // self.heads
        if self.position != "rope-3d" and size % 2:
            raise UserError("the size of a head must be even; change --width, --heads or --head-dim")
        if self.position == "rope-3d" and (size < 6 or self.combine == "tokens"):
            raise UserError("--position rope-3d needs --combine features, and a --head-dim of at least 6")
        if self.proprio_embedding and self.combine == "tokens":
            raise UserError("--proprio-embedding needs --combine features; leave it out")


@MODELS.register("dino-wm")
class DinoWm(FrameTransformer):
    """DINO-WM and its variants, see the module."""

    Options = DinoWmOptions
    options: DinoWmOptions

    def __init__(self, shape: DataShape, options: DinoWmOptions, statistics: Mapping[str, Tensor]) -> None:
        """Build the model, see `WorldModel`; raises UserError where there is no history for a second step."""
        if options.rollout_loss and shape.history < 2:
            raise UserError("--rollout-loss needs a --history of at least 2: one step to take after the other")
        features, has_proprio = options.combine == "features", options.proprio != "none"
        adaln, spatial = options.condition == "adaln", options.position == "rope-3d"
        proprio = options.proprio_embedding or options.embedding
        slots = has_proprio + (not adaln)
        joined = shape.token_dim + (proprio * has_proprio + options.embedding * (not adaln)) * features
        width = options.width or joined
        action = width if adaln or not features else options.embedding
        super().__init__(shape, options, statistics, proprio if features else width, action)
        self.project_in = nn.Linear(joined, width) if options.width else nn.Identity()
        tokens = shape.tokens + slots * (not features)
        position = (shape.history, tokens, width) if options.position == "learned" else (tokens, width)
        self.position = nn.Parameter(torch.randn(position) * (0.02 if options.width else 1.0))
        head_dim, mlp = options.head_dim or width // options.heads, options.mlp or 4 * width
        kind: dict[str, Any] = {"bias": True, "neighbours": True, "eps": SPATIAL_EPS} if spatial else {}
        self.blocks = nn.ModuleList(
            Block(width, options.heads, head_dim, mlp, options.dropout, conditioned=adaln, rotary=self.relative, **kind)
            for _ in range(options.depth)
        )
        self.norm = nn.LayerNorm(width, SPATIAL_EPS if spatial else 1e-5)
        out = shape.token_dim + self.proprio_size * features
        self.project_out = nn.Linear(width, out) if options.width else None
        # Checkpoints have this name.
        own_token = has_proprio and options.width and not features
        self.project_code = nn.Linear(width, self.proprio_size) if own_token else None
        if options.predict == "change":
            zero_init(self.project_out, self.project_code)

    def loss(self, batch: Mapping[str, Tensor], pool: int = 1) -> dict[str, Tensor]:
        """Compute the MSE of the next frame's tokens and proprio, weighted by their dimensions as in DINO-WM; see `WorldModel.loss`."""
        (tokens, embedding), real, action = self.read(batch, pool)
        masking = self.options.token_masking if self.training else "none"
        patches = draw_patches(masking, self.options.masked, real[0], self.shape.columns // pool)
        if patches is not None:
            tokens, real = take_patches(tokens, patches), (take_patches(real[0], patches), real[1])
        target = real[0][:, 1:].detach(), real[1][:, 1:].detach()
        seen = tokens[:, :-1]
        if self.training and self.options.noise:
            seen = seen + self.options.noise * torch.randn_like(seen)
        predicted = self.predict(seen, embedding[:, :-1], action[:, :-1], pool, patches)
        losses = self._errors(predicted, target)
        if self.options.rollout_loss and target[0].shape[1] > 1:
            first = [part[:, :-1].detach() for part in predicted]
            again = self.predict(first[0], first[1], action[:, 1:-1], pool, patches)
            second = self._errors(again, (target[0][:, 1:], target[1][:, 1:]))
            losses["rollout"] = second["loss"]
            losses["loss"] = losses["loss"] + self.options.rollout_loss * second["loss"]
        return losses

    def _errors(self, predicted: Frames, target: Frames) -> dict[str, Tensor]:
        token_loss = F.mse_loss(predicted[0], target[0])
        if not self.proprio_size:
            return self.weigh(token_loss, None)
        proprio_loss = F.mse_loss(predicted[1], target[1].expand_as(predicted[1]))
        own_token = self.options.combine == "tokens" and self.options.proprio == "embedding"
        return self.weigh(token_loss, proprio_loss, predicted[0].shape[2] if own_token else 1)

    @property
    def relative(self) -> bool:
        """See `FrameTransformer.relative`."""
        return self.options.position == "rope"

    def enter(
        self,
        tokens: Tensor,
        embedding: Tensor,
        action: Tensor,
        slots: range,
        pool: int = 1,
        patches: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        """See `FrameTransformer.enter`."""
        x, condition = self.join(tokens, embedding, action)
        spatial = self.options.position == "rope-3d"
        positions = self.grid_positions(slots, pool, patches=patches) if spatial else None
        return self._add_position(x, slots, pool, patches), {"condition": condition, "positions": positions}

    def _add_position(self, x: Tensor, slots: range, pool: int, patches: Tensor | None) -> Tensor:
        position = self.position_of(slots, pool)
        if patches is None:
            return x + position
        tokens, beside = position.shape[1], x.shape[2] - patches.shape[1]
        others = torch.arange(tokens - beside, tokens, device=x.device).expand(len(patches), -1)
        own = position[:, torch.cat([patches, others], 1)].transpose(0, 1)
        return (x.reshape(len(own), -1, *x.shape[1:]) + own[:, None]).reshape(x.shape)

    def join(self, tokens: Tensor, embedding: Tensor, action: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the transformer's input [B, T, tokens, width], and what conditions its blocks [B, T, width]."""
        embedded = self.embed_action(action)
        extra = self.proprio_inputs(embedding)
        if self.options.condition == "concat":
            extra.append(embedded[:, :, None])
        if self.options.combine == "tokens":
            x = torch.cat([self.project_in(tokens), *(part.to(embedded.dtype) for part in extra)], 2)
        else:
            x = self.project_in(append(tokens, extra))
        return x, embedded if self.options.condition == "adaln" else None

    def split(self, x: Tensor, tokens: Tensor, embedding: Tensor) -> Frames:
        """Return tokens and embedding of the next frames from the transformer's output [B, T, tokens, width] at these."""
        x, patches, dim = self.norm(x), tokens.shape[2], self.shape.token_dim
        if self.options.combine == "tokens":
            new_embedding = x[:, :, patches : patches + 1] if self.proprio_size else embedding
            if self.project_code is not None:
                new_embedding = self.project_code(new_embedding)
            x = x[:, :, :patches]
            new_tokens = x if self.project_out is None else self.project_out(x)
        else:
            out = x if self.project_out is None else self.project_out(x)
            new_tokens, new_embedding = out[..., :dim], out[..., dim : dim + self.proprio_size]
            if self.options.proprio == "raw":
                new_embedding = new_embedding.float().mean(2, keepdim=True)
        new_tokens, new_embedding = new_tokens.float(), new_embedding.float()
        if self.options.predict == "change":
            return tokens + new_tokens, embedding + new_embedding
        return new_tokens, new_embedding

    def position_of(self, slots: range, pool: int = 1) -> Tensor:
        """Return the positions to add to the frames at these slots of the window, [T or 1, tokens, width]."""
        position = self.position[None] if self.position.ndim == 2 else self.position[slots.start : slots.stop]
        if pool == 1:
            return position
        patches = pool_grid(position[None, :, : self.shape.tokens], self.shape.columns, pool)[0]
        return torch.cat([patches, position[:, self.shape.tokens :]], 1)
