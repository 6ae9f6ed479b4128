"""What a study is told: a TOML file, every word of which is looked at."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from wmcache.cluster.tasks import parse_cluster
from wmcache.common.errors import UserError
from wmcache.common.jsonfiles import dump_json
from wmcache.pipeline import encoders
from wmcache.planner.options import PlanOptions, check_options
from wmcache.planner.protocols import PROTOCOLS
from wmcache.planner.solvers import SOLVERS
from wmcache.trainer.models import read_options as read_model_options
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.options import check_options as check_train_options

T = TypeVar("T")
Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
COUNTS = (
    *("history", "frameskip", "steps", "epochs", "batch", "accumulate", "pool"),
    *("log_every", "validate_every", "checkpoint_every"),
)
"""Of TrainOptions."""


@dataclass(frozen=True)
class Collect:
    """How the frames are collected where they are not there yet; see `pipeline.collect.collect`."""

    env: str = "wmcache/PointMaze-UMaze-v0"
    episodes: Positive = 200
    length: Positive = 100
    policy: str = "random"
    seed: Natural = 0
    image_size: Positive = 112
    frames_per_shard: Positive = 512


@dataclass(frozen=True)
class EncoderChoice:
    """A representation.

    Attributes:
        name: of the encoder, in the registry.
        label: what tables call it; the name by default. No two have the same.
        weights: file or folder; what is given is not fitted here.
        base: of an adapter: the encoder of the store that it is fitted on; the adapter's own by default. A base that is fitted itself is
            fitted as the study's encoder of its name is.
        base_weights: of a base that is not fitted here.
        fit: options of the encoder's fit. max_frames: to fit on.
        image_size, normalisation, filter, lag, dtype: as `encoders.create`; None takes the encoder's own.
        store_dtype: `float16` or `int8`.
    """

    name: str
    label: str = ""
    weights: str | None = None
    base: str = ""
    base_weights: str | None = None
    fit: dict[str, Any] = field(default_factory=dict)
    max_frames: Positive = 50_000
    image_size: Positive | None = None
    normalisation: Literal["half", "imagenet"] | None = None
    filter: Literal["bilinear", "bicubic"] | None = None
    lag: Positive | None = None
    dtype: Literal["auto", "float32", "bfloat16"] | None = None
    store_dtype: Literal["float16", "int8"] = "float16"


@dataclass(frozen=True)
class Evaluation:
    """An evaluation.

    Attributes:
        name: what tables call it; its protocol by default. No two have the same.
        options: of the evaluation; its `seed` numbers the first episode, so starts and goals are the same for all encoders.
    """

    name: str
    options: PlanOptions


@dataclass(frozen=True)
class StudyOptions:
    """All of a study.

    Attributes:
        encoders: what is compared.
        plan: how; the first evaluation gives the headline.
        train: of the world models, the same for all but for seed and fraction.
        dataset: folder of the frames. collect: how to make them where they are not there.
        seeds: each of them fits, trains and is planned with anew.
        fractions: shares of the train episodes to train world models on; the largest gives the headline.
        probe_frames: that train the probes.
        others: encoders that the file has and that are not studied; an adapter's base is fitted as they say.
        batch: frames in each call of an encoder while extracting.
        device: of everything. cluster: where cells are done, see `cluster.tasks.parse_cluster`; in one process, one after another.
    """

    encoders: tuple[EncoderChoice, ...]
    plan: tuple[Evaluation, ...]
    train: TrainOptions = field(default_factory=TrainOptions)
    dataset: str | None = None
    collect: Collect | None = None
    seeds: Annotated[tuple[Natural, ...], Field(min_length=1)] = (0,)
    fractions: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)] = (1.0,)
    probe_frames: Positive = 2000
    batch: Positive = 32
    device: str = "auto"
    cluster: str = "local:1"
    others: tuple[EncoderChoice, ...] = ()


def read_study(file: Path, flags: Mapping[str, Any] | None = None) -> StudyOptions:
    """Read a study's file.

    Args:
        file: TOML.
        flags: what wins over it: values of its top level; a `dataset` wins over `collect` too, so it has to be there; `encoder`, names or
            labels of the encoders to take, from the file or as they are by default; `steps` of training and `episodes` of each evaluation.

    Raises:
        UserError: the file is missing, no TOML, or has a setting that is unknown or does not fit.
    """
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} does not exist; write it, or leave it out to take the default study") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())[:160]
        raise UserError(f"{file} cannot be read ({reason}); pass a TOML file") from error
    given = {name: value for name, value in (flags or {}).items() if value not in (None, ())}
    names, steps, episodes = (given.pop(name, None) for name in ("encoder", "steps", "episodes"))
    values.update(given)
    where = str(file)
    parts = {name: values.pop(name, None) for name in ("encoders", "plan", "train", "collect")}
    wanted, others = _encoders(_list(parts["encoders"], f"{where}: encoders"), names, where)
    if "dataset" in given:
        parts["collect"] = None
    if not isinstance(parts["train"] or {}, dict):
        raise UserError(f"{where}: train is not a table")
    train = {**(parts["train"] or {}), **({"steps": steps, "epochs": None} if steps else {})}
    plans = [
        _evaluation({**table, **({"episodes": episodes} if episodes else {})}, f"{where}: plan {number}")
        for number, table in enumerate(_list(parts["plan"] or [{"protocol": "mpc-100"}], f"{where}: plan"), start=1)
    ]
    _require_distinct([plan.name for plan in plans], f"{where}: two plans are called", "give each a name")
    device = str(values.get("device", "auto"))
    options = _table(StudyOptions, {**values, "encoders": [], "plan": []}, where, without=("others",))
    trained = _table(TrainOptions, {"device": device, **train}, f"{where}: train")
    try:
        parse_cluster(options.cluster)
    except UserError as error:
        raise UserError(f"{where}: cluster: {error}") from error
    for name, why in {"seed": "seeds", "episodes_fraction": "fractions"}.items():
        if name in train:
            raise UserError(f"{where}: train: {name} is the study's own; say {why} instead")
    for name in COUNTS:
        if (count := getattr(trained, name)) is not None and count < 1:
            raise UserError(f"{where}: train: {name} is {count}; it must be above 0")
    check_train_options(trained)
    read_model_options(trained.model, trained.model_options)
    return replace(
        options,
        encoders=tuple(wanted),
        others=tuple(others),
        plan=tuple(replace(plan, options=replace(plan.options, device=device)) for plan in plans),
        train=trained,
        collect=None if parts["collect"] is None else _table(Collect, parts["collect"], f"{where}: collect"),
        seeds=tuple(dict.fromkeys(options.seeds)),
        fractions=tuple(sorted(set(options.fractions))),
    )


def _encoders(
    tables: list[dict[str, Any]], names: Sequence[str] | None, where: str
) -> tuple[list[EncoderChoice], list[EncoderChoice]]:
    """The encoders to study, and the file's others."""
    known = [_table(EncoderChoice, table, f"{where}: encoder {n}") for n, table in enumerate(tables, start=1)]
    known = [replace(choice, label=choice.label or choice.name) for choice in known]
    wanted = known
    if names:
        labelled = {choice.label: [choice] for choice in known}
        named = {name: [choice for choice in known if choice.name == name] for name in names}
        alone = {name: [EncoderChoice(name, label=name)] for name in names}
        wanted = [choice for name in names for choice in labelled.get(name) or named[name] or alone[name]]
    if not wanted:
        raise UserError(f"{where}: no encoder to study; add [[encoders]] with a name, or pass --encoder")
    for choices in (known, wanted):
        labels = [choice.label for choice in choices]
        _require_distinct(labels, f"{where}: two encoders are called", "give each a label")
    others = [choice for choice in known if choice not in wanted]
    for choice in (*wanted, *others):
        entry = encoders.get_entry(choice.name)
        family = encoders.family_of(choice.name)
        if "seed" in choice.fit:
            raise UserError(f"{where}: {choice.label}: the fit's seed is the study's own; say seeds instead")
        if choice.fit:
            encoders.fit_options(family, choice.fit)
        if choice.weights and choice.fit:
            raise UserError(f"{where}: {choice.label} has both weights and fit; leave out one")
        if (choice.base or choice.base_weights) and entry.load is not None:
            raise UserError(f"{where}: {choice.label} is no adapter; leave out its base")
        if choice.base:
            encoders.get_entry(choice.base)
    return wanted, others


def _evaluation(table: dict[str, Any], where: str) -> Evaluation:
    """`protocol`, `name`, and whatever is to differ from the protocol: fields of PlanOptions, and of the solver."""
    for key in ("protocol", "name", "solver"):
        if not isinstance(table.get(key, ""), str):
            raise UserError(f"{where}: {key} is {table[key]!r}; it must be a word")
    protocol, name = table.pop("protocol", None), table.pop("name", None)
    if protocol is not None and protocol not in PROTOCOLS:
        raise UserError(f"{where}: no protocol {protocol!r}; known are {', '.join(PROTOCOLS)}")
    flat = {**(PROTOCOLS.get(protocol) if protocol else {}), **table}
    own = {item.name for item in fields(PlanOptions)} - {"search", "device"}
    solver = flat.get("solver", PlanOptions().solver)
    if solver not in SOLVERS:
        raise UserError(f"{where}: no solver {solver!r}; known are {', '.join(SOLVERS)}")
    of_solver = {item.name for item in fields(SOLVERS.get(solver))}
    if unknown := sorted(set(table) - own - of_solver):
        raise UserError(f"{where}: no setting {', '.join(unknown)}; there are {', '.join(sorted(own | of_solver))}")
    # What a protocol says of its own solver is no word on another.
    search = {key: value for key, value in flat.items() if key not in own and key in of_solver}
    options = _table(PlanOptions, {**{key: flat[key] for key in own & set(flat)}, "search": search}, where)
    check_options(options)
    if options.seed < 0:
        raise UserError(f"{where}: seed is {options.seed}; it must be 0 or more")
    _table(SOLVERS.get(solver), search, where)
    return Evaluation(name or protocol or "plan", options)


def _list(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list | None) or not all(isinstance(table, dict) for table in value or []):
        raise UserError(f"{where} is not a list of tables; write [[…]] before each")
    return [dict(table) for table in value or []]


def _table(kind: type[T], values: Any, where: str, without: tuple[str, ...] = ()) -> T:
    """A table as an instance of a dataclass, nothing converted, nothing guessed; `without` are fields that are not for users."""
    known = {item.name for item in fields(kind)} - set(without)  # type: ignore[arg-type]
    if not isinstance(values, dict):
        raise UserError(f"{where} is not a table")
    if unknown := sorted(set(values) - known):
        raise UserError(f"{where}: no setting {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    try:
        parsed: T = TypeAdapter(kind).validate_json(dump_json(values), strict=True)
    except UserError as error:  # TOML has nan and inf
        raise UserError(f"{where}: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise UserError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg'][:160]}") from error
    except TypeError as error:  # of json: TOML has dates
        raise UserError(f"{where} has a date, which no setting is; write it as a string") from error
    return parsed


def _require_distinct(names: list[str], what: str, hint: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{what} {name!r}; {hint}")
