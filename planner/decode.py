"""Latents of a run's store as frames, by its encoder's own decoder or by a trained one; for pictures alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wmcache.cache.identity import Identity
from wmcache.common.device import choose_device
from wmcache.common.errors import UserError
from wmcache.common.paths import AnyPath
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import Encoder
from wmcache.trainer.decoder import load_decoder
from wmcache.trainer.decoders import Decoder
from wmcache.trainer.metrics import Images, to_pixels, to_unit
from wmcache.trainer.runs import read_identity

Decode = Callable[[Tensor], Images]
"""Latents [n, N, D] in the store's units -> frames, uint8 [n, S, S, 3]."""
AT_ONCE = 64


def open_decode(run: Path, decoder: Path | None = None, *, weights: Path | None = None, device: str = "cpu") -> Decode:
    """Return what draws the latents of a run.

    Args:
        decoder: of a store of the same encoder, trained with `wmtrain decoder`; None: the encoder's own.
        weights: the encoder's, if they have moved.

    Raises:
        UserError: the decoder is of another encoder, or the encoder has none.
    """
    if decoder is None:
        return open_encoder(run, weights=weights, device=device).decode
    return open_trained(decoder, read_identity(run)[1], run, device)


def open_trained(decoder: Path, identity: Identity, owner: AnyPath, device: str) -> Decode:
    """Return what draws the latents of a run or a store, `owner`, by a decoder that `wmtrain decoder` trained.

    Raises:
        UserError: the decoder is of another encoder than that of `identity`.
    """
    other = read_identity(decoder)[1]
    if different := identity.differences(replace(other, dataset_fingerprint=identity.dataset_fingerprint)):
        raise UserError(f"{decoder} is not of the encoder of {owner}: {'; '.join(different)}; pass another --decoder")
    network = load_decoder(decoder, choose_device(device))

    @torch.no_grad()
    def decode(latents: Tensor) -> Images:
        parts = torch.split(latents.to(network.tokens_mean.device), AT_ONCE)
        return np.concatenate([to_pixels(network(part)) for part in parts])

    return decode


def open_encoder(run: Path, *, weights: Path | None = None, device: str = "cpu") -> Encoder:
    """Load the encoder of a run's store; raises UserError as `load_encoder` does, or where it has no decoder."""
    encoder = load_encoder(run, weights, device)
    if encoder.decoder is None:
        raise UserError(
            f"{encoder.spec.name}, the encoder of {run}, has no decoder; train one with: wmtrain decoder --cache STORE, and pass "
            "it as --decoder"
        )
    return encoder


@dataclass(frozen=True)
class OwnDecoder:
    """An encoder's own decoder as a function of latents [B, N, D], to images [B, 3, S, S] in [-1, 1] of S = `image_size`."""

    encoder: Encoder
    image_size: int

    def __call__(self, latents: Tensor) -> Tensor:
        """Draw."""
        drawn = to_unit(self.encoder.decode(latents)).to(latents.device)
        return F.interpolate(drawn, (self.image_size,) * 2, mode="bilinear", antialias=True, align_corners=False)


Draw = Decoder | OwnDecoder


def load_encoder(run: Path, weights: Path | None, device: str) -> Encoder:
    """Load the encoder of a run's store; raises UserError where its weights are missing or other ones."""
    card, identity = read_identity(run)
    kept = card.encoder.get("weights")
    if weights is None and kept and not Path(kept).exists():
        raise UserError(f"the encoder's weights are missing: {kept}, of {run}; pass their path with --weights")
    encoder = encoders.create_again(card.encoder, weights=weights, device=device)
    if different := identity.differences(encoder.identity(identity.dataset_fingerprint, identity.store_dtype)):
        raise UserError(f"not the encoder of {run}: {'; '.join(different)}; pass the right --weights")
    return encoder
