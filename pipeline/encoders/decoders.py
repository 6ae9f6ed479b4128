"""Decoders for training adapters: from latents to images, or to the features that they compress. They are not saved."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

NARROWEST = 16


class PixelDecoder(nn.Module):
    """Token grid [B, N, D], row-major, to normalised images [B, 3, S, S].

    Each scale doubles the grid and halves the channels. The network predicts the difference from the mean frame, so that a ball of a few
    pixels is not outweighed by walls.
    """

    def __init__(self, grid: tuple[int, int], dim: int, image_size: int, width: int = 64) -> None:
        """Build the scales; `dim` is D, `image_size` is S, `width` the channels of the coarsest scale."""
        super().__init__()
        self.grid, self.image_size = grid, image_size
        self.stem = nn.Sequential(nn.Conv2d(dim, width, 3, padding=1), Residual(width))
        self.scales = nn.Sequential()
        side = min(grid)
        while 2 * side < image_size:
            narrower = max(NARROWEST, width // 2)
            # Convolve, then shuffle: the convolution runs at a quarter of the positions.
            self.scales.append(
                nn.Sequential(nn.Conv2d(width, 4 * narrower, 3, padding=1), nn.PixelShuffle(2), Residual(narrower))
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

    background: Tensor


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside the identity, [B, C, h, w] -> the same."""

    def __init__(self, channels: int) -> None:
        """Keep the number of channels C."""
        super().__init__()
        self.block = nn.Sequential(
            nn.GroupNorm(1, channels),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, maps: Tensor) -> Tensor:
        """See the class."""
        added: Tensor = maps + self.block(maps)
        return added


class TokenDecoder(nn.Module):
    """Latents [B, N, d] to features [B, N, D]: a small transformer."""

    def __init__(
        self, tokens: int, dim: int, feature_dim: int, width: int = 128, depth: int = 2, heads: int = 4
    ) -> None:
        """Build a transformer of `depth` layers for N `tokens`, from `dim` d to `feature_dim` D."""
        super().__init__()
        self.enter = nn.Linear(dim, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, dim_feedforward=2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.mixer = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, feature_dim))

    def forward(self, latents: Tensor) -> Tensor:
        """See the class."""
        features: Tensor = self.leave(self.mixer(self.enter(latents) + self.position))
        return features
