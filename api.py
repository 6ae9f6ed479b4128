"""From frames to a plan in five calls, each of which does what its command does: the same defaults, paths, files, resume and errors.

    data = wmcache.collect("wmcache/PointMaze-UMaze-v0", episodes=200, image_size=112)
    fitted = wmcache.fit(data, encoder="tcn")
    store = wmcache.extract(data, encoder="tcn")
    run = wmcache.train(store, model="dino-wm", steps=2400)
    result = wmcache.plan(run, episodes=50)

The keywords of a call are the fields of its arguments class below: those of the options classes of its command, whose help describes
them, and the locations. A mistake raises `UserError`, whose line names an option by its flag.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeVar

from wmcache.common.allocator import keep_freed_memory
from wmcache.common.cpus import limit_threads
from wmcache.common.errors import UserError, suggest
from wmcache.common.folders import default_run, home
from wmcache.common.options import check_options, options_in
from wmcache.common.paths import AnyPath, as_path, is_local
from wmcache.common.reading import system_errors
from wmcache.pipeline.options import CollectOptions, DistractOptions, ExtractOptions, FitJobOptions
from wmcache.planner.options import PlanOptions
from wmcache.planner.protocols import PROTOCOLS
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.presets import PRESETS

if TYPE_CHECKING:
    from wmcache.cache.store import TokenStore
    from wmcache.pipeline.fit import Fitted
    from wmcache.pipeline.frames import FrameDataset
    from wmcache.planner.plan import PlanResult
    from wmcache.trainer.trained import Run

P = ParamSpec("P")
A = TypeVar("A", bound="_Arguments")
Options = TypeVar("Options")
R = TypeVar("R")
T = TypeVar("T")

Location: TypeAlias = "str | AnyPath"
Data: TypeAlias = "FrameDataset | Location"
Store: TypeAlias = "TokenStore | Location"
Typed: TypeAlias = Mapping[str, Any]
"""The arguments that a caller gave, without defaults."""


@dataclass(frozen=True)
class _Arguments:
    """Arguments of a call."""

    def part(self, kind: type[Options]) -> Options:
        """Return the fields that are those of an options dataclass, validated; raises UserError with the flag of a wrong one."""
        options = kind(**{name: getattr(self, name) for name in _names(kind)})
        check_options(options)
        return options


def _call(kind: Callable[P, A]) -> Callable[[Callable[[A, Typed], R]], Callable[P, R]]:
    """Turn a function of an arguments dataclass into one that has the dataclass's fields as parameters."""

    def decorate(function: Callable[[A, Typed], R]) -> Callable[P, R]:
        parameters = inspect.signature(kind)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            limit_threads()
            keep_freed_memory()
            with system_errors():
                return function(kind(*args, **kwargs), parameters.bind(*args, **kwargs).arguments)

        returns = function.__annotations__["return"]
        call.__dict__["__signature__"] = parameters.replace(return_annotation=returns)
        return call

    return decorate


@dataclass(frozen=True)
class _Collect(DistractOptions, CollectOptions, _Arguments):
    cluster: str = "local"
    out: Location | None = None


@_call(_Collect)
def collect(arguments: _Collect, _: Typed) -> FrameDataset:
    """Collect a dataset of frames, as `wmcache collect`; called again, it continues where it stopped.

    Args:
        cluster: where tasks run, as `local:4`.
        out: folder or URL of the dataset; None: `$WMCACHE_HOME/<environment>`.

    Returns:
        The finished dataset.
    """
    from wmcache.pipeline.frames import FrameDataset
    from wmcache.planner.collect import choose_env
    from wmcache.planner.collect import collect as run

    settings = _values(arguments.part(CollectOptions))
    distraction = arguments.part(DistractOptions)
    env, name = choose_env(settings.pop("env"), distraction.distract, distraction.distract_seed)
    out = home() / name if arguments.out is None else as_path(arguments.out)
    run(env, out, cluster=_checked(arguments.cluster), **settings)
    return FrameDataset.open(out)


@dataclass(frozen=True)
class _OnFrames:
    data: Data | Sequence[Data] | None = None


@dataclass(frozen=True)
class _Fit(FitJobOptions, _OnFrames, _Arguments):
    encoder_options: Mapping[str, Any] = field(default_factory=dict)
    store: Store | None = None
    base_weights: str | Path | None = None
    cluster: str = "local:1"
    out: str | Path | None = None


@_call(_Fit)
def fit(arguments: _Fit, _: Typed) -> Fitted:
    """Fit an encoder on the dataset's own frames, or an adapter on a store, as `wmcache fit`; called again, it continues.

    Args:
        data: a dataset, or several, of which the first is measured; None: `$WMCACHE_HOME/pointmaze-umaze`.
        encoder_options: options of the encoder's training, by field, as `{"steps": 500}`.
        store: for an adapter, the store of its base's layers; None: made if it is missing.
        base_weights: for an adapter, the base's weights.
        cluster: where it runs, as `local:4`.
        out: file to write; None: `$WMCACHE_HOME/encoders/<dataset>-<encoder>.safetensors`.

    Returns:
        Where the weights are, and what was measured of them.
    """
    from wmcache.pipeline.fit import prepare_fit

    options, data, cluster = arguments.part(FitJobOptions), _locations(arguments.data), _checked(arguments.cluster)
    base_weights = _file(arguments.base_weights)
    job = prepare_fit(
        options.encoder,
        arguments.encoder_options,
        dataset=data[0] if data else None,
        more=data[1:],
        cache=_location(arguments.store),
        base=options.base,
        base_weights=base_weights,
        out=_file(arguments.out),
        device=options.device,
        cluster=cluster,
    )
    return job.run(
        cluster,
        max_frames=options.max_frames,
        device=options.device,
        overwrite=options.overwrite,
        base_weights=base_weights,
    )


@dataclass(frozen=True)
class _OnDataset:
    data: Data | None = None


@dataclass(frozen=True)
class _Extract(ExtractOptions, _OnDataset, _Arguments):
    weights: str | Path | None = None
    base_weights: str | Path | None = None
    change_maps: int | None = None
    cluster: str = "local:1"
    out: Location | None = None


@_call(_Extract)
def extract(arguments: _Extract, _: Typed) -> TokenStore:
    """Encode every frame of a dataset once, as `wmcache extract`; called again, it does what is missing.

    Args:
        data: a dataset; None: `$WMCACHE_HOME/pointmaze-umaze`.
        weights: a .safetensors file or a save_pretrained folder; None: the encoder's own source, or what was fitted on the dataset.
        base_weights: weights of an adapter's base encoder, if they have moved.
        change_maps: also make the change maps of pairs of frames so many env steps apart.
        cluster: where tasks run, as `local:4`.
        out: the store; None: `$WMCACHE_HOME/stores/<dataset>/<encoder>-<image size>.zarr`.

    Returns:
        The complete store.

    Raises:
        UserError: also where `encoder` names several; `wmcache extract --encoder A,B` encodes them in one pass.
    """
    from wmcache.cache.store import TokenStore
    from wmcache.pipeline.extract import choose_stores, extract_together
    from wmcache.pipeline.fit import open_inputs

    settings, cluster = _values(arguments.part(ExtractOptions)), _checked(arguments.cluster)
    if "," in settings["encoder"]:
        raise UserError(f"--encoder {settings['encoder']} names several; call extract for each, or run wmcache extract")
    batch, dtype = settings.pop("batch"), settings.pop("store_dtype")
    settings |= {"weights": [] if arguments.weights is None else [str(arguments.weights)]}
    frames, networks = open_inputs(
        _location(arguments.data), settings | {"base_weights": _file(arguments.base_weights)}
    )
    out = None if arguments.out is None else as_path(arguments.out)
    stores = choose_stores(frames, networks, out, dtype=dtype, change_maps=arguments.change_maps)
    extract_together(frames, stores, dtype=dtype, batch=batch, cluster=cluster, device=settings["device"])
    return TokenStore.open(stores[0][1])


@dataclass(frozen=True)
class _OnStores:
    store: Store | Sequence[Store]


@dataclass(frozen=True)
class _Train(TrainOptions, _OnStores, _Arguments):
    preset: str | None = None
    out: str | Path | None = None
    resume: bool = False
    overwrite: bool = False


@_call(_Train)
def train(arguments: _Train, typed: Typed) -> Run:
    """Train a world model or a policy purely on cached latents, as `wmtrain`; called again, it continues where it stopped.

    Args:
        store: the token store, or several of one encoder that are read as one.
        model_options: options of the model, by field, as `{"width": 128}`.
        preset: known settings; options beside it win.
        out: folder of the run; None: `$WMCACHE_HOME/runs/<dataset>-<store>`.
        resume: continue a run; steps, epochs and the schedule of the learning rate may then differ.
        overwrite: delete the run in `out` and start from scratch.

    Returns:
        The run. In a script that torchrun starts, each process calls this.
    """
    from wmcache.engine.ranks import joined
    from wmcache.trainer.models import MODELS
    from wmcache.trainer.train import train as run
    from wmcache.trainer.trained import Run

    if typed.get("steps") is not None and typed.get("epochs") is not None:
        raise UserError("--steps and --epochs both set the length; give one")
    preset = {} if arguments.preset is None else _known(arguments.preset, PRESETS, "preset")
    if "steps" in typed:
        preset = {**preset, "epochs": None}
    given = {name: value for name, value in typed.items() if name in _names(TrainOptions)}
    settings = options_in(preset, TrainOptions) | given
    kind = MODELS.get(settings.get("model", arguments.model))
    settings["model_options"] = options_in(preset, kind.Options) | dict(arguments.model_options)
    if start := settings.get("start"):
        settings["start"] = str(Path(start).absolute())
    if not (stores := _locations(arguments.store)):
        raise UserError("no store is given; pass one, or its path")
    options = TrainOptions(**settings)
    out = _file(arguments.out) or default_run(stores[0])
    with joined(options.device) as ranks:
        run(
            stores[0],
            out,
            options,
            more=stores[1:],
            resume=arguments.resume,
            overwrite=arguments.overwrite,
            ranks=ranks,
        )
    return Run(out)


@dataclass(frozen=True)
class _OnRun:
    run: Run | str | Path


@dataclass(frozen=True)
class _Plan(PlanOptions, _OnRun, _Arguments):
    protocol: str | None = None
    weights: str | Path | None = None
    store: Store | Sequence[Store] | None = None
    cluster: str = "local:1"
    out: str | Path | None = None


@_call(_Plan)
def plan(arguments: _Plan, typed: Typed) -> PlanResult:
    """Act with a trained world model or policy, judge it, and write a report, as `wmplan`.

    Args:
        run: folder of the run.
        search: options of the solver, by field, as `{"samples": 300}`.
        protocol: a known evaluation; options beside it win.
        weights: where the encoder's weights are now, if they have moved.
        store: where the run's stores are now, if they have moved.
        cluster: where batches are planned, as `local:4`.
        out: folder of the results; None: in the run, named by the settings.

    Returns:
        The figures, and the path of the report.
    """
    from wmcache.planner.plan import plan_run
    from wmcache.planner.solvers import SOLVERS

    protocol = {} if arguments.protocol is None else PROTOCOLS.get(arguments.protocol)
    given = {name: value for name, value in typed.items() if name in _names(PlanOptions)}
    settings = options_in(protocol, PlanOptions) | given
    solver: Any = SOLVERS.get(settings.get("solver", arguments.solver))
    settings["search"] = options_in(protocol, solver) | arguments.search
    run, shown = _file(_location(arguments.run)), {**typed, "run": str(_location(arguments.run))}
    assert run is not None
    return plan_run(
        run,
        PlanOptions(**settings),
        command=f"wmcache.plan({', '.join(f'{name}={value!r}' for name, value in shown.items())})",
        protocol=arguments.protocol,
        out=_file(arguments.out),
        cluster=_checked(arguments.cluster),
        weights=_file(arguments.weights),
        cache=_locations(arguments.store),
        solver_given="solver" in typed,
    )


def _names(kind: type) -> list[str]:
    return [item.name for item in fields(kind)]


def _values(options: Any) -> dict[str, Any]:
    return {name: getattr(options, name) for name in _names(type(options))}


def _known(name: str, known: Mapping[str, T], what: str) -> T:
    if name not in known:
        raise UserError(f"unknown {what} {name!r}; {suggest(name, list(known))}")
    return known[name]


def _checked(cluster: str) -> str:
    """Refuse a bad word or profile before any work."""
    from wmcache.cluster.tasks import parse_cluster

    return parse_cluster(cluster).text


def _locations(value: Any) -> list[AnyPath]:
    """Return the paths of a dataset, a run, a store or its parts, or of several of them; none of None."""
    if value is None:
        return []
    if isinstance(value, str) or hasattr(value, "joinpath"):  # a path, or a URL's
        return [as_path(value)]
    several = value if isinstance(value, list | tuple) else getattr(value, "parts", [value.path])
    return [path for item in several for path in _locations(item)]


def _location(value: Any) -> AnyPath | None:
    """Return the path of one thing, or None; raises UserError for several."""
    if len(found := _locations(value)) > 1:
        raise UserError(f"{len(found)} paths are given where one is taken ({found[0]}, {found[1]}, …); pass one")
    return next(iter(found), None)


def _file(value: Any) -> Path | None:
    """Return a path of this machine, if there is one; raises UserError for a URL, which would become a folder of that name."""
    path = None if value is None else as_path(value)
    if path is not None and not is_local(path):
        raise UserError(f"{path} is a URL; pass a path of this machine")
    return path
