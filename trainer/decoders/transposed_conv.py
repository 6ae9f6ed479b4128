"""The decoder of DINO-WM for encoders of a single token (arXiv 2411.04983, appendix; models/decoder/transposed_conv.py)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from wmcache.common.options import option
from wmcache.trainer.decoders import DECODERS, Decoder, DecoderShape


@dataclass(frozen=True)
class TransposedConvOptions:
    """Sizes of the decoder from few tokens; the default is the reference's."""

    depth: Annotated[int, Field(gt=0, le=1024)] = option(
        64, "Channels of the first map, divided by 32.", group="Decoder"
    )


@DECODERS.register("transposed-conv")
class TransposedConvDecoder(Decoder):
    """From all tokens of a frame as one vector, so use it for few, to a 1 x 1 map, and five transposed convolutions up to 243 x 243."""

    Options = TransposedConvOptions
    options: TransposedConvOptions

    def __init__(self, shape: DecoderShape, options: TransposedConvOptions, statistics: Mapping[str, Tensor]) -> None:
        """See `Decoder`."""
        super().__init__(shape, options, statistics)
        channels = [*(factor * options.depth for factor in (32, 8, 4, 2, 1)), 3]
        self.project = nn.Linear(shape.rows * shape.columns * shape.token_dim, channels[0])
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(channels):
            layers += [nn.ConvTranspose2d(fan_in, fan_out, 5, stride=3, padding=1), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def draw(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """See `Decoder.draw`."""
        return self.layers(self.project(tokens.flatten(1))[:, :, None, None]), tokens.new_zeros(())
