"""DINO-Tok (arXiv 2511.20565): final features for meaning beside a few channels of early features for texture; optionally quantised.

The authors have released neither code nor weights, so this is the paper's idea at a small size, without LPIPS and discriminator. Planners
sum squared differences over channels, so texture must not outweigh meaning: it is normalised, its weight is the number of its channels.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Annotated, cast

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le
from numpy.typing import NDArray
from torch import Tensor, nn

from wmcache.common.options import option
from wmcache.engine.codebook import MovingMeans, nearest
from wmcache.pipeline.encoders.base import EARLY, LAST, Backbone, Features, Head
from wmcache.pipeline.encoders.fitting import (
    SAMPLED_FRAMES,
    FitData,
    Reconstruction,
    ReconstructionFitting,
    ReconstructionOptions,
    Standardise,
    adapter_spec,
    patch_moments,
)
from wmcache.pipeline.encoders.pca import principal_axes
from wmcache.pipeline.encoders.registry import register_adapter, register_fit

SUMMARY = "DINO-Tok: final features beside a few channels of early ones"
VQ_SUMMARY = "DINO-Tok's quantised variant: codes of meaning beside codes of texture"
SPEC = adapter_spec("dino-tok", SUMMARY, 448, layer="block 2+norm")
VQ_SPEC = adapter_spec("dino-tok-vq", VQ_SUMMARY, 448, layer="block 2+norm")

COMMITMENT = 0.25
DECAY = 0.95
RARE = 0.05
"""Codes used less than this share of the mean are replaced."""


@dataclass(frozen=True)
class DinoTokOptions(ReconstructionOptions):
    """How it is trained; normalised texture needs 2 channels."""

    shallow: Annotated[int, Ge(2), Le(2**16)] = option(64, "Channels of the shallow branch.")


@dataclass(frozen=True)
class DinoTokVqOptions(DinoTokOptions):
    """How the quantised variant is trained."""

    codes: Annotated[int, Ge(2), Le(2**16)] = option(512, "Entries of each codebook.")
    variance: Annotated[float, Gt(0), Le(1)] = option(0.95, "Share of the variance that the kept components explain.")


class DominantSubspace(nn.Module):
    """Projects tokens on their leading principal components; the axes stay, so distances are those between the components."""

    projection: Tensor

    def __init__(self, dim: int) -> None:
        """Start with the identity of `dim` channels."""
        super().__init__()
        self.register_buffer("projection", torch.eye(dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """[..., dim] -> the same."""
        return tokens @ self.projection

    def fit_statistics(self, variances: Tensor, axes: Tensor, share: float) -> None:
        """Keep the fewest axes, one a row, that explain a share of the variances, which are descending."""
        explained = variances.cumsum(0) / variances.sum().clamp_min(torch.finfo(variances.dtype).tiny)
        kept = axes[: int((explained < share).sum()) + 1]
        self.projection.copy_(kept.T @ kept)


class Quantiser(nn.Module):
    """Replaces tokens by their nearest code."""

    codes: Tensor

    def __init__(self, codes: int, dim: int) -> None:
        """Make `codes` codes of `dim` channels."""
        super().__init__()
        self.register_buffer("codes", torch.zeros(codes, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """[..., dim] -> codes, the same shape."""
        return self.codes[nearest(tokens, self.codes)]


class _Branch(nn.Module):
    """One layer's part of the tokens: standardised, adapted; with codes projected before and quantised after the adapter."""

    def __init__(self, layer: str, dim: int, adapter: nn.Module, out: int, codes: int) -> None:
        super().__init__()
        self.layer, self.adapter = layer, adapter
        self.standardise = Standardise(dim)
        self.subspace = DominantSubspace(dim) if codes else None
        self.book = Quantiser(codes, out) if codes else None

    def forward(self, features: Features) -> Tensor:
        """[B, N, out], before quantisation."""
        tokens: Tensor = self.standardise(features.patches(self.layer))
        if self.subspace:
            tokens = self.subspace(tokens)
        adapted: Tensor = self.adapter(tokens)
        return adapted


@register_adapter(SPEC, base="dinov2-layers")
@register_adapter(VQ_SPEC, base="dinov2-layers")
class _DinoTokHead(Head):
    """Standardised final features, then normalised texture; with codes the nearest code of each."""

    layers = (EARLY, LAST)

    def __init__(self, backbone: Backbone, options: DinoTokOptions) -> None:
        super().__init__()
        early, last, shallow = backbone.dims[EARLY], backbone.dims[LAST], options.shallow
        codes = options.codes if isinstance(options, DinoTokVqOptions) else 0
        self.grid, self.dim = backbone.grid, last + shallow
        adapter = nn.Sequential(
            nn.LayerNorm(early), nn.Linear(early, shallow), nn.LayerNorm(shallow, elementwise_affine=False)
        )
        self.meaning = _Branch(LAST, last, nn.Identity(), last, codes)
        self.texture = _Branch(EARLY, early, adapter, shallow, codes)
        self.branches = (self.meaning, self.texture)  # in the order of their channels

    def forward(self, features: Features) -> Tensor:
        parts = [(branch, branch(features)) for branch in self.branches]
        return torch.cat([branch.book(part) if branch.book else part for branch, part in parts], -1)


@register_fit(SPEC.name, DinoTokOptions)
@register_fit(VQ_SPEC.name, DinoTokVqOptions)
class DinoTokFitting(ReconstructionFitting):
    """Frames or features reconstructed from tokens or codes. Codes follow moving means of tokens (arXiv 1711.00937, appendix A)."""

    kept: _DinoTokHead

    def __init__(self, data: FitData, options: DinoTokOptions) -> None:
        """Standardise the layers and make the decoder."""
        super().__init__(SPEC.name, _DinoTokHead.layers, data, options)
        self.kept = _DinoTokHead(data.backbone, options).to(data.device)
        moments = patch_moments(data, _DinoTokHead.layers, options.seed)
        for branch in self.kept.branches:
            branch.standardise.fit_statistics(moments[branch.layer])
        self.reconstruction = Reconstruction(data, options, self.kept.dim, _DinoTokHead.layers)
        self.clusters = nn.ModuleDict()
        some = functools.partial(data.sample_features, SAMPLED_FRAMES, options.seed)
        for branch in self.kept.branches:
            if branch.subspace and branch.book and isinstance(options, DinoTokVqOptions):
                _, variances, axes = principal_axes(branch.standardise(found.patches(branch.layer)) for found in some())
                branch.subspace.fit_statistics(variances, axes, options.variance)
                with torch.no_grad():
                    tokens = torch.cat([branch(found) for found in some()]).flatten(0, 1)
                branch.book.codes.copy_(_draw(tokens, options.codes))
                self.clusters[branch.layer] = MovingMeans(torch.ones(options.codes), branch.book.codes.clone(), DECAY)

    def loss(self, rows: NDArray[np.integer]) -> dict[str, Tensor]:
        """Compute the decoder's error, and the commitment of texture to its codes; meaning has no parameters to commit."""
        features = self.data.features(rows)
        latents, commitment = [], torch.zeros((), device=self.data.device)
        with torch.autocast(self.data.device.type, enabled=False):  # as heads run later
            for branch in self.kept.branches:
                tokens = branch(features)
                if branch.book:
                    codes = branch.book(tokens)
                    commitment = commitment + F.mse_loss(tokens, codes)
                    means = cast(MovingMeans, self.clusters[branch.layer])
                    move_codes(branch.book, means, tokens.detach().flatten(0, 1))
                    tokens = tokens + (codes - tokens).detach()  # straight-through gradient
                latents.append(tokens)
        error = self.reconstruction(torch.cat(latents, -1), features, rows)
        losses = {"loss": error + COMMITMENT * commitment, "error": error}
        return {**losses, "commitment": commitment} if self.clusters else losses


@torch.no_grad()
def move_codes(book: Quantiser, means: MovingMeans, tokens: Tensor) -> None:
    """Move the codes to the moving means of tokens [n, dim]; replace rare codes by tokens."""
    means.update(tokens, nearest(tokens, book.codes), unit=len(tokens) / len(means.count))
    rare = means.count < RARE
    means.restart(rare, _draw(tokens, int(rare.sum())))
    book.codes.copy_(means.means())


def _draw(tokens: Tensor, count: int) -> Tensor:
    """Draw [count, dim] of tokens [n, dim], without repetition if n suffices."""
    order = torch.randperm(len(tokens), device=tokens.device)
    return tokens[order[torch.arange(count, device=tokens.device) % len(tokens)]]
