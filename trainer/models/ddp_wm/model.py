"""DDP-WM (arXiv 2602.01780): most of a frame stays as it is, so only the tokens that change go through the large transformer.

    fusion          the newest frame attends to the frames before it, by one cross-attention
    localiser       a small transformer over all tokens predicts which change: a logit for each of 2 x 2 cells of a patch
    primary         the large transformer predicts the K tokens that most probably change, and proprio
    correction      the others attend to the K predicted ones, by one cross-attention (the paper's low-rank correction module, LRM)

With the options of the preset `ddp-wm` these have the sizes of the reference (models/ddp_predictor.py at 14aa459). Where its code differs
from the paper, this follows the paper. K is a constant of the model, so that the future of a candidate does not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wmcache.cache.change_maps import open_change_maps
from wmcache.cache.store import TokenStore
from wmcache.cache.windows import Windows
from wmcache.common.device import product_dtype
from wmcache.common.errors import UserError
from wmcache.common.options import Weight, option
from wmcache.common.schema import Size
from wmcache.trainer.models import MODELS, Belief, DataShape, take_patches
from wmcache.trainer.models.attention import KeysValues, zero_init
from wmcache.trainer.models.ddp_wm.measure import foreground_size, localization, sample_windows
from wmcache.trainer.models.ddp_wm.parts import CELLS, Correction, Fusion, Localizer, Vit, put
from wmcache.trainer.models.latent import Frames, LatentModel, LatentOptions, SizeOrNone, append
from wmcache.trainer.models.trainable import MIN_STD

POSITIVE_WEIGHT = 10.0  # of cells that change in the loss of the localiser; few do

STEP_MAJOR = "b t ... -> (t b) ..."
STAGE_OF = {
    **dict.fromkeys(("embed_proprio", "embed_action", "fusion", "localiser"), "localization"),
    **dict.fromkeys(("project_in", "primary", "primary_out"), "primary"),
    **dict.fromkeys(("correction", "correction_out"), "lrm"),
}
"""Part of the model -> the stage that trains it."""


@dataclass(frozen=True)
class DdpWmOptions(LatentOptions):
    """Sizes and variants; width, depth, heads, head_dim and mlp belong to the primary predictor."""

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
        """Refuse options that do not go together."""
        super().__post_init__()
        if self.locator_width % self.locator_heads:
            raise UserError(
                f"--locator-width {self.locator_width} is no multiple of --locator-heads {self.locator_heads}"
            )

    @property
    def least_change(self) -> float:
        """The threshold in force."""
        return self.threshold or {"pixels": 0.1, "features": 0.5}[self.labels]


@MODELS.register("ddp-wm")
class DdpWm(LatentModel):
    """DDP-WM, see the module. Its parts are trained in stages, each on the frozen parts before it."""

    Options = DdpWmOptions
    stages = ("localization", "primary", "lrm")
    plannable_after = "primary"
    pools = False
    options: DdpWmOptions

    def __init__(self, shape: DataShape, options: DdpWmOptions, statistics: Mapping[str, Tensor]) -> None:
        """Build the model, see `WorldModel`; raises UserError where no token would be left to stay as it is."""
        if max(1, options.foreground) >= shape.tokens:
            found = f"--foreground {options.foreground} leaves none of {shape.tokens} tokens"
            raise UserError(f"{found}; choose fewer, or --model dino-wm")
        size = options.embedding
        super().__init__(shape, options, statistics, size, size)
        embeddings = size * (2 if self.embed_proprio is not None else 1)
        joined, std = shape.token_dim + embeddings, 0.02 if options.width else 1.0
        self.foreground = options.foreground or shape.tokens // 2
        self.fusion = Fusion(shape.tokens, joined, shape.history, options.fusion_heads, options.dropout, std)
        vit = partial(Vit, heads=options.locator_heads, head_dim=options.locator_width // options.locator_heads)
        vit = partial(vit, depth=options.locator_depth, mlp=options.locator_mlp, dropout=options.dropout, std=std)
        # Checkpoints have this name.
        self.localiser = Localizer(shape, options.locator_width, embeddings, vit)
        width = options.width or joined
        self.project_in = nn.Linear(joined, width) if options.width else nn.Identity()
        head_dim = options.head_dim or width // options.heads
        blocks = (options.depth, options.heads, head_dim, options.mlp or 4 * width, options.dropout, std)
        self.primary = Vit(shape.tokens, width, *blocks)
        self.correction = Correction(shape.tokens, joined, width, options.correction_heads, std)
        self.primary_out = nn.Linear(width, shape.token_dim + self.proprio_size) if options.width else None
        # Raw proprio belongs to the whole frame; only the primary predictor predicts it.
        beside = self.proprio_size if options.proprio == "embedding" else 0
        self.correction_out = nn.Linear(joined, shape.token_dim + beside) if options.width else None
        if options.predict == "change":
            zero_init(self.primary_out, self.correction_out)

    @classmethod
    def configure(cls, store: TokenStore, windows: Windows, options: DdpWmOptions) -> DdpWmOptions:
        """Choose K from how much changes in the data where it is not given; see `WorldModel.configure`."""
        if store.card.tokens_per_frame < 2:
            raise UserError(f"ddp-wm needs several tokens of a frame: {store.path}; choose --model dino-wm")
        options = super().configure(store, windows, options)
        if options.foreground:
            return options
        windows = windows.with_extras(cls.extras(store, windows, options))
        changed = []
        for part in sample_windows(windows):
            if options.labels == "pixels":
                cells = windows.steps(windows.frames(part)[:, 1:])["changes"]
                patches = (cells > options.least_change).any(-1)
            else:
                tokens = windows.batch(part)["tokens"].astype(np.float32)
                if options.standardise:
                    tokens /= np.maximum(store.std, MIN_STD)
                patches = np.sqrt(np.square(np.diff(tokens, axis=1)).mean(-1)) > options.least_change
            changed.append(patches.reshape(-1, patches.shape[-1]))
        return replace(options, foreground=foreground_size(np.concatenate(changed)))

    @classmethod
    def extras(cls, store: TokenStore, windows: Windows, options: DdpWmOptions) -> dict[str, TokenStore]:
        """Open the change maps for labels of pixels: `changes` [N, 4] of each frame since the one before it."""
        return {"changes": open_change_maps(store, windows.frameskip)} if options.labels == "pixels" else {}

    @classmethod
    def may_change_after(cls, stage: str) -> frozenset[str]:
        """See `WorldModel.may_change_after`: the localiser does not depend on K."""
        return frozenset({"foreground"} if stage == "localization" else ())

    def parts(self) -> dict[str, list[nn.Module]]:
        """Return what each stage trains."""
        return {
            stage: [part for name, part in self.named_children() if STAGE_OF[name] == stage] for stage in self.stages
        }

    def begin(self, stage: str) -> None:
        """Train the parts of one stage and freeze the others."""
        super().begin(stage)
        self.zero_grad(set_to_none=True)  # gradients of frozen parts would count when the norm is clipped
        for name, part in self.named_children():
            part.requires_grad_(STAGE_OF[name] == stage)

    def train(self, mode: bool = True) -> DdpWm:
        """Set the mode of the trained parts; frozen ones do without dropout."""
        super().train(mode)
        for part in self.children():
            part.train(mode and any(parameter.requires_grad for parameter in part.parameters()))
        return self

    def validate(self, windows: Windows, device: torch.device, dtype: torch.dtype) -> dict[str, float | None]:
        """Measure localization after the stage that trains it, and rollouts after the others; see `WorldModel.validate`."""
        if self.stage_name == "localization":
            return localization(self, windows, device, dtype)
        return super().validate(windows, device, dtype)

    def loss(self, batch: Mapping[str, Tensor], pool: int = 1) -> dict[str, Tensor]:  # noqa: ARG002 (see `pools`)
        """Compute the loss of the present stage, over histories of every length in the batch at once; see `WorldModel.loss`."""
        tokens, proprio, action = self.standardise(batch["tokens"], batch["proprio"], batch["action"])
        embedding = self.embed(proprio)
        if self.stage_name in ("", "localization"):
            return self._localization_loss(tokens, embedding, action, batch)
        stage_loss = self._primary_loss if self.stage_name == "primary" else self._correction_loss
        return stage_loss(tokens, embedding, action)

    def _localization_loss(
        self, tokens: Tensor, embedding: Tensor, action: Tensor, batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        logits = self.localiser(self._fuse_all(tokens, embedding, action))
        labels = self.labels(tokens, batch).flatten(0, 1)
        weight = logits.new_tensor(POSITIVE_WEIGHT)
        loss = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), pos_weight=weight)
        found, there = (logits > 0).any(-1), labels.any(-1)
        recall, precision = ((found & there).sum() / part.sum().clamp_min(1) for part in (there, found))
        return {"loss": loss, "recall": recall, "precision": precision}

    def labels(self, tokens: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Mark the cells that change from each frame of a batch to the next, bool [B, T - 1, N, 4]; `tokens` are standardised."""
        if self.labels_from_pixels:
            cells: Tensor = batch["changes"][:, 1:] > self.options.least_change
            return cells
        changed: Tensor = (tokens[:, 1:] - tokens[:, :-1]).square().mean(-1).sqrt() > self.options.least_change
        return changed[..., None].expand(*changed.shape, CELLS)

    def _primary_loss(self, tokens: Tensor, embedding: Tensor, action: Tensor) -> dict[str, Tensor]:
        """Compute the MSE of the tokens that change and of proprio, on frames as a rollout makes them, with the true changes."""
        seen, fused, chosen = [tokens[:, 0]], [], []
        past: list[KeysValues] = []
        with torch.no_grad():
            for step in range(tokens.shape[1] - 1):
                joined = self._join(seen[-1], embedding[:, step], action[:, step])
                fused.append(self.fusion(joined, past))
                if step + 2 < tokens.shape[1]:
                    past.append(self.fusion.remember(joined))
                chosen.append(self.select(self.localiser(fused[-1])))
                seen.append(put(seen[-1], chosen[-1], take_patches(tokens[:, step + 1], chosen[-1])))
        # Batches of all steps one after another.
        before, following = (rearrange(part, STEP_MAJOR) for part in (embedding[:, :-1], tokens[:, 1:]))
        indices = torch.cat(chosen)
        predicted, new_embedding, _ = self._predict_foreground(torch.cat(fused), torch.cat(seen[:-1]), before, indices)
        token_loss = F.mse_loss(predicted, take_patches(following, indices))
        if not self.proprio_size:
            return self.weigh(token_loss, None)
        target = rearrange(embedding[:, 1:], STEP_MAJOR).detach()
        return self.weigh(token_loss, F.mse_loss(new_embedding, target.expand_as(new_embedding)))

    def _correction_loss(self, tokens: Tensor, embedding: Tensor, action: Tensor) -> dict[str, Tensor]:
        """Compute the MSE of the tokens that stay, with the true frames before."""
        with torch.no_grad():
            fused = self._fuse_all(tokens, embedding, action)
            indices = self.select(self.localiser(fused))
            frames, embeddings = tokens[:, :-1].flatten(0, 1), embedding[:, :-1].flatten(0, 1)
            _, _, hidden = self._predict_foreground(fused, frames, embeddings, indices)
        corrected, new_embedding = self._correct(fused, frames, embeddings, hidden, indices)
        stays = put(torch.ones_like(frames[..., :1]), indices, torch.zeros_like(hidden[..., :1]))
        count = stays.sum()
        errors = (corrected - tokens[:, 1:].flatten(0, 1)).square().mean(-1, keepdim=True)
        token_loss = (errors * stays).sum() / count
        if new_embedding is None:
            return self.weigh(token_loss, None)
        target = embedding[:, 1:].flatten(0, 1).detach()
        proprio_errors = (new_embedding - target).square().mean(-1, keepdim=True)
        return self.weigh(token_loss, (proprio_errors * stays).sum() / count)

    @property
    def labels_from_pixels(self) -> bool:
        """See `Localizes`."""
        return self.options.labels == "pixels"

    def change_masks(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Localizes`."""
        inputs = batch["tokens"], batch["proprio"], batch["action"]
        logits = self.locate(*inputs)
        nothing = torch.zeros(logits.shape[:-1], dtype=torch.bool, device=logits.device)
        return {
            "changes": self.labels(self.standardise(*inputs)[0], batch).any(-1),
            "computed": nothing.scatter(-1, self.select(logits), value=True),
            "likely to change": (logits > 0).any(-1),
        }

    def locate(self, tokens: Tensor, proprio: Tensor, actions: Tensor) -> Tensor:
        """Predict logits of change from each of T frames to the next, [B, T - 1, N, 4]; arguments as in the batch of `loss`."""
        tokens, proprio, actions = self.standardise(tokens, proprio, actions)
        logits: Tensor = self.localiser(self._fuse_all(tokens, self.embed(proprio), actions))
        return logits.reshape(len(tokens), -1, *logits.shape[1:])

    def select(self, logits: Tensor) -> Tensor:
        """Return the K patches [..., K] with the largest logits [..., N, 4], in the order of the frame; of fewer patches their share."""
        count = -(-self.foreground * logits.shape[-2] // self.shape.tokens)
        return logits.amax(-1).topk(count, -1).indices.sort(-1).values

    def keep(self, belief: Belief, patches: Tensor) -> Belief:
        """See `KeepsPatches.keep`."""
        return {**belief, "patches": patches}

    def _fuse_all(self, tokens: Tensor, embedding: Tensor, action: Tensor) -> Tensor:
        """Fuse each frame but the last with those before it: [B * (T - 1), N, width of the combined frame]."""
        frames, history = range(tokens.shape[1] - 1), self.shape.history
        joined = [self._join(tokens[:, t], embedding[:, t], action[:, t]) for t in frames]
        past = [self.fusion.remember(frame) for frame in joined[:-1]] if history > 1 else []
        fused = [self.fusion(joined[t], past[max(0, t + 1 - history) : t]) for t in frames]
        return torch.stack(fused, 1).flatten(0, 1)

    def _join(self, tokens: Tensor, embedding: Tensor, action: Tensor) -> Tensor:
        """Combine tokens [B, N, D], embedding [B, M, Q] and action [B, f * A] of a frame to [B, N, width of the combined frame]."""
        beside = [*self.proprio_inputs(embedding[:, None]), self.embed_action(action)[:, None, None]]
        return append(tokens[:, None], beside)[:, 0]

    def _predict_foreground(
        self, fused: Tensor, tokens: Tensor, embedding: Tensor, indices: Tensor, chosen: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Predict K patches: next tokens [B, K, D], embedding [B, 1 or K, Q], and what the correction attends to, [B, K, width].

        Args:
            indices: [B, K], which of the tokens they are. chosen: [B, K], which patches; None: the same.
        """
        x = self.project_in(take_patches(fused, indices)).float()  # each block adds to it, so float32 matters here
        hidden = self.primary(x, indices if chosen is None else chosen)
        out = (hidden if self.primary_out is None else self.primary_out(hidden)).float()
        dim = self.shape.token_dim
        new_tokens, new_embedding = out[..., :dim], out[..., dim : dim + self.proprio_size]
        if self.options.proprio == "raw":
            new_embedding = new_embedding.mean(1, keepdim=True)
        elif self.proprio_size:
            embedding = take_patches(embedding.expand(-1, tokens.shape[1], -1), indices)
        if self.options.predict == "change":
            new_tokens, new_embedding = take_patches(tokens, indices) + new_tokens, embedding + new_embedding
        return new_tokens, new_embedding, hidden

    def _correct(
        self,
        fused: Tensor,
        tokens: Tensor,
        embedding: Tensor,
        hidden: Tensor,
        chosen: Tensor,
        patches: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Predict all patches as if they stayed: next tokens [B, N, D], and embedding [B, N, Q] where each patch has its own."""
        out = self.correction(fused, hidden, chosen, patches)
        out = out if self.correction_out is None else self.correction_out(out)
        dim = self.shape.token_dim
        new_tokens = out[..., :dim]
        new_embedding = out[..., dim : dim + self.proprio_size] if self.options.proprio == "embedding" else None
        if self.options.predict == "change":  # sums with float32 are float32, without a copy before
            new_tokens = tokens + new_tokens
            new_embedding = None if new_embedding is None else embedding + new_embedding
        return new_tokens.float(), None if new_embedding is None else new_embedding.float()

    def roll_out(
        self,
        tokens: Tensor,
        embedding: Tensor,
        futures: Tensor,
        samples: int,
        context: int,
        patches: Tensor | None = None,
    ) -> list[Frames]:
        """See `LatentModel.roll_out`. Before the last stage the tokens that are not chosen are copied."""
        observed, shared = tokens.shape[1], futures[::samples]
        # Frames that are imagined are float32; what layers see of them needs not more than products have.
        seen = product_dtype(tokens)
        corrects = self.stage_name == self.stages[-1]
        past = [
            self.fusion.remember(self._join(tokens[:, t].to(seen), embedding[:, t], shared[:, t]), patches).repeat(
                samples
            )
            for t in range(max(0, observed - context), observed - 1)
        ]
        frame, known = (part[:, -1].repeat_interleave(samples, 0) for part in (tokens, embedding))
        imagined: list[Frames] = []
        for t in range(observed - 1, futures.shape[1]):
            joined = self._join(frame.to(seen), known.to(seen), futures[:, t])
            fused = self.fusion(joined, past, patches).to(seen)
            if context > 1 and t + 1 < futures.shape[1]:
                past = [*past, self.fusion.remember(joined, patches)][1 - context :]
            frame, known = self._advance(fused, frame, known, patches, corrects=corrects)
            imagined.append((frame[:, None], known[:, None]))
        return imagined

    def _advance(
        self, fused: Tensor, tokens: Tensor, embedding: Tensor, patches: Tensor | None, *, corrects: bool
    ) -> Frames:
        """Return the next frame's tokens [B, N, D] and embedding [B, M, Q]."""
        indices = self.select(self.localiser(fused, patches))
        chosen = indices
        if patches is not None:
            chosen = patches.repeat_interleave(len(indices) // len(patches), 0).gather(1, indices)
        changed, new_embedding, hidden = self._predict_foreground(fused, tokens, embedding, indices, chosen)
        if corrects:
            following, its_embedding = self._correct(fused, tokens, embedding, hidden, chosen, patches)
        else:
            following, its_embedding = tokens.clone(), None
        if self.options.proprio == "embedding":
            if its_embedding is None:  # proprio belongs to the whole frame, even where tokens are copied
                its_embedding = new_embedding.mean(1, keepdim=True).expand(-1, tokens.shape[1], -1)
            new_embedding = put(its_embedding, indices, new_embedding)
        return following.scatter_(1, indices[..., None].expand_as(changed), changed), new_embedding
