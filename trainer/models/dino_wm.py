"""The frame-causal transformer of DINO-WM (arXiv 2411.04983, section 3; models/vit.py), on cached latents.

Each patch token of a frame is joined with the frame's proprio and action, and attends to all tokens of its own and earlier frames.
The output at frame i predicts frame i + 1. Beyond the paper: linear projections in and out, so that the width does not depend on the
encoder; latents standardised per channel; the network predicts the change from frame i, and raw proprio instead of a learned code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from wmcache.cache.device import attention_precision
from wmcache.trainer.models.base import DataShape

EMBEDDING = 10
"""Dimensions of the action and of the proprio embedding (DINO-WM, conf/train.yaml)."""


@dataclass(frozen=True)
class DinoWmOptions:
    """Sizes of the transformer.

    Attributes:
        width: of the residual stream.
        depth: number of blocks.
        heads: of attention.
        mlp_ratio: hidden units of the MLP, in widths.
        dropout: in attention, projections and MLP.
    """

    width: int = 384
    depth: int = 6
    heads: int = 6
    mlp_ratio: float = 4.0
    dropout: float = 0.1


class DinoWm(nn.Module):
    """A `WorldModel`; see the module's docstring."""

    def __init__(self, shape: DataShape, options: DinoWmOptions, statistics: Mapping[str, Tensor]) -> None:
        """Build the model.

        Args:
            shape: sizes of the data.
            options: sizes of the network.
            statistics: `{tokens,proprio,action}_{mean,std}` of the data, kept as buffers so that a checkpoint needs no store.
        """
        super().__init__()
        self.shape, self.options = shape, options
        for name, value in statistics.items():
            self.register_buffer(name, value.float().clamp_min(1e-6) if name.endswith("std") else value.float())
        self.embed_proprio = nn.Linear(shape.proprio_dim, EMBEDDING)
        self.embed_action = nn.Linear(shape.action_dim, EMBEDDING)
        self.project_in = nn.Linear(shape.token_dim + 2 * EMBEDDING, options.width)
        self.position = nn.Parameter(0.02 * torch.randn(shape.history, shape.tokens, options.width))
        self.blocks = nn.ModuleList(Block(options) for _ in range(options.depth))
        self.norm = nn.LayerNorm(options.width)
        self.project_out = nn.Linear(options.width, shape.token_dim + shape.proprio_dim)
        # Starts as "nothing changes", the baseline that every figure is compared with.
        nn.init.zeros_(self.project_out.weight)
        nn.init.zeros_(self.project_out.bias)
        frame = torch.arange(shape.history * shape.tokens) // shape.tokens
        self.register_buffer("mask", frame[:, None] >= frame[None, :], persistent=False)

    def predict(self, tokens: Tensor, proprio: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """One step from each frame, everything standardised.

        Args:
            tokens: [B, T, N, D], T <= history. proprio: [B, T, P]. action: [B, T, f * A].

        Returns:
            Tokens [B, T, N, D] and proprio [B, T, P] of the frames after each.
        """
        frames, patches = tokens.shape[1:3]
        condition = torch.cat([self.embed_proprio(proprio), self.embed_action(action)], -1)
        x = torch.cat([tokens, repeat(condition, "b t c -> b t n c", n=patches)], -1)
        x = rearrange(self.project_in(x) + self.position[:frames], "b t n c -> b (t n) c")
        mask = None if frames == 1 else self.mask[: frames * patches, : frames * patches]
        for block in self.blocks:
            x = block(x, mask)
        change = rearrange(self.project_out(self.norm(x)), "b (t n) c -> b t n c", n=patches).float()
        token_change, proprio_change = change.split([self.shape.token_dim, self.shape.proprio_dim], -1)
        return tokens + token_change, proprio + proprio_change.mean(2)

    def loss(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """MSE of the next frame's tokens and proprio, in units of their variance, weighed by their dimensions as in DINO-WM."""
        tokens, proprio, action = self._standardise(batch["tokens"], batch["proprio"], batch["action"])
        predicted, predicted_proprio = self.predict(tokens[:, :-1], proprio[:, :-1], action[:, :-1])
        token_loss = F.mse_loss(predicted, tokens[:, 1:])
        proprio_loss = F.mse_loss(predicted_proprio, proprio[:, 1:])
        share = self.shape.proprio_dim / (self.shape.proprio_dim + self.shape.token_dim)
        return {"loss": (1 - share) * token_loss + share * proprio_loss, "tokens": token_loss, "proprio": proprio_loss}

    def rollout(
        self, tokens: Tensor, proprio: Tensor, actions: Tensor, context: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `WorldModel.rollout`."""
        tokens, proprio, actions = self._standardise(tokens, proprio, actions)
        observed, context = tokens.shape[1], min(context or self.shape.history, self.shape.history)
        for end in range(observed, actions.shape[1] + 1):
            start = max(0, end - context)
            following = self.predict(tokens[:, start:end], proprio[:, start:end], actions[:, start:end])
            tokens = torch.cat([tokens, following[0][:, -1:]], 1)
            proprio = torch.cat([proprio, following[1][:, -1:]], 1)
        imagined = tokens[:, observed:] * self.tokens_std + self.tokens_mean
        return imagined, proprio[:, observed:] * self.proprio_std + self.proprio_mean

    def _standardise(self, tokens: Tensor, proprio: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (
            (tokens.float() - self.tokens_mean) / self.tokens_std,
            (proprio - self.proprio_mean) / self.proprio_std,
            (action - self.action_mean) / self.action_std,
        )

    tokens_mean: Tensor
    tokens_std: Tensor
    proprio_mean: Tensor
    proprio_std: Tensor
    action_mean: Tensor
    action_std: Tensor
    mask: Tensor


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, options: DinoWmOptions) -> None:
        """Args: `options` the sizes."""
        super().__init__()
        width, hidden = options.width, round(options.width * options.mlp_ratio)
        self.heads, self.dropout = options.heads, options.dropout
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Dropout(options.dropout),
            nn.Linear(hidden, width),
            nn.Dropout(options.dropout),
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """[B, L, width] -> the same; `mask` [L, L] is True where row may attend to column, None where all may."""
        q, k, v = rearrange(self.qkv(self.norm_attention(x)), "b l (three h c) -> three b h l c", three=3, h=self.heads)
        dropout = self.dropout if self.training else 0.0
        with attention_precision(x.device) as dtype:
            q, k, v = (part.to(dtype or part.dtype) for part in (q, k, v))
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        x = x + F.dropout(self.out(rearrange(attended, "b h l c -> b l (h c)")), dropout)
        return torch.add(x, self.mlp(self.norm_mlp(x)))
