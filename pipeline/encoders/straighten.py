"""Straightened tokens: an adapter that makes distance on any store's tokens grow with time, without an image.

A representation can contain the position linearly and be hard to plan in: descending its distance gets stuck. The adapter is trained as
`tcn`, by time contrast, on cached tokens instead of frames, and by the curvature of temporal straightening (arXiv 2603.12231).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor, nn

from wmcache.common.errors import UserError
from wmcache.common.options import Natural, Positive, Weight, option
from wmcache.common.schema import Size
from wmcache.pipeline.encoders.base import LAST, Backbone, Features, Head, transformer_layer
from wmcache.pipeline.encoders.fitting import FitData, FitOptions, Fitting, Standardise, adapter_spec, patch_moments
from wmcache.pipeline.encoders.registry import register_adapter, register_fit
from wmcache.pipeline.encoders.tcn import Pairs, time_contrastive_loss

SPEC = adapter_spec(
    "straighten",
    "another encoder's patch tokens, trained so that their distance grows with time",
    32,
    grid=(2, 2),
    token_selection="straightened patch tokens",
)
ROWS_OF_EPISODE = 32
"""Pairs of each episode in a batch, where negatives are of one."""
EPSILON = 1e-6
"""Steps that are not longer have no direction."""


@dataclass(frozen=True)
class StraightenOptions(FitOptions):
    """How it is trained."""

    steps: Positive = option(400)
    batch: Annotated[int, Ge(2)] = option(128)
    width: Positive = option(128, "Width of its two transformer layers; a multiple of 4.")
    dim: Size = option(SPEC.token_dim, "Channels of a token.")
    side: Natural = option(2, "Rows and columns of tokens, at most the base's; 0 keeps the base's.")
    max_lag: Positive = option(4, "Largest distance of a pair of frames that are positives, in env steps.")
    spread: Weight = option(0.2, "Weight of the term that drives all frames apart.")
    negatives: Literal["all", "episode"] = option(
        "all",
        "What a frame is compared with: frames of all episodes, or of its own, for episodes that look different.",
    )
    curvature: Weight = option(0.0, "Weight of the curvature of three frames in a row, 1 - cosine of their steps.")
    stride: Positive = option(5, "Env steps between the three frames of --curvature.")

    @property
    def needs_images(self) -> bool:
        """Whether the training looks at frames."""
        return False


@register_adapter(SPEC, base="dinov2")
class _StraightenHead(Head):
    """Standardised patch tokens through two transformer layers, averaged to the grid, and a linear layer."""

    layers = (LAST,)

    def __init__(self, backbone: Backbone, options: StraightenOptions) -> None:
        super().__init__()
        rows, columns = self.base_grid = backbone.grid
        side = options.side or max(rows, columns)
        self.grid, self.dim = (min(side, rows), min(side, columns)), options.dim
        self.standardise = Standardise(backbone.dims[LAST])
        self.enter = nn.Linear(backbone.dims[LAST], options.width)
        self.position = nn.Parameter(0.02 * torch.randn(1, rows * columns, options.width))
        layers = transformer_layer(options.width)
        self.mixer = nn.TransformerEncoder(layers, num_layers=2, enable_nested_tensor=False)
        self.leave = nn.Sequential(nn.LayerNorm(options.width), nn.Linear(options.width, options.dim))

    def forward(self, features: Features) -> Tensor:
        mixed = self.mixer(self.enter(self.standardise(features.patches(LAST))) + self.position)
        rows, columns = self.base_grid
        maps = rearrange(mixed, "b (h w) d -> b d h w", h=rows, w=columns)
        tokens: Tensor = self.leave(F.adaptive_avg_pool2d(maps, self.grid).flatten(2).mT)
        return tokens


@register_fit(SPEC.name, StraightenOptions)
class StraightenFitting(Fitting):
    """Pairs of frames a few env steps apart against all others, and three frames in a row."""

    kept: _StraightenHead

    def __init__(self, data: FitData, options: StraightenOptions) -> None:
        """Find the pairs; raises UserError if every episode has one frame, or the width is not a multiple of 4."""
        super().__init__()
        if options.width % 4:
            raise UserError(f"--width {options.width} is not a multiple of 4")
        self.data, self.options = data, options
        self.pairs = Pairs(data.episode, options.max_lag, SPEC.name)
        self.kept = _StraightenHead(data.backbone, options).to(data.device)
        self.kept.standardise.fit_statistics(patch_moments(data, [LAST], options.seed)[LAST])

    def rows(self, rng: np.random.Generator) -> NDArray[np.integer]:
        """Draw pairs, and after them the two frames that follow the first of each pair, where they are needed."""
        batch = self.options.batch
        few = max(1, batch // ROWS_OF_EPISODE) if self.options.negatives == "episode" else 0
        first, second = self.pairs.draw(batch, rng, few)
        later = [self.pairs.after(first, k * self.options.stride) for k in (1, 2)] if self.options.curvature else []
        return np.concatenate([first, second, *later])

    def loss(self, rows: NDArray[np.integer]) -> dict[str, Tensor]:
        """Compute `time_contrastive_loss`, and `curvature`."""
        first, second, *later = self.kept(self.data.features(rows)).flatten(1).float().split(self.options.batch)
        same = None
        if self.options.negatives == "episode":
            episode = torch.from_numpy(self.data.episode[rows[: self.options.batch]]).to(first.device)
            same = episode[:, None] == episode
        loss = time_contrastive_loss(first, second, self.options.spread, same)
        if not later:
            return {"loss": loss}
        bent = curvature(torch.stack([first, *later], 1))
        return {"loss": loss + self.options.curvature * bent, "curvature": bent}


def curvature(latents: Tensor) -> Tensor:
    """Compute the mean of 1 - cosine of successive steps (arXiv 2603.12231), without steps that are shorter than EPSILON.

    Args:
        latents: [B, 3, N * D], three frames at equal distances.
    """
    before, after = latents.diff(dim=1).unbind(1)
    bent = 1 - F.cosine_similarity(before, after, dim=-1, eps=EPSILON)
    moves = (before.norm(dim=-1) > EPSILON) & (after.norm(dim=-1) > EPSILON)
    mean: Tensor = bent[moves].sum() / moves.sum().clamp_min(1)
    return mean
