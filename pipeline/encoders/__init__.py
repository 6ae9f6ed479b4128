"""Encoders: frame -> patch tokens. A new encoder is a file in this folder that calls `register`; CONTRIBUTING.md has an example."""

from wmcache.pipeline.encoders.base import COSINE_TOLERANCE, Encoder, EncoderSpec, encode_together
from wmcache.pipeline.encoders.fitting import FitOptions
from wmcache.pipeline.encoders.registry import (
    ENCODERS,
    create,
    create_again,
    family_of,
    fit_options,
    get_entry,
    get_fit,
    get_spec,
    register,
    register_adapter,
    register_fit,
    specs,
)

__all__ = [
    "COSINE_TOLERANCE",
    "ENCODERS",
    "Encoder",
    "EncoderSpec",
    "FitOptions",
    "create",
    "create_again",
    "encode_together",
    "family_of",
    "fit_options",
    "get_entry",
    "get_fit",
    "get_spec",
    "register",
    "register_adapter",
    "register_fit",
    "specs",
]
