"""Which encoders there are: a name, what is known of it, and how it is made.

An encoder is a family's own (`register`), or an adapter on the features of another one (`register_adapter`); both may be fitted on a
dataset (`register_fit`). Other packages add theirs through entry points of the group `wmcache.encoders`, each of which names a module
that registers encoders when it is imported.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from wmcache.common.errors import UserError
from wmcache.common.options import parse_options
from wmcache.common.schema import Size, parse
from wmcache.pipeline.encoders.base import (
    FILTERS,
    NORMALISATIONS,
    Backbone,
    Encoder,
    EncoderSpec,
    Head,
    Loaded,
    Preprocess,
)
from wmcache.pipeline.encoders.fitting import FitData, FitOptions, Fitting
from wmcache.pipeline.encoders.weights import not_fitted, read_header, read_json_part, require_weights

Loader = Callable[[EncoderSpec, int, Path | None], Loaded]
"""(spec, image size, weights file or folder, None for the spec's source) -> networks."""
Adapter = Callable[[Backbone, dict[str, Any], Path], Head]
"""(backbone of the base, what its fit was told, weights file) -> head with these weights."""
MakeFitting = Callable[[FitData, Any], Fitting]
"""(data, options) -> what is to be trained."""
GROUP = "wmcache.encoders"

L = TypeVar("L", bound=Loader)
A = TypeVar("A", bound=Adapter)
M = TypeVar("M", bound=MakeFitting)


@dataclass(frozen=True)
class Entry:
    """What is registered of an encoder.

    Attributes:
        spec: what it is.
        load: makes it; None for an adapter.
        adapt: makes an adapter's head; None for others.
        base: the encoder whose store an adapter is fitted on unless told; empty for others.
        options, fit: how it is trained; None where it is not.
    """

    spec: EncoderSpec
    load: Loader | None = None
    adapt: Adapter | None = None
    base: str = ""
    options: type[FitOptions] | None = None
    fit: MakeFitting | None = None


_REGISTRY: dict[str, Entry] = {}


def register(spec: EncoderSpec) -> Callable[[L], L]:
    """Make an encoder known: decorates the function that loads it.

    Args:
        spec: what is known of it before its weights are loaded.

    Raises:
        ValueError: the name is taken.
    """

    def add(load: L) -> L:
        _add(Entry(spec, load=load))
        return load

    return add


def register_adapter(spec: EncoderSpec, base: str) -> Callable[[A], A]:
    """Make an adapter known: decorates the function that makes its head.

    Args:
        spec: what is known of it; what it sees of a frame is its base's.
        base: the encoder that it is fitted on unless told; a fitted adapter's file names its own.

    Raises:
        ValueError: the name is taken.
    """

    def add(adapt: A) -> A:
        _add(Entry(spec, adapt=adapt, base=base))
        return adapt

    return add


def register_fit(name: str, options: type[FitOptions]) -> Callable[[M], M]:
    """Make a registered encoder one that `wmcache fit` trains: decorates the function that sets its training up."""

    def add(fit: M) -> M:
        _REGISTRY[name] = replace(_REGISTRY[name], options=options, fit=fit)
        return fit

    return add


def _add(entry: Entry) -> None:
    if entry.spec.name in _REGISTRY:
        raise ValueError(f"encoder {entry.spec.name} is registered already")
    _REGISTRY[entry.spec.name] = entry


@functools.cache
def _discover() -> None:
    """Import what other packages bring.

    Raises:
        UserError: one of them cannot be imported.
    """
    for point in entry_points(group=GROUP):
        try:
            point.load()
        except Exception as error:  # (whatever a stranger's module raises)
            raise UserError(
                f"the encoders of {point.value} cannot be imported ({error}); hint or uninstall that package"
            ) from error


def specs() -> list[EncoderSpec]:
    """All known encoders, by name."""
    _discover()
    return [_REGISTRY[name].spec for name in sorted(_REGISTRY)]


def get_entry(name: str) -> Entry:
    """What is registered of an encoder.

    Raises:
        UserError: unknown name; the message lists those that exist.
    """
    _discover()
    if name not in _REGISTRY:
        near = difflib.get_close_matches(name, _REGISTRY)
        known = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(sorted(_REGISTRY))}"
        raise UserError(f"no encoder {name!r}; {known} (see: wmcache encoders)")
    return _REGISTRY[name]


def get_spec(name: str) -> EncoderSpec:
    """What is known of an encoder; raises as `get_entry`."""
    return get_entry(name).spec


def get_fit(name: str) -> tuple[type[FitOptions], MakeFitting]:
    """The options of an encoder's training, and what sets it up.

    Raises:
        UserError: the encoder is unknown or is not fitted.
    """
    entry = get_entry(name)
    if entry.fit is None or entry.options is None:
        fittable = ", ".join(known for known, other in sorted(_REGISTRY.items()) if other.fit)
        raise UserError(
            f"encoder {name} is not fitted on a dataset, it comes from {entry.spec.source}; those that are: {fittable}"
        )
    return entry.options, entry.fit


def fit_options(name: str, settings: Mapping[str, Any]) -> FitOptions:
    """Options of an encoder's training, the encoder's defaults where nothing is said.

    Raises:
        UserError: the encoder is not fitted, or has no such option.
    """
    kind, _ = get_fit(name)
    return parse_options(kind, dict(settings), f"the fit of {name}")


def create(
    name: str,
    *,
    weights: str | Path | None = None,
    base_weights: str | Path | None = None,
    image_size: int | None = None,
    normalisation: str | None = None,
    filter: str | None = None,
    lag: int | None = None,
    dtype: str | None = None,
    device: str = "auto",
) -> Encoder:
    """An encoder with its weights, ready to call.

    Args:
        name: in the registry.
        weights: a safetensors file, or a folder as `save_pretrained` writes it; None takes the encoder's own source (a hub, for most).
        base_weights: for an adapter, where its base's weights are now, if not where they were nor beside its own.
        image_size: side of the image that the network sees; None takes the encoder's default.
        normalisation: `half` (DINO-WM) or `imagenet` (official); None takes the encoder's default.
        filter: `bilinear` or `bicubic`; None takes the encoder's default.
        lag: env steps between the frames of an encoder of frame pairs; None takes its default.
        dtype: `float32`, `bfloat16` or `auto`; None takes the encoder's default.
        device: `auto`, `cpu`, `cuda`, …

    Raises:
        UserError: unknown name, missing or unfitting weights, no network, or an option that does not fit.
    """
    entry = get_entry(name)
    spec = entry.spec
    for value, known, kind in ((normalisation, tuple(NORMALISATIONS), "normalisation"), (filter, FILTERS, "filter")):
        if value is not None and value not in known:
            raise UserError(f"no {kind} {value!r}; known are {', '.join(known)}")
    path = None if weights is None else require_weights(Path(weights))
    if base_weights is not None and entry.load is not None:
        raise UserError(f"encoder {name} is on no other one; leave out --base-weights")
    if entry.load is None:
        asked = {"image_size": image_size, "normalisation": normalisation, "filter": filter, "lag": lag}
        return _create_adapter(entry, path, base_weights, asked, dtype, device)
    if lag and not spec.lag:
        raise UserError(f"encoder {name} looks at one frame at a time; leave out --lag")
    chosen = Preprocess(
        spec.image_size if image_size is None else image_size,
        spec.via,
        normalisation or spec.normalisation,
        filter or spec.filter,
        spec.lag if lag is None else lag,
    )
    spec.patch_grid(chosen.image_size)
    loaded = entry.load(spec, chosen.image_size, path)
    return Encoder(spec, loaded, chosen, weights=path, dtype=dtype, device=device)


@dataclass(frozen=True)
class Recipe:
    """What `Encoder.recipe` gives, as a store's card or an adapter's file holds it."""

    name: str
    weights: str | None
    image_size: Size
    normalisation: str
    dtype: str
    base_weights: str | None = None
    filter: str = "bilinear"
    lag: int = 0


def create_again(
    recipe: dict[str, Any], *, weights: Path | None = None, base_weights: Path | None = None, device: str = "auto"
) -> Encoder:
    """The encoder of a store's card, which may be anybody's.

    Args:
        recipe: `card.encoder`.
        weights, base_weights: where they are now, if not where they were.
        device: as in `create`.

    Raises:
        UserError: as `create`; or the recipe is none.
    """
    known = parse(Recipe, recipe, "the recipe of the store's encoder", "restore it, or extract into another --out")
    # Where an adapter's base is not where it was, it may be beside the adapter.
    there = known.base_weights if known.base_weights and Path(known.base_weights).exists() else None
    moved = {"weights": weights or known.weights, "base_weights": base_weights or there}
    return create(**{**asdict(known), **moved}, device=device)


def _create_adapter(
    entry: Entry,
    weights: Path | None,
    base_weights: str | Path | None,
    asked: dict[str, Any],
    dtype: str | None,
    device: str,
) -> Encoder:
    """An adapter on the base that its file names; what is `asked` of its preprocessing has to be the base's."""
    spec = entry.spec
    if weights is None:
        raise not_fitted(spec.name, spec.name)
    header = read_header(weights, spec.name)
    recipe, told = (read_json_part(header, part, weights) for part in ("base", "options"))
    found = _find_base(parse(Recipe, recipe, f"--weights {weights}", "fit it again"), weights, base_weights)
    base = create_again(recipe, weights=found, device=device)
    if base.weights_sha256 != header.get("base_sha256"):
        raise UserError(
            f"{weights} was fitted on other weights of {base.spec.name} than those of {base.weights or base.source}; "
            "pass those as --base-weights, or fit it again"
        )
    for name, value in asked.items():
        if value not in (None, there := getattr(base.preprocess, name)):
            raise UserError(
                f"{weights} was fitted on {base.spec.name} with {name} {there}, not {value}; leave that out, or fit it again"
            )
    assert entry.adapt is not None
    head = entry.adapt(base.backbone, told, weights)
    loaded = Loaded(base.backbone, head, f"file, on {base.spec.name} from {base.source}")
    return Encoder(
        spec,
        loaded,
        base.preprocess,
        weights=weights,
        base_weights=base.weights,
        dtype=dtype or str(base.dtype).removeprefix("torch."),
        device=device,
    )


def _find_base(base: Recipe, weights: Path, given: str | Path | None) -> Path | None:
    """The weights of an adapter's base: where the user says, else where they were, else beside the adapter's own; None for the hub's."""
    if given is not None or base.weights is None:
        return None if given is None else Path(given)
    there = Path(base.weights)
    beside = weights.parent / there.name
    if not there.exists() and not beside.exists():
        raise UserError(
            f"{weights} was fitted on {base.name} with the weights {there}, which are not there any more; "
            "put them beside it, or pass --base-weights"
        )
    return there if there.exists() else beside


def family_of(name: str) -> str:
    """The encoder that is fitted for one of that name: the layers of a family have its weights."""
    family = name.removesuffix("-layers")
    return family if family in _REGISTRY else name
