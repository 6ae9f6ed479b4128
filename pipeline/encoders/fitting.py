"""Training of an encoder: data to draw batches from, options, and a loss. The loop is the engine's.

Adapters that compress features are trained to reconstruct the features, or the frames, from their latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor, nn

from wmcache.common.errors import UserError
from wmcache.common.options import Natural, Positive, option
from wmcache.pipeline.encoders.base import Backbone, Encoder, EncoderSpec, Features, Preprocess, transformer_layer

FRAMES_AT_ONCE = 32
BACKGROUND_FRAMES = 1000
SAMPLED_FRAMES = 500
SMALLEST_DEVIATION = 1e-5
NARROWEST = 16


@dataclass(frozen=True)
class FitOptions:
    """How any encoder is trained; subclasses have other defaults and more options."""

    steps: Positive = option(400, "Optimiser steps.", group="Fit")
    batch: Annotated[int, Ge(2)] = option(256, "Frames, or pairs of frames, in each step.", flag="--batch-size")
    learning_rate: Annotated[float, Gt(0)] = option(1e-3, "Peak learning rate.", flag="--lr")
    seed: Natural = option(0, "Seed of weights and batches.")

    @property
    def needs_images(self) -> bool:
        """Whether the training looks at frames; adapters may get by with cached features."""
        return True


def adapter_spec(name: str, summary: str, token_dim: int, **more: Any) -> EncoderSpec:
    """Describe an adapter on DINOv2's features; `more` are other fields."""
    return EncoderSpec(
        name=name,
        summary=f"{summary} (wmcache fit)",
        image_size=196,
        via=(224,),
        patch=14,
        token_dim=token_dim,
        source=f"wmcache fit --encoder {name}",
        licence="yours, on the base's",
        **more,
    )


@dataclass(frozen=True)
class FitData:
    """Frames of the training episodes; for an adapter also the cached features of its base.

    Attributes:
        episode: [frames], ascending.
        preprocess: of the encoder that is trained, or of the base.
        images: uint8 [frames, 3, S, S], resized by `preprocess`; None if the training reads only a store.
        base, gather: an adapter's base, and rows -> its features, float32 on the device; None for others.
    """

    episode: NDArray[np.integer]
    preprocess: Preprocess
    device: torch.device
    images: Tensor | None = None
    base: Encoder | None = None
    gather: Callable[[NDArray[np.integer]], Features] | None = None

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.episode)

    @property
    def backbone(self) -> Backbone:
        """The base's."""
        assert self.base is not None
        return self.base.backbone

    def pixels(self, rows: NDArray[np.integer]) -> Tensor:
        """Return images as the network receives them: normalised float32 [len(rows), 3, S, S]."""
        assert self.images is not None
        some = self.images[torch.from_numpy(np.asarray(rows))].to(self.device)
        return self.preprocess.normalise(some.float() / 255)

    def sample_pixels(self, seed: int) -> Tensor:
        """Return `pixels` of at most BACKGROUND_FRAMES frames, drawn from all."""
        return self.pixels(self.random_rows(min(len(self), BACKGROUND_FRAMES), np.random.default_rng(seed)))

    def features(self, rows: NDArray[np.integer]) -> Features:
        """Return the base's features of some frames, float32 on the device."""
        assert self.gather is not None
        return self.gather(rows)

    def sample_features(self, frames: int, seed: int) -> Iterator[Features]:
        """Yield `features` of at most `frames` frames, drawn from all, in parts."""
        rows = self.random_rows(min(len(self), frames), np.random.default_rng(seed))
        for part in np.array_split(rows, -(-len(rows) // FRAMES_AT_ONCE)):
            yield self.features(part)

    def random_rows(self, frames: int, rng: np.random.Generator) -> NDArray[np.integer]:
        """Draw frames, each at most once, ascending: the order in which a store reads fastest."""
        return np.sort(rng.choice(len(self), frames, replace=False))


class Fitting(nn.Module):
    """A network in training: the part that is kept, and what only the training needs.

    Attributes:
        kept: its state dict becomes the weights file. Register it under this name only: checkpoints contain every tensor once.
    """

    kept: nn.Module

    def weights(self) -> dict[str, Tensor]:
        """Return the tensors of the weights file: those of `kept`, and what a subclass adds."""
        return self.kept.state_dict()

    def rows(self, rng: np.random.Generator) -> NDArray[np.integer]:
        """Draw the frames of a batch; a pure function of the generator."""
        raise NotImplementedError

    def loss(self, rows: NDArray[np.integer]) -> dict[str, Tensor]:
        """Compute `loss`, which is minimised, and scalars to log. May draw from torch's generator."""
        raise NotImplementedError


@dataclass(frozen=True)
class ReconstructionOptions(FitOptions):
    """How they are trained."""

    batch: Annotated[int, Ge(2)] = option(128)
    decoder: Literal["tokens", "pixels"] = option(
        "tokens", "What is reconstructed: tokens, the cached features, or pixels, the frames."
    )

    @property
    def needs_images(self) -> bool:
        """Whether the training looks at frames."""
        return self.decoder == "pixels"


class Standardise(nn.Module):
    """Scales channels to mean 0 and deviation 1 over the patches of the training frames; constant channels become 0."""

    mean: Tensor
    std: Tensor

    def __init__(self, dim: int) -> None:
        """Set the number of channels."""
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    def forward(self, values: Tensor) -> Tensor:
        """[..., dim] -> the same."""
        return (values - self.mean) / self.std

    def fit_statistics(self, moments: tuple[Tensor, Tensor]) -> None:
        """Set a layer's mean and deviation, each [dim]."""
        mean, std = moments
        self.mean.copy_(mean)
        self.std.copy_(std.clamp_min(SMALLEST_DEVIATION))


def patch_moments(data: FitData, layers: Sequence[str], seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Compute for each layer the mean and deviation, each [channels], of the patches of a sample of frames, without prefix tokens."""
    count, totals, squares = 0, dict.fromkeys(layers, torch.zeros(())), dict.fromkeys(layers, torch.zeros(()))
    for features in data.sample_features(SAMPLED_FRAMES, seed):
        for layer in layers:
            values = features.patches(layer).cpu().double().flatten(0, 1)
            totals[layer], squares[layer] = totals[layer] + values.sum(0), squares[layer] + values.square().sum(0)
        count += len(values)
    means = {layer: total / count for layer, total in totals.items()}
    return {layer: (means[layer], (squares[layer] / count - means[layer] ** 2).clamp_min(0).sqrt()) for layer in layers}


class PixelDecoder(nn.Module):
    """Token grid [B, N, D], row-major, to normalised images [B, 3, S, S].

    The network predicts the difference from the mean frame, so that a ball of a few pixels is not outweighed by walls.
    """

    background: Tensor

    def __init__(self, grid: tuple[int, int], dim: int, image_size: int, width: int = 64) -> None:
        """Build the scales, each with half the channels of the one before; `width` are those of the coarsest."""
        super().__init__()
        self.grid = grid
        self.stem = nn.Sequential(nn.Conv2d(dim, width, 3, padding=1), _Residual(width))
        self.scales = nn.Sequential()
        side = min(grid)
        while 2 * side < image_size:
            narrower = max(NARROWEST, width // 2)
            # Convolve, then shuffle: the convolution runs at a quarter of the positions.
            self.scales.append(
                nn.Sequential(nn.Conv2d(width, 4 * narrower, 3, padding=1), nn.PixelShuffle(2), _Residual(narrower))
            )
            side, width = 2 * side, narrower
        self.resize = nn.Upsample((image_size, image_size), mode="bilinear", align_corners=False)
        self.last = nn.Conv2d(width, 3, 3, padding=1)
        self.register_buffer("background", torch.zeros(3, image_size, image_size))

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class; not clamped."""
        rows, columns = self.grid
        maps = self.scales(self.stem(rearrange(tokens, "b (h w) d -> b d h w", h=rows, w=columns)))
        drawn: Tensor = self.background + self.last(self.resize(maps))
        return drawn

    def fit_statistics(self, images: Tensor) -> None:
        """Set the background to the mean of images [n, 3, S, S]."""
        self.background.copy_(images.mean(0))


class _Residual(nn.Module):
    """Two 3 x 3 convolutions beside the identity, [B, C, h, w] -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.GroupNorm(1, channels),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, maps: Tensor) -> Tensor:
        added: Tensor = maps + self.block(maps)
        return added


class TokenDecoder(nn.Module):
    """A transformer of two layers, latents [B, tokens, dim] to features [B, tokens, feature_dim]."""

    def __init__(self, tokens: int, dim: int, feature_dim: int, width: int = 128) -> None:
        """Build the layers."""
        super().__init__()
        self.enter = nn.Linear(dim, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.mixer = nn.TransformerEncoder(transformer_layer(width), 2, enable_nested_tensor=False)
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, feature_dim))

    def forward(self, latents: Tensor) -> Tensor:
        """See the class."""
        features: Tensor = self.leave(self.mixer(self.enter(latents) + self.position))
        return features


class Reconstruction(nn.Module):
    """A decoder and its error: L1 of normalised pixels, or MSE of standardised features."""

    def __init__(self, data: FitData, options: ReconstructionOptions, dim: int, layers: Sequence[str]) -> None:
        """Make the decoder of latents of `dim` channels; `layers` are the features to reconstruct."""
        super().__init__()
        self.data, (rows, columns), dims = data, data.backbone.grid, data.backbone.dims
        self.targets = nn.ModuleDict()
        self.decoder: PixelDecoder | TokenDecoder
        if options.needs_images:
            self.decoder = PixelDecoder((rows, columns), dim, data.preprocess.image_size)
            self.decoder.fit_statistics(data.sample_pixels(options.seed))
        else:
            self.decoder = TokenDecoder(rows * columns, dim, sum(dims[layer] for layer in layers))
            for layer, moments in patch_moments(data, layers, options.seed).items():
                self.targets[layer] = target = Standardise(dims[layer])
                target.fit_statistics(moments)

    def forward(self, latents: Tensor, features: Features, rows: NDArray[np.integer]) -> Tensor:
        """Return the error of decoded latents [B, N, dim] against their features or the frames `rows`; a scalar."""
        drawn = self.decoder(latents).float()
        if not self.targets:
            return F.l1_loss(drawn, self.data.pixels(rows))
        target = torch.cat([standardise(features.patches(layer)) for layer, standardise in self.targets.items()], -1)
        return F.mse_loss(drawn, target)


class ReconstructionFitting(Fitting):
    """Training of an adapter by reconstruction."""

    options: ReconstructionOptions

    def __init__(self, name: str, layers: Sequence[str], data: FitData, options: ReconstructionOptions) -> None:
        """Raise UserError if the base's store lacks a layer that the adapter reads."""
        super().__init__()
        self.data, self.options = data, options
        assert data.base is not None
        if missing := [layer for layer in layers if layer not in data.base.head.layers]:
            raise UserError(
                f"{name} reads {', '.join(layers)} features, and the store has no {', '.join(missing)} ones; "
                "fit it on a store of layers, for example of --encoder dinov2-layers"
            )

    def rows(self, rng: np.random.Generator) -> NDArray[np.integer]:
        """Draw any frames."""
        return self.data.random_rows(self.options.batch, rng)
