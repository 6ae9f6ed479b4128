"""The registry of encoders, and `create`, which makes one with its weights.

An encoder comes from a family's loader (`register`), or is an adapter on the features of another encoder (`register_adapter`). Both may
be fitted on a dataset (`register_fit`). Other packages add encoders with an entry point of the group `wmcache.encoders`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from wmcache.common.errors import UserError
from wmcache.common.options import parse_options
from wmcache.common.registry import Registry
from wmcache.common.schema import Size, parse
from wmcache.pipeline.encoders.base import FILTERS, NORMALISATIONS, Backbone, EncoderSpec, Head, Loaded, Preprocess
from wmcache.pipeline.encoders.encoder import Encoder
from wmcache.pipeline.encoders.fitting import FitData, FitOptions, Fitting
from wmcache.pipeline.encoders.weights import REFIT, load_fitted, not_fitted, read_header, require_weights

Loader = Callable[[EncoderSpec, int, Path | None], Loaded]
"""(spec, image size, weights file or folder, None for the spec's source) -> networks."""
Adapter = Callable[[Backbone, Any], Head]
"""(backbone of the base, options of the fit) -> head without its weights."""
MakeFitting = Callable[[FitData, Any], Fitting]
"""(data, options) -> the network to train."""

L = TypeVar("L", bound=Loader)
A = TypeVar("A", bound=Adapter)
M = TypeVar("M", bound=MakeFitting)


@dataclass(frozen=True)
class Entry:
    """A registered encoder.

    Attributes:
        load: loads it; None for an adapter.
        adapt: makes an adapter's head; None for others.
        base: default encoder of the store that an adapter is fitted on; empty for others.
    """

    spec: EncoderSpec
    load: Loader | None = None
    adapt: Adapter | None = None
    base: str = ""

    @property
    def fit(self) -> MakeFitting | None:
        """Makes its training; None if it is not fitted on a dataset."""
        return FITS.get(self.spec.name)[1] if self.spec.name in FITS else None


ENCODERS: Registry[Entry] = Registry("encoder", package="wmcache.pipeline.encoders", group="wmcache.encoders")
FITS: Registry[tuple[type[FitOptions], MakeFitting]] = Registry(
    "fit of an encoder", package=ENCODERS.package, group=ENCODERS.group
)


def register(spec: EncoderSpec) -> Callable[[L], L]:
    """Register an encoder: decorates the function that loads it. Raises ValueError if the name is taken."""

    def add(load: L) -> L:
        ENCODERS.register(spec.name)(Entry(spec, load=load))
        return load

    return add


def register_adapter(spec: EncoderSpec, base: str) -> Callable[[A], A]:
    """Register an adapter: decorates the head, or a function that makes it.

    Args:
        spec: the preprocessing in it is the base's.
        base: default encoder to fit on; the weights file names the one that was used.
    """

    def add(adapt: A) -> A:
        ENCODERS.register(spec.name)(Entry(spec, adapt=adapt, base=base))
        return adapt

    return add


def register_fit(name: str, options: type[FitOptions]) -> Callable[[M], M]:
    """Let `wmcache fit` train a registered encoder: decorates the `Fitting`, or a function that makes it."""

    def add(fit: M) -> M:
        FITS.register(name)((options, fit))
        return fit

    return add


def specs() -> list[EncoderSpec]:
    """Return all known encoders, sorted by name."""
    return [ENCODERS.get(name).spec for name in ENCODERS]


def get_entry(name: str) -> Entry:
    """Return a registered encoder; raises UserError for an unknown name."""
    return ENCODERS.get(name)


def get_spec(name: str) -> EncoderSpec:
    """Return an encoder's spec; raises UserError for an unknown name."""
    return ENCODERS.get(name).spec


def get_fit(name: str) -> tuple[type[FitOptions], MakeFitting]:
    """Return the options of an encoder's training, and what makes it; raises UserError if there is none."""
    source = get_spec(name).source
    if name not in FITS:
        raise UserError(f"encoder {name} is not fitted on a dataset: its source is {source}; fit {', '.join(FITS)}")
    return FITS.get(name)


def fit_options(name: str, settings: Mapping[str, Any]) -> FitOptions:
    """Return the options of an encoder's training; raises UserError for an encoder, option or value that does not exist."""
    return parse_options(get_fit(name)[0], dict(settings), f"the fit of {name}")


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
    """Make an encoder with its weights. None takes the encoder's default.

    Args:
        weights: a safetensors file, or a folder written by `save_pretrained`; by default the encoder's own source, mostly a hub.
        base_weights: for an adapter, its base's weights; by default at their recorded path, or beside the adapter's own.
        image_size, normalisation, filter, lag: see `EncoderSpec`.
        dtype: `float32`, `bfloat16` or `auto`.
        device: `auto`, `cpu`, `cuda`, …

    Raises:
        UserError: unknown name, missing or unfitting weights, no network, or an option that does not fit.
    """
    entry = ENCODERS.get(name)
    spec = entry.spec
    for value, known, kind in ((normalisation, tuple(NORMALISATIONS), "normalisation"), (filter, FILTERS, "filter")):
        if value is not None and value not in known:
            raise UserError(f"unknown {kind}: {value!r}; choose from {', '.join(known)}")
    path = None if weights is None else require_weights(Path(weights))
    given = {"image_size": image_size, "normalisation": normalisation, "filter": filter, "lag": lag}
    asked: dict[str, Any] = {option: value for option, value in given.items() if value is not None}
    if entry.load is None:
        return _create_adapter(entry, path, base_weights, asked, dtype, device)
    if base_weights is not None:
        raise UserError(f"encoder {name} has no base encoder; leave out --base-weights")
    if lag and not spec.lag:
        raise UserError(f"encoder {name} encodes one frame at a time; leave out --lag")
    usual = Preprocess(spec.image_size, spec.via, spec.normalisation, spec.filter, spec.lag)
    preprocess = replace(usual, **asked)
    spec.patch_grid(preprocess.image_size)
    loaded = entry.load(spec, preprocess.image_size, path)
    return Encoder(spec, loaded, preprocess, weights=path, dtype=dtype, device=device)


@dataclass(frozen=True)
class Recipe:
    """What `Encoder.recipe` returns, as a store's card or an adapter's weights file contains it."""

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
    """Make the encoder of `Encoder.recipe`: of a store's card, or in another process.

    Args:
        weights, base_weights: their paths now, if they have moved.

    Raises:
        UserError: as `create`; or the recipe is damaged.
    """
    known = parse(Recipe, recipe, "the recipe of the store's encoder", "restore it, or extract into another --out")
    # A base that has moved may be beside the adapter, where `create` looks.
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
    """Make an adapter on the base that its file names; `asked` preprocessing must equal the base's."""
    name, where = entry.spec.name, f"--weights {weights}"
    if weights is None:
        raise not_fitted(name, name)
    header = read_header(weights, name)
    recipe = parse(Recipe, header.get("base"), where, REFIT)
    options = parse(get_fit(name)[0], header.get("options"), where, REFIT)
    there = _find_base(recipe, weights) if base_weights is None else Path(base_weights)
    base = create_again(asdict(recipe), weights=there, device=device)
    if base.weights_sha256 != header.get("base_sha256"):
        other = f"{base.spec.name} than {base.weights or base.source}"
        raise UserError(
            f"{weights} was fitted on other weights of {other}; pass those as --base-weights, or fit it again"
        )
    for setting, value in asked.items():
        if value != (usual := getattr(base.preprocess, setting)):
            raise UserError(f"{weights} was fitted with {setting} {usual}, not {value}; leave the option out")
    assert entry.adapt is not None
    head = entry.adapt(base.backbone, options)
    load_fitted(head, weights, name)
    return Encoder(
        entry.spec,
        Loaded(base.backbone, head, f"file, on {base.spec.name} from {base.source}"),
        base.preprocess,
        weights=weights,
        base_weights=base.weights,
        dtype=dtype or str(base.dtype).removeprefix("torch."),
        device=device,
    )


def _find_base(base: Recipe, weights: Path) -> Path | None:
    """Find the weights of an adapter's base at the recorded path, or beside the adapter's own; None for the hub's."""
    if base.weights is None:
        return None
    for path in (Path(base.weights), weights.parent / Path(base.weights).name):
        if path.exists():
            return path
    raise UserError(f"{weights} needs {base.name}'s {base.weights}, which does not exist; pass --base-weights")


def family_of(name: str) -> str:
    """Return the encoder whose fit provides the weights of `name`: the layers of a family share its weights."""
    family = name.removesuffix("-layers")
    return family if family in ENCODERS else name
