"""The frame-causal transformer of DINO-WM (arXiv 2411.04983, section 3; models/vit.py, visual_world_model.py), on cached latents.

Every token of a frame attends to all tokens of its own and of earlier frames; the output at frame i predicts frame i + 1. With the
options of the preset `dino-wm` it is the reference's model, number for number. The defaults differ in what was found to serve better: a
width that does not depend on the encoder, latents standardised per channel, the change from frame i predicted instead of frame i + 1,
and raw proprio instead of a learned code, which nothing keeps from shrinking.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wmcache.common.errors import UserError
from wmcache.common.options import Weight, option
from wmcache.trainer.models.attention import Block, KeysValues
from wmcache.trainer.models.base import DataShape
from wmcache.trainer.models.latent import LatentModel, LatentOptions, append, say_nothing_changes


@dataclass(frozen=True)
class DinoWmOptions(LatentOptions):
    """Sizes and variants of the transformer.

    `combine`: `features` is DINO-WM's concat_dim 1, `tokens` its concat_dim 0. `condition`: `adaln` scales, shifts and gates every block
    (JEPA-WM, arXiv 2512.24497). `position`: with `rope`, learned in space and rotary in time, keys and values of a frame stay valid when
    the window moves on. `rollout_loss`: JEPA-WM's, with the gradient stopped between the steps.
    """

    combine: Literal["features", "tokens"] = option(
        "features", "Add proprio and action as features of each token, or as tokens of their own."
    )
    condition: Literal["concat", "adaln"] = option(
        "concat", "Combine the action with the tokens, or let it scale the blocks."
    )
    position: Literal["learned", "rope"] = option(
        "learned", "Position embedding of a frame in the window: learned, or rotary in time."
    )
    rollout_loss: Weight = option(0.0, "Weight of the loss of a second step, predicted from the first one's output.")
    noise: Weight = option(0.0, "Standard deviation of the noise that is added to the latents.")

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        super().__post_init__()
        if self.head_dim % 2 or (self.width and not self.head_dim and self.width // self.heads % 2):
            raise UserError("the size of a head must be even; change --width, --heads or --head-dim")


class DinoWm(LatentModel):
    """A `WorldModel`; see the module's docstring."""

    def __init__(self, shape: DataShape, options: DinoWmOptions, statistics: Mapping[str, Tensor]) -> None:
        """Build the model.

        Args:
            shape: sizes of the data.
            options: see `DinoWmOptions`.
            statistics: `{tokens,proprio,action}_{mean,std}` of the data, kept as buffers so that a checkpoint needs no store.

        Raises:
            UserError: there is no history for a second step.
        """
        if options.rollout_loss and shape.history < 2:
            raise UserError("--rollout-loss needs a --history of at least 2: one step to take after the other")
        features, has_proprio = options.combine == "features", options.proprio != "none"
        slots = has_proprio + (options.condition == "concat")
        joined = shape.token_dim + options.embedding * slots * features
        width = options.width or joined
        embedding = options.embedding if features else width
        of_action = width if options.condition == "adaln" else embedding
        super().__init__(shape, options, statistics, embedding=embedding, action_embedding=of_action)
        self.width, self.tokens = width, shape.tokens + slots * (not features)
        self.project_in = nn.Linear(joined, width) if options.width else nn.Identity()
        rows = (self.tokens, width) if options.position == "rope" else (shape.history, self.tokens, width)
        self.position = nn.Parameter(torch.randn(rows) * (0.02 if options.width else 1.0))
        self.blocks = nn.ModuleList(
            Block(
                width,
                options.heads,
                options.head_dim or width // options.heads,
                options.mlp or 4 * width,
                options.dropout,
                conditioned=options.condition == "adaln",
                rotary=options.position == "rope",
            )
            for _ in range(options.depth)
        )
        self.norm = nn.LayerNorm(width)
        self.project_out = nn.Linear(width, shape.token_dim + self.code_dim * features) if options.width else None
        self.project_code = nn.Linear(width, self.code_dim) if has_proprio and options.width and not features else None
        if options.predict == "change":
            say_nothing_changes(self.project_out, self.project_code)

    def loss(self, batch: Mapping[str, Tensor], pool: int = 1) -> dict[str, Tensor]:
        """MSE of the next frame's tokens and proprio, weighed by their dimensions as in DINO-WM; the targets carry no gradient.

        Args:
            batch: see `WorldModel.loss`.
            pool: side of the squares of the token grid that are averaged first (progressive token resolution).
        """
        tokens, proprio, action = self.standardised(batch["tokens"], batch["proprio"], batch["action"])
        tokens = pool_grid(tokens, self.shape.columns, pool)
        code = self.code(proprio)
        target, target_code = tokens[:, 1:].detach(), code[:, 1:].detach()
        seen = tokens[:, :-1]
        if self.training and self.options.noise:
            seen = seen + self.options.noise * torch.randn_like(seen)
        predicted = self.predict(seen, code[:, :-1], action[:, :-1], pool)
        losses = self._errors(predicted, (target, target_code))
        if self.options.rollout_loss and target.shape[1] > 1:
            again = self.predict(predicted[0][:, :-1].detach(), predicted[1][:, :-1].detach(), action[:, 1:-1], pool)
            second = self._errors(again, (target[:, 1:], target_code[:, 1:]))
            losses["rollout"] = second["loss"]
            losses["loss"] = losses["loss"] + self.options.rollout_loss * second["loss"]
        return losses

    def _errors(self, predicted: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        token_loss = F.mse_loss(predicted[0], target[0])
        if not self.code_dim:
            return self.weighted(token_loss, None)
        code_loss = F.mse_loss(predicted[1], target[1].expand_as(predicted[1]))
        one_token_more = self.options.combine == "tokens" and self.options.proprio == "embedding"
        return self.weighted(token_loss, code_loss, predicted[0].shape[2] if one_token_more else 1)

    def predict(self, tokens: Tensor, code: Tensor, action: Tensor, pool: int = 1) -> tuple[Tensor, Tensor]:
        """One step from each frame, everything standardised.

        Args:
            tokens: [B, T, N, D], T <= history. code: [B, T, M, Q], see `code`. action: [B, T, f * A].
            pool: as in `loss`; tokens are pooled already.

        Returns:
            Tokens [B, T, N, D] and code [B, T, M, Q] of the frames after each.
        """
        x, condition = self._join(tokens, code, action)
        x = x + self._position(range(tokens.shape[1]), pool)
        for block in self.blocks:
            x, _ = block(x, condition=condition, window=self.shape.history)
        return self._split(x, tokens, code)

    def imagine(
        self, tokens: Tensor, code: Tensor, futures: Tensor, samples: int, context: int
    ) -> list[tuple[Tensor, Tensor]]:
        """See `LatentModel.imagine`.

        A frame that has been seen is not computed again: its keys and values are kept while its place in the window stays what it was.
        With learned positions that is until the window is full, as every place means another vector; with rotary ones it is always.
        """
        past = futures[::samples]
        observed = tokens.shape[1]
        rotary = self.options.position == "rope"
        frames = [(tokens[:, t : t + 1], code[:, t : t + 1]) for t in range(observed)]
        kept: list[KeysValues | None] = [None] * len(self.blocks)
        known, copies = 0, 1  # frames whose keys and values are kept; how many futures they are there for
        imagined: list[tuple[Tensor, Tensor]] = []
        for end in range(observed, futures.shape[1] + 1):
            start = max(0, end - context)
            if start and not rotary:
                kept, known, copies = [None] * len(self.blocks), 0, 1
            for t in range(max(start, known), end):
                if t >= observed - 1 and copies != samples:  # up to here the futures share all
                    kept = [None if one is None else one.repeat(samples) for one in kept]
                    copies = samples
                frame = tuple(part.repeat_interleave(copies // (len(part) // len(tokens)), 0) for part in frames[t])
                action = (past if copies == 1 else futures)[:, t : t + 1]
                place = range(t, t + 1) if rotary else range(t - start, t - start + 1)
                following = self._advance(frame, action, place, kept, context, wanted=t == end - 1)
            known = end if rotary or not start else 0
            assert following is not None
            frames.append(following)
            imagined.append(following)
        return imagined

    def _advance(
        self,
        frame: tuple[Tensor, ...],
        action: Tensor,
        place: range,
        kept: list[KeysValues | None],
        context: int,
        *,
        wanted: bool,
    ) -> tuple[Tensor, Tensor] | None:
        """Add a frame to the keys and values that are kept; where its successor is `wanted`, return it."""
        x, condition = self._join(frame[0], frame[1], action)
        x = x + self._position(place)
        for number, block in enumerate(self.blocks):
            last = number == len(self.blocks) - 1
            x, kept[number] = block(
                x,
                past=kept[number],
                condition=condition,
                window=context,
                first=place.start,
                only_keys=last and not wanted,
            )
        return self._split(x, *frame) if wanted else None

    def _join(self, tokens: Tensor, code: Tensor, action: Tensor) -> tuple[Tensor, Tensor | None]:
        """The transformer's input [B, T, tokens, width], and what conditions its blocks [B, T, width]."""
        embedded = self.embed_action(action)
        extra = self.embedded_code(code)
        if self.options.condition == "concat":
            extra.append(embedded[:, :, None])
        if self.options.combine == "tokens":
            x = torch.cat([self.project_in(tokens), *(part.to(embedded.dtype) for part in extra)], 2)
        else:
            x = self.project_in(append(tokens, extra))
        return x, embedded if self.options.condition == "adaln" else None

    def _split(self, x: Tensor, tokens: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and code of the next frames from the transformer's output [B, T, tokens, width] at these."""
        x, patches, dim = self.norm(x), tokens.shape[2], self.shape.token_dim
        if self.options.combine == "tokens":
            new_code = x[:, :, patches : patches + 1] if self.code_dim else code
            if self.project_code is not None:
                new_code = self.project_code(new_code)
            x = x[:, :, :patches]
            new_tokens = x if self.project_out is None else self.project_out(x)
        else:
            out = x if self.project_out is None else self.project_out(x)
            new_tokens, new_code = out[..., :dim], out[..., dim : dim + self.code_dim]
            if self.options.proprio == "raw":
                new_code = new_code.float().mean(2, keepdim=True)
        new_tokens, new_code = new_tokens.float(), new_code.float()
        if self.options.predict == "change":
            return tokens + new_tokens, code + new_code
        return new_tokens, new_code

    def _position(self, places: range, pool: int = 1) -> Tensor:
        """What is added to the tokens of frames at these places of the window, [T or 1, tokens, width]."""
        position = self.position if self.position.ndim == 3 else self.position[None]
        if self.position.ndim == 3:
            position = position[places.start : places.stop]
        if pool == 1:
            return position
        patches = pool_grid(position[None, :, : self.shape.tokens], self.shape.columns, pool)[0]
        return torch.cat([patches, position[:, self.shape.tokens :]], 1)


def pool_grid(tokens: Tensor, columns: int, pool: int) -> Tensor:
    """Average squares of a token grid: [B, T, N, D] -> [B, T, N / pool², D].

    Raises:
        UserError: the grid is no multiple of such squares.
    """
    if pool == 1:
        return tokens
    rows = tokens.shape[2] // columns
    if rows % pool or columns % pool:
        raise UserError(
            f"--pool {pool} does not divide the grid of {rows} x {columns} tokens; choose a divisor of both"
        )
    grid = rearrange(tokens, "b t (r i c j) d -> b t r c i j d", i=pool, j=pool, c=columns // pool)
    return grid.mean((4, 5)).flatten(2, 3)
