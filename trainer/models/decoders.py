"""Decoders from cached tokens to images, to look at latents with; nothing plans or learns dynamics through them.

The two of DINO-WM (arXiv 2411.04983, appendix; models/decoder/transposed_conv.py, models/vqvae.py). Beyond the reference: tokens are
standardised per channel, the network draws what differs from the mean frame, tokens come in any grid and images in any size, and the
transposed convolutions take more than one token.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from wmcache.common.errors import UserError
from wmcache.common.options import option
from wmcache.common.schema import Size

DEAD = 0.01
"""Of its equal share of the tokens, what an entry of a codebook has to be nearest to."""

Channels = Annotated[int, Field(gt=0, le=8192)]


@dataclass(frozen=True)
class DecoderShape:
    """What a decoder must know of the data.

    Attributes:
        rows, columns: of the token grid.
        token_dim: D.
        image_size: side of the square images, in pixels.
    """

    rows: Size
    columns: Size
    token_dim: Size
    image_size: Annotated[int, Field(gt=0, le=8192)]


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


@dataclass(frozen=True)
class TransposedConvOptions:
    """Sizes of the decoder from few tokens; the default is the reference's.

    The first map has 32 * depth channels, the five layers 8, 4, 2 and 1 times depth, and 3.
    """

    depth: Annotated[int, Field(gt=0, le=1024)] = option(
        64, "Channels of the first map, divided by 32.", group="Decoder"
    )


class Decoder(nn.Module):
    """Tokens [B, N, D], in the store's own units, to images [B, 3, S, S] around [-1, 1]."""

    def __init__(self, shape: DecoderShape, statistics: Mapping[str, Tensor]) -> None:
        """Build what all decoders share.

        Args:
            shape: sizes of the data.
            statistics: `tokens_mean` and `tokens_std` [D], and `images_mean` [3, S, S], the mean frame, kept as buffers.
        """
        super().__init__()
        self.shape = shape
        self.register_buffer("images_mean", statistics["images_mean"].float())
        self.register_buffer("tokens_mean", statistics["tokens_mean"].float())
        self.register_buffer("tokens_std", statistics["tokens_std"].float().clamp_min(1e-6))

    def draw(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What is to be added to the mean frame.

        Args:
            tokens: [B, N, D], standardised.

        Returns:
            [B, 3, h, w] of any size, and what belongs into the loss beside the error of the images; a scalar.
        """
        raise NotImplementedError

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class; float32, not clamped."""
        return self._images(tokens)[0]

    def loss(self, tokens: Tensor, images: Tensor) -> dict[str, Tensor]:
        """Training loss.

        Args:
            tokens: [B, N, D], fixed: nothing flows back into whatever made them.
            images: [B, 3, S, S] in [-1, 1].

        Returns:
            `loss` to descend and `mse`, its part that is the error of the images; scalars.
        """
        drawn, extra = self._images(tokens.detach())
        mse = F.mse_loss(drawn, images)
        return {"loss": mse + extra, "mse": mse}

    def _images(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        drawn, extra = self.draw((tokens.float() - self.tokens_mean) / self.tokens_std)
        size = (self.shape.image_size,) * 2
        if drawn.shape[-2:] != size:
            drawn = F.interpolate(drawn.float(), size, mode="bilinear", antialias=True, align_corners=False)
        return self.images_mean + drawn.float(), extra

    images_mean: Tensor
    tokens_mean: Tensor
    tokens_std: Tensor


class VqVaeDecoder(Decoder):
    """Two equal stacks, each of which makes the grid four times as fine: 14 x 14 tokens become 224 x 224 pixels.

    The image is 16 times the token grid, resized bilinearly where frames have another size.
    """

    def __init__(self, shape: DecoderShape, options: VqVaeOptions, statistics: Mapping[str, Tensor]) -> None:
        """Args: see `Decoder`; `options` the sizes of the network."""
        super().__init__(shape, statistics)
        self.options = options
        self.codebook = Codebook(options.codes, shape.token_dim, options.decay) if options.quantize else None
        self.first = make_stack(shape.token_dim, shape.token_dim, options)
        self.second = make_stack(shape.token_dim, 3, options)

    def draw(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """See `Decoder.draw`."""
        extra = tokens.new_zeros(())
        if self.codebook is not None:
            tokens, distance = self.codebook(tokens)
            extra = self.options.commitment * distance
        grid = rearrange(tokens, "b (r c) d -> b d r c", r=self.shape.rows)
        return self.second(self.first(grid)), extra


class TransposedConvDecoder(Decoder):
    """From all tokens of a frame as one vector to a 1 x 1 map, and five transposed convolutions up to 243 x 243.

    The reference has it for encoders of a single token. Of more tokens each keeps its own weights (their mean would forget where things
    are), so it is meant for few.
    """

    def __init__(self, shape: DecoderShape, options: TransposedConvOptions, statistics: Mapping[str, Tensor]) -> None:
        """Args: see `Decoder`; `options` the sizes of the network."""
        super().__init__(shape, statistics)
        channels = [32 * options.depth, 8 * options.depth, 4 * options.depth, 2 * options.depth, options.depth, 3]
        self.project = nn.Linear(shape.rows * shape.columns * shape.token_dim, channels[0])
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(channels):
            layers += [nn.ConvTranspose2d(fan_in, fan_out, 5, stride=3, padding=1), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def draw(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """See `Decoder.draw`."""
        return self.layers(self.project(tokens.flatten(1))[:, :, None, None]), tokens.new_zeros(())


class Codebook(nn.Module):
    """Vectors that follow the mean of the tokens nearest to them (VQ-VAE, arXiv 1711.00937, appendix A.1); no gradient moves them.

    Beyond the reference: an entry that hardly any token is near to begins anew as a token of the batch (Jukebox, arXiv 2005.00341,
    section 3.1), as all do at the first step. Of entries that begin at random only a handful would ever be used.
    """

    def __init__(self, codes: int, dim: int, decay: float) -> None:
        """Args: `codes` entries of `dim` channels, which forget with `decay` a step."""
        super().__init__()
        self.decay = decay
        self.register_buffer("entries", torch.zeros(codes, dim))
        self.register_buffer("count", torch.zeros(codes))
        self.register_buffer("total", torch.zeros(codes, dim))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N, D] -> the nearest entry of each, the same shape, and their mean squared distance."""
        with torch.autocast(tokens.device.type, enabled=False):
            flat = tokens.float().flatten(0, 1)
            if self.training:
                self._revive(flat.detach())
            nearest = torch.cdist(flat, self.entries).argmin(1)
            chosen = self.entries[nearest].view_as(tokens)
            if self.training:
                self._follow(flat.detach(), nearest)
            return tokens + (chosen - tokens).detach(), F.mse_loss(tokens.float(), chosen)

    @torch.no_grad()
    def _follow(self, flat: Tensor, nearest: Tensor) -> None:
        new = torch.zeros_like(self.count).index_add_(0, nearest, torch.ones_like(flat[:, 0]))
        self.count.lerp_(new, 1 - self.decay)
        self.total.lerp_(torch.zeros_like(self.total).index_add_(0, nearest, flat), 1 - self.decay)
        self.entries.copy_(self.total / self.count.clamp_min(1e-12)[:, None])

    @torch.no_grad()
    def _revive(self, flat: Tensor) -> None:
        share = len(flat) / len(self.count)
        dead = self.count < DEAD * share
        if dead.any():
            chosen = flat[torch.randint(len(flat), (int(dead.sum()),)).to(flat.device)]
            self.entries[dead], self.total[dead], self.count[dead] = chosen, chosen * share, share

    entries: Tensor
    count: Tensor
    total: Tensor


class ResidualBlock(nn.Module):
    """[B, channels, h, w] -> the same."""

    def __init__(self, channels: int, hidden: int) -> None:
        """Args: its channels, outside and inside."""
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(), nn.Conv2d(channels, hidden, 3, padding=1), nn.ReLU(), nn.Conv2d(hidden, channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return torch.add(x, self.layers(x))


def make_stack(fan_in: int, fan_out: int, options: VqVaeOptions) -> nn.Sequential:
    """[B, fan_in, h, w] -> [B, fan_out, 4 h, 4 w]."""
    channels = options.channels
    return nn.Sequential(
        nn.Conv2d(fan_in, channels, 3, padding=1),
        *(ResidualBlock(channels, options.residual) for _ in range(options.blocks)),
        nn.ReLU(),
        nn.ConvTranspose2d(channels, max(1, channels // 2), 4, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(max(1, channels // 2), fan_out, 4, stride=2, padding=1),
    )


DECODERS: dict[str, tuple[type[Any], Callable[..., Decoder]]] = {
    "vqvae": (VqVaeOptions, VqVaeDecoder),
    "transposed-conv": (TransposedConvOptions, TransposedConvDecoder),
}
"""Name -> (options dataclass, module)."""


def build_decoder(
    name: str, shape: DecoderShape, options: Mapping[str, Any], statistics: Mapping[str, Tensor]
) -> Decoder:
    """A new decoder.

    Args:
        name: in DECODERS.
        shape: sizes of the data.
        options: fields of the decoder's options dataclass.
        statistics: see `Decoder`.

    Raises:
        UserError: unknown name or option.
    """
    if name not in DECODERS:
        raise UserError(f"no decoder {name!r}; known are {', '.join(DECODERS)}")
    make_options, make_decoder = DECODERS[name]
    try:
        chosen = make_options(**options)
    except TypeError as error:
        raise UserError(f"decoder {name} has no such option ({error})") from error
    return make_decoder(shape, chosen, statistics)
