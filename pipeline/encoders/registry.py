"""The registry of encoders, and `create`, which makes one with its weights.

An encoder comes from a family's loader (`register`), or is an adapter on the features of another encoder (`register_adapter`). Both may
be fitted on a dataset (`register_fit`). Other packages add encoders with an entry point of the group `wmcache.encoders`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from wmcache.common.errors import UserError
from wmcache.common.options import check_options, parse_options
from wmcache.common.registry import Registry
from wmcache.common.schema import Size, parse
from wmcache.pipeline.encoders.base import Backbone, Encoder, EncoderSpec, Head, Loaded
from wmcache.pipeline.encoders.fitting import FitData, FitOptions, Fitting
from wmcache.pipeline.encoders.weights import REFIT, load_fitted, read_header, require_fitted, require_weights
from wmcache.pipeline.options import EncoderOptions

Loader = Callable[[EncoderSpec, int, Path | None], Loaded]
"""(spec, image size, weights file or folder, None for the spec's source) -> networks."""
Adapter = Callable[[Backbone, Any], Head]
"""(backbone of the base, options of the fit) -> head without its weights."""
Redraw = Callable[[Any], nn.Module]
"""(options of the fit) -> what turns an adapter's tokens back into those of its base, without its weights."""
MakeFitting = Callable[[FitData, Any], Fitting]
"""(data, options) -> the network to train."""

LOG_VARIANCE = "-logvar"
"""After a family's name: the encoder of the log-variances of its tokens."""

L = TypeVar("L", bound=Loader)
A = TypeVar("A", bound=Adapter)
M = TypeVar("M", bound=MakeFitting)


@dataclass(frozen=True)
class Entry:
    """A registered encoder: `load` loads it, or `adapt` makes an adapter's head; `base` is an adapter's usual base encoder.

    Attributes:
        options: of an adapter that is not fitted by `wmcache fit`, a dataclass; None for those of its fit.
        redraw: of an adapter whose base's decoder can draw its tokens.
    """

    spec: EncoderSpec
    load: Loader | None = None
    adapt: Adapter | None = None
    base: str = ""
    options: type[Any] | None = None
    redraw: Redraw | None = None

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


def register_adapter(
    spec: EncoderSpec, base: str, *, options: type[Any] | None = None, redraw: Redraw | None = None
) -> Callable[[A], A]:
    """Register an adapter with its usual base encoder: decorates the head. The preprocessing in the spec is the base's; see `Entry`."""

    def add(adapt: A) -> A:
        ENCODERS.register(spec.name)(Entry(spec, adapt=adapt, base=base, options=options, redraw=redraw))
        return adapt

    return add


def register_fit(name: str, options: type[FitOptions]) -> Callable[[M], M]:
    """Let `wmcache fit` train a registered encoder: decorates the `Fitting`."""

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


def family_of(name: str) -> str:
    """Return the encoder whose fit provides the weights of `name`: layers and log-variances of a family share its weights."""
    family = name.removesuffix("-layers").removesuffix(LOG_VARIANCE)
    return family if family in ENCODERS else name


def create(
    name: str,
    *,
    weights: str | Path | None = None,
    base_weights: str | Path | None = None,
    device: str = "auto",
    **settings: Any,
) -> Encoder:
    """Make an encoder with its weights.

    Args:
        weights: a safetensors file, or a folder written by `save_pretrained`; by default the encoder's own source, mostly a hub.
        base_weights: for an adapter, its base's weights; by default at their recorded path, or beside the adapter's own.
        settings: fields of `EncoderOptions`; None takes the encoder's default.

    Raises:
        UserError: unknown name, missing or unfitting weights, no network, or an option that does not fit.
    """
    entry = ENCODERS.get(name)
    spec = entry.spec
    options = EncoderOptions(**{**settings, "lag": settings.get("lag") or None})  # a recipe has 0 where there is none
    check_options(options)
    asked = {option: value for option, value in asdict(options).items() if value is not None}
    dtype = asked.pop("dtype", None)
    path = None if weights is None else require_weights(Path(weights))
    if entry.adapt is not None:
        return _create_adapter(entry, path, base_weights, asked, dtype, device)
    if base_weights is not None:
        raise UserError(f"encoder {name} has no base encoder; leave out --base-weights")
    if options.lag and not spec.lag:
        raise UserError(f"encoder {name} encodes one frame at a time; leave out --lag")
    preprocess = replace(spec.preprocess, **asked)
    spec.patch_grid(preprocess.image_size)
    assert entry.load is not None
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
    """Make the encoder of a store's card, whose weights may have moved; raises UserError as `create`, or for a damaged recipe."""
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
    name = entry.spec.name
    if weights is None and entry.fit is None:
        raise UserError(
            f"encoder {name} has no weights; pass --weights, a file that was made with: {entry.spec.source}"
        )
    weights = require_fitted(weights, name, name)
    header, where = read_header(weights, name), f"--weights {weights}"
    recipe = parse(Recipe, header.get("base"), where, REFIT)
    options = parse(entry.options or get_fit(name)[0], header.get("options"), where, REFIT)
    there = None if base_weights is None else Path(base_weights)
    if there is None and recipe.weights is not None:
        recorded = Path(recipe.weights)
        there = next((path for path in (recorded, weights.parent / recorded.name) if path.exists()), None)
        if there is None:
            raise UserError(f"{weights} needs {recipe.name}'s {recorded}, which does not exist; pass --base-weights")
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
    head, redraw = entry.adapt(base.backbone, options), None if entry.redraw is None else entry.redraw(options)
    draws = load_fitted(head, weights, name, redraw)
    decoder = nn.Sequential(redraw, base.decoder) if draws and redraw and base.decoder else None
    return Encoder(
        entry.spec,
        Loaded(base.backbone, head, f"file, on {base.spec.name} from {base.source}", decoder),
        base.preprocess,
        weights=weights,
        base_weights=base.weights,
        dtype=dtype or str(base.dtype).removeprefix("torch."),
        device=device,
    )
