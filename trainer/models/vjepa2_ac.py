"""The action-conditioned predictor of V-JEPA 2-AC (arXiv 2506.09985, section 3; src/models/ac_predictor.py), on cached latents.

With the options of the preset `vjepa2-ac` it has the reference's sizes and loss; the defaults differ where that planned better. Most
environments cannot compute the next proprio from an action, so a linear head predicts it from the proprio token, and rollouts feed it back
in place of the true one. Rotary positions turn both numbers of a pair by one angle; in the reference these angles differ, a known bug that
its weights depend on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmcache.common.errors import UserError
from wmcache.common.options import Positive, ShareBelowOne, Weight, option
from wmcache.common.schema import Size
from wmcache.trainer.models import MODELS, Belief, DataShape, Imagined
from wmcache.trainer.models.attention import Block, zero_init
from wmcache.trainer.models.frame_transformer import FrameTransformer
from wmcache.trainer.models.latent import Frames, SizeOrNone, pool_grid, seen_tokens

AXES = 3
"""Of rotary positions: time, row and column."""
EPS = 1e-5
"""Of the layer norm of a token, added to its variance."""


@dataclass(frozen=True)
class VJepa2AcOptions:
    """Sizes and variants."""

    proprio: Literal["raw", "none"] = option(
        "raw", "Predict proprio beside the tokens, or use pixels alone.", group="Model"
    )
    predict: Literal["change", "frame"] = option("change", "Predict the change, or the next frame (V-JEPA 2-AC).")
    normalize: Literal["layer", "store"] = option(
        "store", "Normalize tokens by each channel's statistics in the store, or each token by its own (V-JEPA 2-AC)."
    )
    width: Size = option(384, "Width of the transformer.")
    depth: Size = option(6, "Transformer blocks.")
    heads: Size = option(6, "Attention heads.")
    mlp: SizeOrNone = option(0, "Hidden units of each MLP; 0: 4 x width.")
    dropout: ShareBelowOne = option(0.0, "Dropout in attention, projections and MLP.")
    rollout_loss: Weight = option(1.0, "Weight of the loss of a rollout from the first frame of a window.")
    auto_steps: Positive = option(2, "Model steps of that rollout.")

    def __post_init__(self) -> None:
        """Refuse options that do not go together."""
        size, rest = divmod(self.width, self.heads)
        if rest or size % 2 or size < 2 * AXES:
            raise UserError(
                f"--width {self.width} / --heads {self.heads} is the size of a head, which must be even and at least {2 * AXES}"
            )

    @property
    def standardise(self) -> bool:
        """See `UnitOptions.standardise`."""
        return self.normalize == "store"


@MODELS.register("vjepa2-ac")
class VJepa2Ac(FrameTransformer):
    """V-JEPA 2-AC, see the module. The tokens of a frame are [action, proprio, patches]."""

    Options = VJepa2AcOptions
    options: VJepa2AcOptions
    relative = True

    def __init__(self, shape: DataShape, options: VJepa2AcOptions, statistics: Mapping[str, Tensor]) -> None:
        """Build the model, see `WorldModel`; raises UserError for a rollout that is longer than the history, or too few channels."""
        if options.rollout_loss and options.auto_steps > shape.history:
            raise UserError(f"--auto-steps {options.auto_steps} is more than --history {shape.history}; lower it")
        if options.normalize == "layer" and shape.token_dim < 3:
            raise UserError(f"--normalize layer leaves nothing of {shape.token_dim} channels; choose --normalize store")
        width = options.width
        super().__init__(shape, options, statistics, width, width)
        self.project_in = nn.Linear(shape.token_dim, width)
        self.blocks = nn.ModuleList(
            Block(width, options.heads, width // options.heads, options.mlp or 4 * width, options.dropout, bias=True)
            for _ in range(options.depth)
        )
        self.norm = nn.LayerNorm(width)
        self.project_out = nn.Linear(width, shape.token_dim)
        self.project_proprio = nn.Linear(width, shape.proprio_dim) if self.proprio_size else None
        self._initialise()

    def _initialise(self) -> None:
        """Draw weights, those of residual projections smaller by the square root of 2 x the number of the layer."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for number, block in enumerate(self.blocks, start=1):
            assert isinstance(block, Block)
            for layer in (block.out, block.mlp[3]):
                assert isinstance(layer, nn.Linear)
                layer.weight.data.div_((2 * number) ** 0.5)
        if self.options.predict == "change":
            zero_init(self.project_out, self.project_proprio)

    def standardise(self, tokens: Tensor, proprio: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `LatentModel.standardise`."""
        tokens, proprio, action = super().standardise(tokens, proprio, action)
        return self._norm(tokens), proprio, action

    def prepare(self, batch: Mapping[str, Tensor], pool: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `FrameTransformer.prepare`; tokens are pooled first, because a layer norm of means is no mean of layer norms."""
        pooled = pool_grid(batch["tokens"].float(), self.shape.columns, pool)
        tokens, proprio, action = self.standardise(pooled, batch["proprio"], batch["action"])
        return tokens, self.embed(proprio), action

    def _norm(self, tokens: Tensor) -> Tensor:
        """Apply the layer norm of inputs, targets and outputs (`normalize_reps`), where the options have it."""
        return tokens if self.options.standardise else F.layer_norm(tokens, tokens.shape[-1:], eps=EPS)

    def loss(self, batch: Mapping[str, Tensor], pool: int = 1) -> dict[str, Tensor]:
        """Compute the L1 losses of the next frames from true ones (equation 2), and of a rollout (equation 3).

        The rollout begins at the first frame of the window. As in the authors' code each of its steps counts, and gradients go through
        all of them. Tokens and proprio are weighted by their dimensions, see `LatentModel.weigh`; see `Trainable.loss`.
        """
        (tokens, embedding), real, action = self.read(batch, pool)
        forced = self.predict(tokens[:, :-1], embedding[:, :-1], action[:, :-1], pool)
        losses = self._errors(forced, (real[0][:, 1:], real[1][:, 1:]))
        if not self.options.rollout_loss:
            return losses
        seen = [
            torch.cat([true[:, :1], step[:, :1]], 1) for true, step in zip((tokens, embedding), forced, strict=True)
        ]
        steps = self.options.auto_steps
        for known in range(2, steps + 1):
            following = self.predict(seen[0], seen[1], action[:, :known], pool)
            seen = [torch.cat([before, step[:, -1:]], 1) for before, step in zip(seen, following, strict=True)]
        target = real[0][:, 1 : steps + 1], real[1][:, 1 : steps + 1]
        rollout = self._errors((seen[0][:, 1:], seen[1][:, 1:]), target)["loss"]
        loss = losses["loss"] + self.options.rollout_loss * rollout
        return {**losses, "rollout": rollout.detach(), "loss": loss}

    def _errors(self, predicted: Frames, target: Frames) -> dict[str, Tensor]:
        proprio = F.l1_loss(predicted[1], target[1]) if self.proprio_size else None
        return self.weigh(F.l1_loss(predicted[0], target[0]), proprio)

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
        beside = [self.embed_action(action)[:, :, None], *self.proprio_inputs(embedding)]
        x = torch.cat([*beside, self.project_in(tokens)], 2)
        return x, {"positions": self.grid_positions(slots, pool, len(beside), patches)}

    def split(self, x: Tensor, tokens: Tensor, embedding: Tensor) -> Frames:
        """See `FrameTransformer.split`."""
        x, change = self.norm(x), self.options.predict == "change"
        new_tokens = self.project_out(x[:, :, -tokens.shape[2] :]).float()
        new_tokens = self._norm(tokens + new_tokens if change else new_tokens)
        if self.project_proprio is None:
            return new_tokens, embedding
        new_embedding = self.project_proprio(x[:, :, 1:2]).float()
        return new_tokens, embedding + new_embedding if change else new_embedding

    def imagine(self, belief: Belief, actions: Tensor, generators: Sequence[torch.Generator] | None = None) -> Imagined:
        """See `WorldModel.imagine`. Mean and deviation of tokens, which a layer norm removes, are the newest observed frame's."""
        imagined = super().imagine(belief, actions, generators)
        if self.options.standardise:
            return imagined
        newest = seen_tokens(belief)[:, None, -1:]
        deviation = (newest.var(-1, correction=0, keepdim=True) + EPS).sqrt()
        return replace(imagined, latents=imagined.latents * deviation + newest.mean(-1, keepdim=True))

    def cost(self, imagined: Imagined, goal: Tensor) -> Tensor:
        """Compute the energy (equation 5): the mean absolute difference from goals [E, N, D], normalized as `loss` does; [E, S, T]."""
        latents, target = (
            self._norm((part.float() - self.tokens_mean) / self.tokens_std) for part in (imagined.latents, goal)
        )
        return (latents - target[:, None, None]).abs().mean((3, 4))
