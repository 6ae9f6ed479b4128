"""The patch decoder of DINO-WM (arXiv 2411.04983, appendix; models/vqvae.py), for token grids and images of any size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from wmcache.common.options import option
from wmcache.common.schema import Size
from wmcache.engine.codebook import Codebook
from wmcache.trainer.decoders import DECODERS, Decoder, DecoderShape

Channels = Annotated[int, Field(gt=0, le=8192)]


@dataclass(frozen=True)
class VqVaeOptions:
    """Sizes of the patch decoder; the defaults are the reference's."""

    channels: Channels = option(384, "Channels of both stacks.", group="Decoder")
    residual: Channels = option(128, "Channels inside a residual block.")
    blocks: Annotated[int, Field(ge=0, le=64)] = option(4, "Residual blocks of a stack.")
    quantize: bool = option(False, "Round tokens to a codebook first.", flag="--quantize")
    codes: Size = option(2048, "Entries of the codebook.")
    decay: Annotated[float, Field(ge=0, lt=1)] = option(0.99, "Decay of the moving averages of the entries.")
    commitment: Annotated[float, Field(ge=0, le=100)] = option(
        0.25, "Weight of the distance between tokens and entries in the loss."
    )


@DECODERS.register("vqvae")
class VqVaeDecoder(Decoder):
    """Two equal stacks that each make the grid four times as fine: 14 x 14 tokens become 224 x 224 pixels."""

    Options = VqVaeOptions
    options: VqVaeOptions

    def __init__(self, shape: DecoderShape, options: VqVaeOptions, statistics: Mapping[str, Tensor]) -> None:
        """See `Decoder`."""
        super().__init__(shape, options, statistics)
        self.codebook = Codebook(options.codes, shape.token_dim, options.decay) if options.quantize else None
        self.first = _make_stack(shape.token_dim, shape.token_dim, options)
        self.second = _make_stack(shape.token_dim, 3, options)

    def draw(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """See `Decoder.draw`."""
        extra = tokens.new_zeros(())
        if self.codebook is not None:
            tokens, distance = self.codebook(tokens)
            extra = self.options.commitment * distance
        grid = rearrange(tokens, "b (r c) d -> b d r c", r=self.shape.rows)
        return self.second(self.first(grid)), extra


class _ResidualBlock(nn.Module):
    """[B, channels, h, w] -> the same."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        first, second = nn.Conv2d(channels, hidden, 3, padding=1), nn.Conv2d(hidden, channels, 1)
        self.layers = nn.Sequential(nn.ReLU(), first, nn.ReLU(), second)

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.layers(x))


def _make_stack(fan_in: int, fan_out: int, options: VqVaeOptions) -> nn.Sequential:
    """[B, fan_in, h, w] -> [B, fan_out, 4 h, 4 w]."""
    channels, half = options.channels, max(1, options.channels // 2)
    return nn.Sequential(
        nn.Conv2d(fan_in, channels, 3, padding=1),
        *(_ResidualBlock(channels, options.residual) for _ in range(options.blocks)),
        nn.ReLU(),
        nn.ConvTranspose2d(channels, half, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(half, fan_out, 4, stride=2, padding=1),
    )
