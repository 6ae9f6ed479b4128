"""The beta-VAE of DisWM's student (arXiv 2503.08751) as an encoder: the means of its latents, on the tokens that it was trained on.

`wmtrain --model diswm` writes its weights, a file for each end of a training, so that stores of a student that is trained further differ
in their identity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from wmcache.common.errors import UserError
from wmcache.engine.token_vae import MeanEncoder, TokenDecoder, VaeSizes
from wmcache.pipeline.encoders.base import SELECTIONS, Backbone, EncoderSpec, Features, Head, Select
from wmcache.pipeline.encoders.registry import register_adapter

SPEC = EncoderSpec(
    name="diswm",
    summary="means of the latents of DisWM's beta-VAE, trained in its world model (wmtrain --model diswm)",
    image_size=64,
    patch=64,
    token_dim=20,
    source="wmtrain --model diswm",
    licence="yours, on the base's",
    token_selection="latents of a world model's beta-VAE",
)


@dataclass(frozen=True)
class DiswmSettings:
    """What a file of its weights records: sizes, and the selection of the base's tokens, as in a store's identity."""

    sizes: VaeSizes
    selection: Annotated[str, Field(max_length=200)]


class _Redraw(TokenDecoder):
    def forward(self, latents: Tensor) -> Tensor:
        return super().forward(latents[:, 0])


def make_redraw(settings: DiswmSettings) -> nn.Module:
    """Return what turns latents [B, 1, Z] into the base's tokens."""
    return _Redraw(settings.sizes)


@register_adapter(SPEC, base="vae", options=DiswmSettings, redraw=make_redraw)
class _DiswmHead(Head):
    grid = (1, 1)

    def __init__(self, backbone: Backbone, settings: DiswmSettings) -> None:
        super().__init__()
        self.base_selection = settings.selection.partition(", of the frame")[0]
        if self.base_selection not in SELECTIONS:
            raise UserError(f"{SPEC.name} cannot be an encoder on an adapter's tokens ({self.base_selection[:80]})")
        self.select = Select(backbone, self.base_selection)
        self.layers, self.prefix, self.dim = self.select.layers, self.select.prefix, settings.sizes.latents
        rows, columns = self.select.grid
        if (rows * columns, self.select.dim) != (settings.sizes.tokens, settings.sizes.channels):
            raise UserError(f"{SPEC.name} was trained on other tokens than {rows} x {columns} of {self.select.dim}")
        self.encoder = MeanEncoder(settings.sizes)

    def forward(self, features: Features) -> Tensor:
        tokens = self.select(features).half()  # as in the store that it was trained on
        mean: Tensor = self.encoder(tokens)
        return mean[:, None]
