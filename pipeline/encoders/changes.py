"""Change maps: what differs between two frames, in 2 x 2 cells for each patch of a token grid. Labels for DDP-WM (arXiv 2602.01780).

The maps of a dataset are a store of their own beside the token store (`wmcache.cache.change_maps`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from wmcache.common.errors import UserError
from wmcache.pipeline.encoders.base import LAST, Backbone, Encoder, EncoderSpec, Loaded, Select
from wmcache.pipeline.encoders.registry import create, register
from wmcache.pipeline.encoders.weights import refuse_weights

PATCH = 14
"""Pixels of a patch that a change is measured on; DDP-WM's, which has 14 x 14 patches of 14 pixels."""

LEAST_CHANGE = 0.1
"""Threshold on the norm of a difference; DDP-WM's."""

SPEC = EncoderSpec(
    name="changes",
    summary="what has changed since an earlier frame, 2 x 2 cells a patch; no representation, but labels for ddp-wm",
    image_size=14 * PATCH,
    patch=PATCH,
    token_dim=4,
    layer="pixels",
    dtype="float32",
    lag=5,
)


class _Changes(Backbone):
    """Norm of the difference of two images, over the channels and in the mean over each cell (DDP-WM, LabelGenerator).

    The reference assigns the cells of a map row by row, four to a patch; here a patch has the cells inside it, row by row.
    """

    def __init__(self, grid: tuple[int, int]) -> None:
        super().__init__()
        self.dims, self.described, self.grid = {LAST: 4}, {LAST: "pixels"}, grid

    def forward(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        squares = (images[:, 1] - images[:, 0]).square().sum(1, keepdim=True)
        cells = F.adaptive_avg_pool2d(squares, (2 * self.grid[0], 2 * self.grid[1])).sqrt()
        return dict.fromkeys(layers, rearrange(cells, "b 1 (r i) (c j) -> b (r c) (i j)", i=2, j=2))


@register(SPEC)
def load(spec: EncoderSpec, image_size: int, weights: Path | None) -> Loaded:
    """Make the backbone."""
    refuse_weights(spec, weights)
    backbone = _Changes(spec.patch_grid(image_size))
    return Loaded(backbone, Select(backbone, spec.token_selection), spec.source)


def changes_for(token_grid: tuple[int, int], frameskip: int, device: str = "auto") -> Encoder:
    """Make the encoder of change maps of frames `frameskip` env steps apart; raises UserError if the grid is not square."""
    rows, columns = token_grid
    if rows != columns:
        raise UserError(f"change maps need a square grid of patches, not {rows} x {columns} tokens")
    return create(SPEC.name, image_size=rows * PATCH, lag=frameskip, device=device)
