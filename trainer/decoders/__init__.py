"""Decoders from cached tokens to images; they show latents, and no model plans or learns dynamics through them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from wmcache.common.options import parse_options
from wmcache.common.registry import Registry
from wmcache.common.schema import Size


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of the data: rows and columns of the token grid, D, and the side of the square images in pixels."""

    rows: Size
    columns: Size
    token_dim: Size
    image_size: Annotated[int, Field(gt=0, le=8192)]


class Decoder(nn.Module, ABC):
    """Tokens [B, N, D] in the store's units to images [B, 3, S, S], float32 around [-1, 1].

    Beyond the reference (DINO-WM), tokens are standardised per channel, the network draws the difference from the mean frame, and images
    have any size.
    """

    Options: ClassVar[type[Any]]
    images_mean: Tensor
    tokens_mean: Tensor
    tokens_std: Tensor

    def __init__(self, shape: DecoderShape, options: Any, statistics: Mapping[str, Tensor]) -> None:
        """Register `tokens_mean` and `tokens_std` [D], and `images_mean` [3, S, S], the mean frame."""
        super().__init__()
        self.shape, self.options = shape, options
        self.register_buffer("images_mean", statistics["images_mean"].float())
        self.register_buffer("tokens_mean", statistics["tokens_mean"].float())
        self.register_buffer("tokens_std", statistics["tokens_std"].float().clamp_min(1e-6))

    @property
    def image_size(self) -> int:
        """S."""
        return self.shape.image_size

    @abstractmethod
    def draw(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Draw the difference from the mean frame, standardised [B, N, D] -> [B, 3, h, w] of any size, and a scalar to add to the loss."""

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class; not clamped."""
        return self._images(tokens)[0]

    def loss(self, tokens: Tensor, images: Tensor) -> dict[str, Tensor]:
        """Compute `loss`, and `mse`, its part that is the error of images [B, 3, S, S] in [-1, 1]; scalars."""
        drawn, extra = self._images(tokens.detach())
        mse = F.mse_loss(drawn, images)
        return {"loss": mse + extra, "mse": mse}

    def _images(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        drawn, extra = self.draw((tokens.float() - self.tokens_mean) / self.tokens_std)
        size = (self.shape.image_size,) * 2
        if drawn.shape[-2:] != size:
            drawn = F.interpolate(drawn.float(), size, mode="bilinear", antialias=True, align_corners=False)
        return self.images_mean + drawn.float(), extra


DECODERS: Registry[type[Decoder]] = Registry("decoder", package=__name__, group="wmcache.decoders")


def build_decoder(
    name: str, shape: DecoderShape, options: Mapping[str, Any], statistics: Mapping[str, Tensor]
) -> Decoder:
    """Make a new decoder, see `Decoder`; raises UserError for an unknown name or option."""
    kind = DECODERS.get(name)
    return kind(shape, parse_options(kind.Options, dict(options), f"decoder {name}"), statistics)
