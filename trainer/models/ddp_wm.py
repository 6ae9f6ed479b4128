"""DDP-WM (arXiv 2602.01780): most of a frame stays as it is, so only the tokens that change go through the large transformer.

    fusion          the newest frame asks the frames before it, by one cross-attention
    localiser       a small transformer over all tokens says which change: a logit for each of 2 x 2 cells of a patch
    primary         the large transformer predicts the K tokens that change most surely, and proprio
    correction      the others ask the K predicted ones, by one cross-attention (the paper's low-rank correction module, LRM)

With the options of the preset `ddp-wm` these have the sizes of the reference (models/ddp_predictor.py at 14aa459). Where its code is not
what the paper means, this is: cells belong to the patch that they lie in; frames before the newest are known by their age; the fused
frame is normed with and without such frames; K, the largest logits, is a constant of the model, so that no candidate's future depends on
who shares its batch; and where the primary predictor is trained on frames as a rollout makes them, what has changed in them comes from
the true next frame. The defaults differ as those of `dino_wm.py` do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor, nn

from wmcache.common.errors import UserError
from wmcache.common.options import Weight, option
from wmcache.common.schema import Size
from wmcache.trainer.models.attention import KeysValues
from wmcache.trainer.models.base import DataShape
from wmcache.trainer.models.ddp_parts import CELLS, Correction, Fusion, Localiser, Vit, put, take
from wmcache.trainer.models.latent import LatentModel, LatentOptions, SizeOrNone, append, say_nothing_changes

POSITIVE_WEIGHT = 10.0
"""Of cells that change, in the localiser's loss; few do."""
COVERED, SPARE = 0.99, 1.5
"""K, where it is not given, holds so many times the patches that change in that share of the steps: localization errs."""
USUAL_THRESHOLD = {"pixels": 0.1, "features": 0.5}


@dataclass(frozen=True)
class DdpWmOptions(LatentOptions):
    """Sizes and variants; width, depth, heads, head_dim and mlp are those of the primary predictor."""

    foreground: SizeOrNone = option(0, "Tokens of a frame that are predicted; 0: enough for 99 % of the steps.")
    locator_width: Size = option(96, "Width of the localization network.")
    locator_depth: Size = option(3, "Transformer blocks of the localization network.")
    locator_heads: Size = option(3, "Attention heads of the localization network.")
    locator_mlp: Size = option(384, "Hidden units of each MLP of the localization network.")
    fusion_heads: Size = option(4, "Attention heads of the temporal fusion block.")
    correction_heads: Size = option(4, "Attention heads of the correction of unchanged tokens.")
    labels: Literal["pixels", "features"] = option(
        "pixels", "What shows that a token has changed: pixels (change maps), or its features."
    )
    threshold: Weight = option(0.0, "Smallest change that counts; 0: 0.1 for pixels, 0.5 for features.")

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        super().__post_init__()
        if self.locator_width % self.locator_heads:
            raise UserError(
                f"--locator-width {self.locator_width} is not a multiple of --locator-heads {self.locator_heads}"
            )

    @property
    def least_change(self) -> float:
        """The threshold in force."""
        return self.threshold or USUAL_THRESHOLD[self.labels]


class DdpWm(LatentModel):
    """A `WorldModel`; see the module's docstring."""

    stages = ("localization", "primary", "lrm")
    pools = False

    def __init__(self, shape: DataShape, options: DdpWmOptions, statistics: Mapping[str, Tensor]) -> None:
        """Build the model; arguments as of `DinoWm`.

        Raises:
            UserError: nothing would be left to stay as it is.
        """
        self.require(shape.tokens)
        if options.foreground >= shape.tokens:
            raise UserError(f"--foreground {options.foreground} leaves none of {shape.tokens} tokens; choose fewer")
        width = options.embedding
        super().__init__(shape, options, statistics, embedding=width, action_embedding=width)
        embeddings = width * (2 if self.embed_proprio is not None else 1)
        joined, deviation = shape.token_dim + embeddings, 0.02 if options.width else 1.0
        self.foreground = options.foreground or shape.tokens // 2
        self.fusion = Fusion(shape.tokens, joined, shape.history, options.fusion_heads, options.dropout, deviation)
        self.localiser = Localiser(
            shape,
            embeddings,
            width=options.locator_width,
            depth=options.locator_depth,
            heads=options.locator_heads,
            mlp=options.locator_mlp,
            dropout=options.dropout,
            deviation=deviation,
        )
        width = options.width or joined
        self.project_in = nn.Linear(joined, width) if options.width else nn.Identity()
        sizes = (width, options.depth, options.heads, options.head_dim or width // options.heads)
        self.primary = Vit(shape.tokens, *sizes, options.mlp or 4 * width, options.dropout, deviation)
        self.correction = Correction(shape.tokens, joined, width, options.correction_heads, deviation)
        self.primary_out = nn.Linear(width, shape.token_dim + self.code_dim) if options.width else None
        # Raw proprio is the whole frame's, which the primary predictor says alone.
        beside = self.code_dim if options.proprio == "embedding" else 0
        self.correction_out = nn.Linear(joined, shape.token_dim + beside) if options.width else None
        if options.predict == "change":
            say_nothing_changes(self.primary_out, self.correction_out)
        self.register_buffer("stage", torch.zeros((), dtype=torch.int64))

    stage: Tensor
    """Number of the stage that is or was trained last; what later ones train is not used yet."""

    @property
    def parts(self) -> dict[str, list[nn.Module]]:
        """What each stage trains."""
        found: dict[str, list[nn.Module | None]] = {
            "localization": [self.embed_proprio, self.embed_action, self.fusion, self.localiser],
            "primary": [self.project_in, self.primary, self.primary_out],
            "lrm": [self.correction, self.correction_out],
        }
        return {stage: [part for part in parts if part is not None] for stage, parts in found.items()}

    def begin(self, stage: str) -> None:
        """Train one stage's parts from now on, and freeze the others."""
        self.stage.fill_(self.stages.index(stage) + 1)
        self.zero_grad(set_to_none=True)  # of what was trained before, or it would count when gradients are clipped
        for name, parts in self.parts.items():
            for part in parts:
                part.requires_grad_(name == stage)

    def train(self, mode: bool = True) -> DdpWm:
        """As torch's; what is frozen does without dropout."""
        super().train(mode)
        for parts in self.parts.values():
            for part in parts:
                part.train(mode and any(parameter.requires_grad for parameter in part.parameters()))
        return self

    @staticmethod
    def require(tokens: int) -> None:
        """Refuse, as a UserError, frames of a single token."""
        if tokens < 2:
            raise UserError("ddp-wm tells tokens of a frame apart, and this store has one; choose --model dino-wm")

    @staticmethod
    def settle(options: DdpWmOptions, tokens: int, changed: NDArray[np.bool_]) -> DdpWmOptions:
        """Choose K, where it is not given: the least power of two that holds what changes in 99 % of the steps and half as many again; at
        most half of a frame.

        Args:
            options: as given. tokens: N.
            changed: [steps, N], which patches have.
        """
        if options.foreground:
            return options
        wanted = float(np.quantile(changed.sum(1), COVERED, method="higher")) if len(changed) else 0.0
        bucket = 2 ** int(np.ceil(np.log2(max(1.0, SPARE * wanted))))
        return replace(options, foreground=max(1, min(bucket, tokens // 2)))

    def loss(self, batch: Mapping[str, Tensor], pool: int = 1) -> dict[str, Tensor]:  # noqa: ARG002 (see `pools`)
        """The loss of the present stage, over histories of every length in the batch at once.

        Args:
            batch: see `WorldModel.loss`; for labels of pixels also changes [B, T, N, 4], of each frame since the one before it.
            pool: 1, see `pools`.
        """
        tokens, proprio, action = self.standardised(batch["tokens"], batch["proprio"], batch["action"])
        code = self.code(proprio)
        match self.stages[max(0, int(self.stage) - 1)]:
            case "localization":
                return self._localization_loss(tokens, code, action, batch)
            case "primary":
                return self._primary_loss(tokens, code, action)
            case _:
                return self._correction_loss(tokens, code, action)

    def _localization_loss(
        self, tokens: Tensor, code: Tensor, action: Tensor, batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        logits = self.localiser(self._fuse_all(tokens, code, action).flatten(0, 1))
        labels = self.labels(tokens, batch).flatten(0, 1)
        weight = logits.new_tensor(POSITIVE_WEIGHT)
        loss = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), pos_weight=weight)
        found, there = (logits > 0).any(-1), labels.any(-1)
        hits = (found & there).sum()
        return {
            "loss": loss,
            "recall": hits / there.sum().clamp_min(1),
            "precision": hits / found.sum().clamp_min(1),
        }

    def labels(self, tokens: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Which cells change from each frame of a batch to the next, bool [B, T - 1, N, 4]; `tokens` are standardised."""
        if self.options.labels == "pixels":
            cells: Tensor = batch["changes"][:, 1:] > self.options.least_change
            return cells
        changed: Tensor = (tokens[:, 1:] - tokens[:, :-1]).square().mean(-1).sqrt() > self.options.least_change
        return changed[..., None].expand(*changed.shape, CELLS)

    def _primary_loss(self, tokens: Tensor, code: Tensor, action: Tensor) -> dict[str, Tensor]:
        """MSE of the tokens that change and of proprio, on frames as a rollout makes them: only what changes is the true frame's."""
        seen, fused, places = [tokens[:, 0]], [], []
        past: list[KeysValues] = []
        with torch.no_grad():
            for step in range(tokens.shape[1] - 1):
                joined = self._join(seen[-1], code[:, step], action[:, step])
                fused.append(self.fusion(joined, past))
                if step + 2 < tokens.shape[1]:
                    past.append(self.fusion.remember(joined))
                places.append(self.select(self.localiser(fused[-1])))
                seen.append(put(seen[-1], places[-1], take(tokens[:, step + 1], places[-1])))
        chosen, (predicted, new_code, _) = (
            torch.cat(places),
            self._predict_foreground(
                torch.cat(fused), torch.cat(seen[:-1]), code[:, :-1].transpose(0, 1).flatten(0, 1), torch.cat(places)
            ),
        )
        following = tokens[:, 1:].transpose(0, 1).flatten(0, 1)
        token_loss = F.mse_loss(predicted, take(following, chosen))
        if not self.code_dim:
            return self.weighted(token_loss, None)
        target = code[:, 1:].transpose(0, 1).flatten(0, 1).detach()
        return self.weighted(token_loss, F.mse_loss(new_code, target.expand_as(new_code)))

    def _correction_loss(self, tokens: Tensor, code: Tensor, action: Tensor) -> dict[str, Tensor]:
        """MSE of the tokens that stay, with the true frames before."""
        with torch.no_grad():
            fused = self._fuse_all(tokens, code, action).flatten(0, 1)
            places = self.select(self.localiser(fused))
            frames, codes = tokens[:, :-1].flatten(0, 1), code[:, :-1].flatten(0, 1)
            _, _, hidden = self._predict_foreground(fused, frames, codes, places)
        corrected, new_code = self._correct(fused, frames, codes, hidden, places)
        stays = put(torch.ones_like(frames[..., :1]), places, torch.zeros_like(hidden[..., :1]))
        count = stays.sum()
        errors = (corrected - tokens[:, 1:].flatten(0, 1)).square().mean(-1, keepdim=True)
        token_loss = (errors * stays).sum() / count
        if new_code is None:
            return self.weighted(token_loss, None)
        code_errors = (new_code - code[:, 1:].flatten(0, 1).detach()).square().mean(-1, keepdim=True)
        return self.weighted(token_loss, (code_errors * stays).sum() / count)

    def locate(self, tokens: Tensor, proprio: Tensor, actions: Tensor) -> Tensor:
        """Logits of change from each of T frames to the next, [B, T - 1, N, 4]; arguments as in the batch of `loss`."""
        tokens, proprio, actions = self.standardised(tokens, proprio, actions)
        steps = tokens.shape[1] - 1
        logits: Tensor = self.localiser(self._fuse_all(tokens, self.code(proprio), actions).flatten(0, 1))
        return rearrange(logits, "(b t) n c -> b t n c", t=steps)

    def select(self, logits: Tensor) -> Tensor:
        """The K patches [B, K] of which a cell changes most surely by logits [B, N, 4], in the order of the frame."""
        return logits.amax(-1).topk(self.foreground, -1).indices.sort(-1).values

    def computed(self, logits: Tensor) -> Tensor:
        """Which patches `select` takes by logits [..., N, 4], bool [..., N]."""
        nowhere = torch.zeros(logits.shape[:-1], dtype=torch.bool, device=logits.device)
        return nowhere.scatter(-1, self.select(logits), value=True)

    def _fuse_all(self, tokens: Tensor, code: Tensor, action: Tensor) -> Tensor:
        """Each frame but the last, with those before it: [B, T - 1, N, width of the combined frame]."""
        frames = range(tokens.shape[1] - 1)
        joined = [self._join(tokens[:, t], code[:, t], action[:, t]) for t in frames]
        past = [self.fusion.remember(frame) for frame in joined[:-1]] if self.shape.history > 1 else []
        return torch.stack([self.fusion(joined[t], past[max(0, t + 1 - self.shape.history) : t]) for t in frames], 1)

    def _join(self, tokens: Tensor, code: Tensor, action: Tensor) -> Tensor:
        """Tokens [B, N, D], code [B, M, Q] and action [B, f * A] of a frame as one, [B, N, width of the combined frame]."""
        beside = [*self.embedded_code(code[:, None]), self.embed_action(action)[:, None, None]]
        return append(tokens[:, None], beside)[:, 0]

    def _predict_foreground(
        self, fused: Tensor, tokens: Tensor, code: Tensor, places: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of the K patches at `places` the next tokens [B, K, D]; the next code [B, 1 or K, Q]; what the correction asks, [B, K, width]."""
        hidden = self.primary(self.project_in(take(fused, places)), places)
        out = (hidden if self.primary_out is None else self.primary_out(hidden)).float()
        dim = self.shape.token_dim
        new_tokens, new_code = out[..., :dim], out[..., dim : dim + self.code_dim]
        if self.options.proprio == "raw":
            new_code = new_code.mean(1, keepdim=True)
        elif self.code_dim:
            code = take(code.expand(-1, tokens.shape[1], -1), places)
        if self.options.predict == "change":
            new_tokens, new_code = take(tokens, places) + new_tokens, code + new_code
        return new_tokens, new_code, hidden

    def _correct(
        self, fused: Tensor, tokens: Tensor, code: Tensor, hidden: Tensor, places: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Of all patches the next tokens [B, N, D], as if they stayed; and their code [B, N, Q], where each has its own."""
        out = self.correction(fused, hidden, places)
        out = (out if self.correction_out is None else self.correction_out(out)).float()
        dim = self.shape.token_dim
        new_tokens = out[..., :dim]
        new_code = out[..., dim : dim + self.code_dim] if self.options.proprio == "embedding" else None
        if self.options.predict == "change":
            new_tokens, new_code = tokens + new_tokens, None if new_code is None else code + new_code
        return new_tokens, new_code

    def imagine(
        self, tokens: Tensor, code: Tensor, futures: Tensor, samples: int, context: int
    ) -> list[tuple[Tensor, Tensor]]:
        """See `LatentModel.imagine`. Keys and values of earlier frames are computed once, of observed ones for all futures together.

        Until the last stage has begun, what does not change most surely is copied.
        """
        observed, shared = tokens.shape[1], futures[::samples]
        corrects = int(self.stage) == len(self.stages)
        past = [
            self.fusion.remember(self._join(tokens[:, t], code[:, t], shared[:, t])).repeat(samples)
            for t in range(max(0, observed - context), observed - 1)
        ]
        frame, known = (part[:, -1].repeat_interleave(samples, 0) for part in (tokens, code))
        imagined: list[tuple[Tensor, Tensor]] = []
        for t in range(observed - 1, futures.shape[1]):
            joined = self._join(frame, known, futures[:, t])
            fused = self.fusion(joined, past)
            if context > 1 and t + 1 < futures.shape[1]:
                past = [*past, self.fusion.remember(joined)][1 - context :]
            frame, known = self._advance(fused, frame, known, corrects=corrects)
            imagined.append((frame[:, None], known[:, None]))
        return imagined

    def _advance(self, fused: Tensor, tokens: Tensor, code: Tensor, *, corrects: bool) -> tuple[Tensor, Tensor]:
        """The next frame's tokens [B, N, D] and code [B, M, Q]."""
        places = self.select(self.localiser(fused))
        changed, new_code, hidden = self._predict_foreground(fused, tokens, code, places)
        stays, its_code = self._correct(fused, tokens, code, hidden, places) if corrects else (tokens, None)
        if self.code_dim and self.options.proprio == "embedding":
            if its_code is None:  # proprio is the whole frame's, even where tokens are copied
                its_code = new_code.mean(1, keepdim=True).expand(-1, tokens.shape[1], -1)
            new_code = put(its_code, places, new_code)
        return put(stays, places, changed), new_code
