"""Time-contrastive patch tokens (TCN, arXiv 1704.06888): a small network trained on the dataset's own frames, without a download.

The latent distance grows with the time between two frames, as a planner that minimises it needs. Pixels, untrained networks and plain
autoencoders do not have this property.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor, nn

from wmcache.common.errors import UserError
from wmcache.common.options import Positive, Weight, option
from wmcache.pipeline.encoders.base import EARLY, LAST, MIDDLE, Backbone, EncoderSpec, Loaded, Select, transformer_layer
from wmcache.pipeline.encoders.fitting import FitData, FitOptions, Fitting
from wmcache.pipeline.encoders.registry import register, register_fit
from wmcache.pipeline.encoders.weights import load_fitted, require_fitted

SPEC = EncoderSpec(
    name="tcn",
    summary="small network trained time-contrastively on the dataset's own frames (wmcache fit)",
    image_size=64,
    patch=32,
    token_dim=32,
    layer="head",
    source="wmcache fit --encoder tcn",
    licence="yours",
    dtype="float32",
)
LAYERS = replace(
    SPEC,
    name="tcn-layers",
    summary="tcn's stem, first block and tokens, for adapters on them",
    token_dim=160,
    layer="stem+block 1+head",
    token_selection="layers",
)

WIDTH = 64


class TcnNetwork(nn.Module):
    """Four strided convolutions to one feature for each patch, two transformer layers, a linear head."""

    background: Tensor
    contrast: Tensor

    def __init__(self, grid: int) -> None:
        """Build the layers for `grid` tokens a side."""
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, WIDTH // 2, 8, stride=4, padding=2)]
        for channels in (WIDTH // 2, WIDTH, WIDTH):
            layers += [nn.GELU(), nn.Conv2d(channels, WIDTH, 4, stride=2, padding=1)]
        self.stem = nn.Sequential(*layers)
        self.position = nn.Parameter(0.02 * torch.randn(1, grid * grid, WIDTH))
        self.mixer = nn.TransformerEncoder(transformer_layer(WIDTH), num_layers=2, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, SPEC.token_dim))
        self.register_buffer("background", torch.zeros(3, grid * SPEC.patch, grid * SPEC.patch))
        self.register_buffer("contrast", torch.ones(()))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, 3, S, S] -> features of the stem and of the first block, and the tokens, each [B, N, channels]."""
        stem = rearrange(self.stem((images - self.background) / self.contrast), "b c h w -> b (h w) c")
        first, *others = self.mixer.layers
        middle = mixed = first(stem + self.position)
        for layer in others:
            mixed = layer(mixed)
        return stem, middle, self.head(mixed)

    def fit_statistics(self, images: Tensor) -> None:
        """Set the mean frame of images [n, 3, S, S] as the background: without it a ball of a few pixels remains."""
        self.background.copy_(images.mean(0))
        self.contrast.copy_((images - self.background).std())


class _Tcn(Backbone):
    def __init__(self, network: TcnNetwork, grid: tuple[int, int]) -> None:
        super().__init__()
        self.network = network
        self.dims = {EARLY: WIDTH, MIDDLE: WIDTH, LAST: SPEC.token_dim}
        self.described = {EARLY: "stem", MIDDLE: "block 1", LAST: "head"}
        self.grid = grid

    def forward(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        stages = dict(zip((EARLY, MIDDLE, LAST), self.network(images), strict=True))
        return {layer: stages[layer] for layer in layers}


@dataclass(frozen=True)
class TcnOptions(FitOptions):
    """How it is trained."""

    max_lag: Positive = option(4, "Largest distance of a pair of frames that are positives, in env steps.")
    spread: Weight = option(0.2, "Weight of the term that drives all frames apart.")


@register(SPEC)
@register(LAYERS)
def load(spec: EncoderSpec, image_size: int, weights: Path | None) -> Loaded:
    """Load the fitted network."""
    grid = spec.patch_grid(image_size)
    network = TcnNetwork(grid[0])
    load_fitted(network, require_fitted(weights, spec.name, SPEC.name), f"{SPEC.name} at {image_size} px")
    backbone = _Tcn(network, grid)
    return Loaded(backbone, Select(backbone, spec.token_selection), "file")


class Pairs:
    """Pairs of frames of one episode, at most `max_lag` env steps apart."""

    def __init__(self, episode: NDArray[np.integer], max_lag: int, encoder: str) -> None:
        """Find the first frames of pairs; raises UserError if every episode [frames], ascending, has one frame."""
        self.max_lag = max_lag
        self.last = np.searchsorted(episode, episode, side="right") - 1
        self.candidates = np.flatnonzero(self.last > np.arange(len(episode)))
        if not len(self.candidates):
            raise UserError(f"no episode has two frames, which the fit of {encoder} needs; collect longer episodes")

    def draw(
        self, count: int, rng: np.random.Generator, episodes: int = 0
    ) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
        """Draw the first and the second frames [count] of pairs: of all episodes, or of as many as are given, each alike."""
        if episodes:
            last = self.last[rng.choice(self.candidates, episodes)]
            known = [self.candidates[self.last[self.candidates] == one] for one in last]
            first = np.concatenate([rng.choice(rows, count // episodes + 1) for rows in known])[:count]
        else:
            first = rng.choice(self.candidates, count)
        return first, self.after(first, rng.integers(1, self.max_lag + 1, count))

    def after(self, rows: NDArray[np.integer], steps: int | NDArray[np.integer]) -> NDArray[np.integer]:
        """Return the frames some env steps later, at most the last ones of their episodes."""
        later: NDArray[np.integer] = np.minimum(rows + steps, self.last[rows])
        return later


@register_fit(SPEC.name, TcnOptions)
class TcnFitting(Fitting):
    """Pairs of frames a few env steps apart against all others."""

    kept: TcnNetwork

    def __init__(self, data: FitData, options: TcnOptions) -> None:
        """Find the pairs; raises UserError if every episode has one frame."""
        super().__init__()
        self.data, self.options = data, options
        self.pairs = Pairs(data.episode, options.max_lag, SPEC.name)
        grid, _ = SPEC.patch_grid(data.preprocess.image_size)
        self.kept = TcnNetwork(grid)
        self.kept.to(data.device).fit_statistics(data.sample_pixels(options.seed))

    def rows(self, rng: np.random.Generator) -> NDArray[np.integer]:
        """Draw pairs: the first frames of all pairs, then the second ones."""
        return np.concatenate(self.pairs.draw(self.options.batch, rng))

    def loss(self, rows: NDArray[np.integer]) -> dict[str, Tensor]:
        """Compute `time_contrastive_loss`."""
        *_, tokens = self.kept(self.data.pixels(rows))
        first, second = tokens.flatten(1).float().chunk(2)
        return {"loss": time_contrastive_loss(first, second, self.options.spread)}


def time_contrastive_loss(first: Tensor, second: Tensor, spread: float = 0.0, same: Tensor | None = None) -> Tensor:
    """Compute symmetric InfoNCE (arXiv 1807.03748) with logits of minus the squared distance, minus a reward for distance between all.

    InfoNCE alone saturates once far frames are far enough: descent from 20 % of the U-maze's held-out frames got stuck. The second term
    unfolds what the first keeps together locally (compare maximum variance unfolding, Weinberger and Saul 2006): 0 % got stuck.

    Args:
        first, second: [B, N * D]; row i of both is a positive pair, all other rows are negatives.
        same: bool [B, B], which pairs are compared at all, the positive ones among them; None: all.
    """
    # Not torch.cdist(…)²: the gradient of its square root is infinite where two rows are equal.
    squared = (first.square().sum(1)[:, None] + second.square().sum(1) - 2 * first @ second.T).clamp_min(0)
    target = torch.arange(len(first), device=first.device)
    logits = -squared if same is None else (-squared).masked_fill(~same, -torch.inf)
    contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    apart = (squared + 1e-2).sqrt()
    return contrast - spread * (apart.mean() if same is None else apart[same].mean())
