"""Decoders from cached tokens to images; they show latents, and no model plans or learns dynamics through them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from wmcache.common.options import parse_options
from wmcache.common.registry import Registry
from wmcache.trainer.decoders.base import Decoder, DecoderShape

DECODERS: Registry[type[Decoder]] = Registry("decoder", package=__name__, group="wmcache.decoders")


def build_decoder(
    name: str, shape: DecoderShape, options: Mapping[str, Any], statistics: Mapping[str, Tensor]
) -> Decoder:
    """Make a new decoder, see `Decoder`; raises UserError for an unknown name or option."""
    kind = DECODERS.get(name)
    return kind(shape, parse_options(kind.Options, dict(options), f"decoder {name}"), statistics)


__all__ = ["DECODERS", "Decoder", "DecoderShape", "build_decoder"]
