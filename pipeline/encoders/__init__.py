"""Encoders: frame -> patch tokens. One file for each family; each registers its encoders by name when it is imported here.

To add one, write a file that calls `register` (see `siglip2.py`, the shortest), and import it below; CONTRIBUTING.md has an example, also
of one in a package of your own.
"""

from wmcache.pipeline.encoders import (  # noqa: F401 (they register)
    changes,
    dino_tok,
    dinov2,
    dinov3,
    floors,
    pca,
    r3m,
    resnet,
    siglip2,
    tcn,
    vae,
    vfm_vae,
    vjepa2,
)
from wmcache.pipeline.encoders.base import COSINE_TOLERANCE, Encoder, EncoderSpec, encode_together
from wmcache.pipeline.encoders.fitting import FitOptions
from wmcache.pipeline.encoders.registry import (
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
