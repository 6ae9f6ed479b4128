"""Encoders: frame -> patch tokens. One file for each family; each registers its encoders by name.

To add one, write a file that calls `register` (see `dinov2.py`, the shortest), and import it at the end of this one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wmcache.cache.errors import UserError
from wmcache.cache.schema import Size, parse
from wmcache.pipeline.encoders import dinov2, tcn
from wmcache.pipeline.encoders.base import COSINE_TOLERANCE, Encoder, EncoderSpec, FitOptions, Fitter, Loader

_REGISTRY: dict[str, tuple[EncoderSpec, Loader, Fitter | None]] = {}


def register(spec: EncoderSpec, load: Loader, fit: Fitter | None = None) -> None:
    """Make an encoder known by its name.

    Args:
        spec: what is known of it before its weights are loaded.
        load: makes the network.
        fit: trains it on a dataset's own frames, for encoders that need no download.

    Raises:
        ValueError: the name is taken.
    """
    if spec.name in _REGISTRY:
        raise ValueError(f"encoder {spec.name} is registered already")
    _REGISTRY[spec.name] = (spec, load, fit)


def specs() -> list[EncoderSpec]:
    """All known encoders, by name."""
    return [_REGISTRY[name][0] for name in sorted(_REGISTRY)]


def get_spec(name: str) -> EncoderSpec:
    """What is known of an encoder.

    Raises:
        UserError: unknown name; the message lists those that exist.
    """
    if name not in _REGISTRY:
        raise UserError(f"no encoder {name!r}; known are {', '.join(sorted(_REGISTRY))} (see: wmcache encoders)")
    return _REGISTRY[name][0]


def get_fitter(name: str) -> Fitter:
    """What `wmcache fit` runs.

    Raises:
        UserError: the encoder is unknown or is not fitted.
    """
    spec = get_spec(name)
    fitter = _REGISTRY[name][2]
    if fitter is None:
        fittable = ", ".join(known for known, entry in sorted(_REGISTRY.items()) if entry[2])
        raise UserError(
            f"encoder {name} is not fitted on a dataset, it comes from {spec.source}; those that are: {fittable}"
        )
    return fitter


def create(
    name: str,
    *,
    weights: str | Path | None = None,
    image_size: int | None = None,
    normalisation: str | None = None,
    dtype: str | None = None,
    device: str = "auto",
) -> Encoder:
    """An encoder with its weights, ready to call.

    Args:
        name: in the registry.
        weights: a safetensors file; None takes the encoder's own source (a model hub, for most).
        image_size: side of the image that the network sees; None takes the encoder's default.
        normalisation: `half` (DINO-WM) or `imagenet` (official); None takes the encoder's default.
        dtype: `float32`, `bfloat16` or `auto`; None takes the encoder's default.
        device: `auto`, `cpu`, `cuda`, …

    Raises:
        UserError: unknown name, missing or unfitting weights, no network, or an option that does not fit.
    """
    spec = get_spec(name)
    if weights is not None:
        weights = Path(weights)
        if weights.suffix != ".safetensors" or not weights.is_file():
            raise UserError(
                f"--weights {weights}: not an existing .safetensors file (nothing else is read: it could hold code)"
            )
    return Encoder(
        spec,
        _REGISTRY[name][1],
        weights=weights,
        image_size=image_size,
        normalisation=normalisation,
        dtype=dtype,
        device=device,
    )


@dataclass(frozen=True)
class _Recipe:
    """What `Encoder.recipe` gives, as a store's card holds it."""

    name: str
    weights: str | None
    image_size: Size
    normalisation: str
    dtype: str


def create_again(recipe: dict[str, Any], *, weights: Path | None = None, device: str = "auto") -> Encoder:
    """The encoder of a store's card, which may be anybody's.

    Args:
        recipe: `card.encoder`.
        weights: where they are now, if not where they were.
        device: as in `create`.

    Raises:
        UserError: as `create`; or the recipe is none.
    """
    known = parse(_Recipe, recipe, "the recipe of the store's encoder", "extract the store again")
    return create(**{**asdict(known), "weights": weights or known.weights}, device=device)


register(dinov2.SPEC, dinov2.load)
register(tcn.SPEC, tcn.load, tcn.fit)

__all__ = [
    "COSINE_TOLERANCE",
    "Encoder",
    "EncoderSpec",
    "FitOptions",
    "create",
    "create_again",
    "get_fitter",
    "get_spec",
    "register",
    "specs",
]
