"""The settings of a study: a TOML file, validated by the declarations of the options that it sets."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, MinLen

from wmcache.cluster.tasks import parse_cluster
from wmcache.common.errors import UserError, reason
from wmcache.common.options import Natural, Positive, option, parse_options
from wmcache.pipeline import encoders
from wmcache.pipeline.options import CollectOptions, EncoderOptions
from wmcache.planner.options import PlanOptions, check_options
from wmcache.planner.protocols import PROTOCOLS
from wmcache.planner.solvers import SOLVERS
from wmcache.trainer.models import read_options as read_model_options
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.perturb import check_shifts


@dataclass(frozen=True)
class Collect(CollectOptions):
    """How the frames are collected if they are missing; less data than `wmcache collect` makes by default."""

    episodes: Positive = option(200)
    image_size: Annotated[int, Ge(8), Le(2048)] = option(112)


@dataclass(frozen=True, kw_only=True)
class EncoderChoice(EncoderOptions):
    """A representation.

    Attributes:
        label: name in tables; the encoder's by default.
        weights: file or folder; such an encoder is not fitted.
        base: for an adapter, the encoder of the store that it is fitted on, instead of the adapter's own. A base that is fitted itself is
            fitted with the settings of the study's encoder of its name; `base_weights` are those of another.
        fit: options of the encoder's fit, on at most `max_frames`.
    """

    name: str
    label: str = ""
    weights: str | None = None
    base: str = ""
    base_weights: str | None = None
    fit: dict[str, Any] = field(default_factory=dict)
    max_frames: Positive = 50_000
    store_dtype: Literal["float16", "int8"] = "float16"


@dataclass(frozen=True)
class Evaluation:
    """An evaluation. All encoders have the same starts and goals.

    Attributes:
        name: in tables; that of its protocol by default.
        thresholds: that tables report beside its own, the largest first; known once there are frames, see `run.settled`.
    """

    name: str
    options: PlanOptions
    thresholds: tuple[float, ...] = ()


@dataclass(frozen=True)
class StudyOptions:
    """All settings of a study.

    Attributes:
        plan: evaluations; the first one gives the headline.
        train: settings of all world models, except for seed and fraction.
        dataset: folder of the frames, which are collected by `collect` if they are missing.
        seeds: each is fitted, trained and planned with from scratch.
        fractions: shares of the train episodes for the world models; the largest gives the headline.
        others: encoders of the file that are not studied; the bases of adapters are fitted with their settings.
        batch: frames in each call of an encoder while extracting.
    """

    encoders: tuple[EncoderChoice, ...]
    plan: tuple[Evaluation, ...]
    train: TrainOptions = field(default_factory=TrainOptions)
    dataset: str | None = None
    collect: Collect | None = None
    seeds: Annotated[tuple[Natural, ...], MinLen(1)] = (0,)
    fractions: Annotated[tuple[Annotated[float, Gt(0), Le(1)], ...], MinLen(1)] = (1.0,)
    probe_frames: Positive = 2000
    batch: Positive = 32
    device: str = "auto"
    cluster: str = "local:1"
    others: tuple[EncoderChoice, ...] = ()

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Those of all evaluations, the largest first."""
        return tuple(sorted({at for plan in self.plan for at in plan.thresholds}, reverse=True))


def read_study(file: Path, flags: Mapping[str, Any] | None = None) -> StudyOptions:
    """Read a study's TOML file.

    Args:
        flags: values that win over the file's: of its top level (a `dataset` also over `collect`); `encoder`, names or labels of the
            encoders to take, from the file or with their defaults; `steps` of training; `episodes` of each evaluation.
    """
    where, values = str(file), read_toml(file)
    given = {name: value for name, value in (flags or {}).items() if value not in (None, ())}
    names, steps, episodes = (given.pop(name, None) for name in ("encoder", "steps", "episodes"))
    values |= given
    tables = {name: values.pop(name, None) for name in ("encoders", "plan", "train", "collect")}
    chosen, others = _encoders(_list(tables["encoders"], f"{where}: encoders"), names, where)
    plans = _list(tables["plan"] or [{"protocol": "mpc-100"}], f"{where}: plan")
    changed = {"episodes": episodes} if episodes else {}
    evaluations = [_evaluation(table | changed, f"{where}: plan {n}") for n, table in enumerate(plans, start=1)]
    _require_distinct([plan.name for plan in evaluations], f"{where}: two plans have the name", "give each a name")
    options = parse_options(StudyOptions, {**values, "encoders": [], "plan": []}, where, without=("others",))
    trained = _train(tables["train"] or {}, steps, options.device, f"{where}: train")
    with errors_at(f"{where}: cluster"):
        parse_cluster(options.cluster)
    collected = None if "dataset" in given else tables["collect"]
    return replace(
        options,
        encoders=tuple(chosen),
        others=tuple(others),
        plan=tuple(replace(plan, options=replace(plan.options, device=options.device)) for plan in evaluations),
        train=trained,
        collect=None if collected is None else parse_options(Collect, collected, f"{where}: collect"),
        seeds=tuple(dict.fromkeys(options.seeds)),
        fractions=tuple(sorted(set(options.fractions))),
    )


def read_toml(file: Path) -> dict[str, Any]:
    """Read a TOML file."""
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({reason(error)}); pass a TOML file") from error


def _encoders(
    tables: list[dict[str, Any]], names: Sequence[str] | None, where: str
) -> tuple[list[EncoderChoice], list[EncoderChoice]]:
    # The encoders to study, and the file's others.
    known = [parse_options(EncoderChoice, table, f"{where}: encoder {n}") for n, table in enumerate(tables, start=1)]
    known = [replace(choice, label=choice.label or choice.name) for choice in known]
    wanted = [] if names else known
    for name in names or ():
        labelled, named = ([choice for choice in known if name == getattr(choice, part)] for part in ("label", "name"))
        wanted += labelled or named or [EncoderChoice(name=name, label=name)]
    if not wanted:
        raise UserError(f"{where}: no encoder to study; add [[encoders]] with a name, or pass --encoder")
    for choices in (known, wanted):
        labels = [choice.label for choice in choices]
        _require_distinct(labels, f"{where}: two encoders have the label", "give each a label")
    others = [choice for choice in known if choice not in wanted]
    for choice in (*wanted, *others):
        with errors_at(f"{where}: {choice.label}"):
            entry = encoders.get_entry(choice.name)
            if "seed" in choice.fit:
                raise UserError("fit.seed is set by the study; set seeds instead")
            if choice.fit:
                encoders.fit_options(encoders.family_of(choice.name), choice.fit)
            if choice.weights and choice.fit:
                raise UserError("weights and fit exclude each other; leave out one")
            if (choice.base or choice.base_weights) and entry.load is not None:
                raise UserError(f"{choice.name} is not an adapter; leave out base and base_weights")
            if choice.base:
                encoders.get_entry(choice.base)
    return wanted, others


def _evaluation(table: dict[str, Any], where: str) -> Evaluation:
    # Settings of `read_plan`, and a name.
    if not isinstance(name := table.pop("name", ""), str):
        raise UserError(f"{where}: name is {name!r}; it must be a string")
    options = read_plan(table, where)
    return Evaluation(name or table.get("protocol") or "plan", options)


def read_plan(table: Mapping[str, Any], where: str) -> PlanOptions:
    """Read a table of `protocol`, and settings that win over the protocol's: fields of `PlanOptions` and of the solver."""
    table = dict(table)
    for key in ("protocol", "solver"):
        if not isinstance(table.get(key, ""), str):
            raise UserError(f"{where}: {key} is {table[key]!r}; it must be a string")
    protocol = table.pop("protocol", None)
    own = {item.name for item in fields(PlanOptions)} - {"search", "device", "baselines"}
    with errors_at(where):
        usual: Mapping[str, Any] = {} if protocol is None else PROTOCOLS.get(protocol)
        flat = {"solver": PlanOptions().solver, **usual, **table}
        solver: Any = SOLVERS.get(flat["solver"])
    # A protocol's options of its own solver do not concern another one.
    known = {*table, *(item.name for item in fields(solver))}
    search = {key: value for key, value in flat.items() if key not in own and key in known}
    parse_options(solver, search, where)
    options = parse_options(PlanOptions, {**{key: flat[key] for key in own & set(flat)}, "search": search}, where)
    with errors_at(where):
        check_options(options)
    return options


def refuse_names(table: Mapping[str, Any], names: Sequence[str], where: str, hint: str) -> None:
    """Raise UserError for a name that a table may not have."""
    if given := [name for name in names if name in table]:
        raise UserError(f"{where} has {given[0]}; {hint}")


def read_encoder(table: Mapping[str, Any], seed: int, where: str) -> EncoderChoice:
    """Read a table of an encoder of frames; `seed` is that of its fit."""
    choice = parse_options(EncoderChoice, dict(table), where)
    with errors_at(where):
        entry = encoders.get_entry(choice.name)
        if entry.load is None or choice.base or choice.base_weights:
            raise UserError(f"{choice.name} on a base is an adapter; choose an encoder of frames")
        if choice.weights and choice.fit:
            raise UserError("weights and fit exclude each other; leave out one")
        if choice.fit:
            encoders.fit_options(choice.name, choice.fit)
    if choice.weights:
        return replace(choice, weights=str(Path(choice.weights).absolute()))
    return replace(choice, fit={"seed": seed, **choice.fit}) if entry.fit else choice


def _train(table: Any, steps: int | None, device: str, where: str) -> TrainOptions:
    changed = {"steps": steps, "epochs": None} if steps else {}
    if isinstance(table, dict):
        for name, own in {"seed": "seeds", "episodes_fraction": "fractions"}.items():
            if name in table:
                raise UserError(f"{where}: {name} is set by the study; set {own} instead")
        table = {"device": device, **table, **changed}
    trained = parse_options(TrainOptions, table, where)
    with errors_at(where):
        read_model_options(trained.model, trained.model_options)
        check_shifts(trained)
    return trained


def _list(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list | None) or not all(isinstance(table, dict) for table in value or []):
        raise UserError(f"{where} is not a list of tables; write [[…]] before each")
    return [dict(table) for table in value or []]


@contextmanager
def errors_at(where: str) -> Iterator[None]:
    """Name what an error's settings are from."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _require_distinct(names: list[str], what: str, hint: str) -> None:
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{what} {repeated[0]!r}; {hint}")
