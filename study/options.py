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
from wmcache.common.errors import UserError, reason, suggest
from wmcache.common.options import Natural, Positive, option, parse_options
from wmcache.pipeline import encoders
from wmcache.pipeline.options import CollectOptions, EncoderOptions
from wmcache.planner.options import BASELINES, PlanOptions, check_options
from wmcache.planner.protocols import PROTOCOLS
from wmcache.planner.solvers import SOLVERS
from wmcache.study.models import SHARED, UNTRAINED, Evaluation, ModelChoice, ModelTable, sees_no_frame
from wmcache.trainer.models import MODELS, Dreams, dreaming_models
from wmcache.trainer.models import read_options as read_model_options
from wmcache.trainer.options import ActorOptions, TrainOptions
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
class StudyOptions:
    """All settings of a study.

    Attributes:
        plan: evaluations; the first one gives the headline.
        train: settings of all world models, except for seed and fraction; those of `models` win over it.
        models: what is compared beside encoders; empty: the model of `train` alone.
        dataset: folder of the frames, which are collected by `collect` if they are missing.
        seeds: each is fitted, trained and planned with from scratch.
        fractions: shares of the train episodes for the world models; the largest gives the headline.
        others: encoders of the file that are not studied; the bases of adapters are fitted with their settings.
        batch: frames in each call of an encoder while extracting.
    """

    encoders: tuple[EncoderChoice, ...]
    plan: tuple[Evaluation, ...]
    train: TrainOptions = field(default_factory=TrainOptions)
    models: tuple[ModelChoice, ...] = ()
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

    @property
    def baselines(self) -> tuple[str, ...]:
        """Those of all evaluations."""
        return tuple(dict.fromkeys([*BASELINES, *(name for plan in self.plan for name in plan.baselines)]))

    @property
    def systems(self) -> list[tuple[str, EncoderChoice, ModelChoice]]:
        """What is compared: every model on every encoder, each with its label in tables."""
        models = self.models or (ModelChoice(self.train.model, self.train),)
        return [(self._label(encoder, model), encoder, model) for encoder in self.encoders for model in models]

    @property
    def what(self) -> str:
        """What a line of a table is."""
        if len(self.models) > 1 and len(self.encoders) > 1:
            return "system"
        return "model" if self.models and len(self.encoders) == 1 else "representation"

    def _label(self, encoder: EncoderChoice, model: ModelChoice) -> str:
        known = {"representation": encoder.label, "model": model.label}
        return known.get(self.what, f"{model.label} on {encoder.label}")


def read_study(file: Path, flags: Mapping[str, Any] | None = None) -> StudyOptions:
    """Read a study's TOML file.

    Args:
        flags: values that win over the file's: of its top level (a `dataset` also over `collect`); `encoder`, names or labels of the
            encoders to take, from the file or with their defaults; `models`, the same of models; `steps` of training; `episodes` of each
            evaluation; `env`, of `collect`.
    """
    where, values = str(file), read_toml(file)
    given = {name: value for name, value in (flags or {}).items() if value not in (None, ())}
    names, wanted, steps, episodes, env = (
        given.pop(name, None) for name in ("encoder", "models", "steps", "episodes", "env")
    )
    values |= given
    if env and "dataset" in values:
        raise UserError(f"--env {env} asks for new frames, and dataset is {values['dataset']}; leave out one of them")
    tables = {name: values.pop(name, None) for name in ("encoders", "plan", "train", "models", "collect")}
    chosen, others = _encoders(_list(tables["encoders"], f"{where}: encoders"), names, where)
    plans = _list(tables["plan"] or [{"protocol": "mpc-100"}], f"{where}: plan")
    changed = {"episodes": episodes} if episodes else {}
    evaluations = [_evaluation(table | changed, f"{where}: plan {n}") for n, table in enumerate(plans, start=1)]
    _require_distinct([plan.name for plan in evaluations], f"{where}: two plans have the name", "give each a name")
    options = parse_options(StudyOptions, {**values, "encoders": [], "plan": []}, where, without=("others", "models"))
    trained = _train(tables["train"] or {}, steps, options.device, f"{where}: train")
    reader = _ModelReader(
        tables["train"] or {},
        {plan.name: table for plan, table in zip(evaluations, plans, strict=True)},
        options.device,
        steps,
    )
    models = reader.choose(_list(tables["models"], f"{where}: models"), wanted, where)
    with errors_at(f"{where}: cluster"):
        parse_cluster(options.cluster)
    collected = None if "dataset" in given else tables["collect"]
    if env:
        collected = {**(collected or {}), "env": env}
    return replace(
        options,
        encoders=tuple(chosen),
        others=tuple(others),
        plan=tuple(replace(plan, options=replace(plan.options, device=options.device)) for plan in evaluations),
        train=trained,
        models=tuple(models),
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


@dataclass(frozen=True)
class _PlanTable:
    """What a table of `[[plan]]` has beside the settings of `read_plan`, see `Evaluation`."""

    name: str = ""
    baselines: str = ",".join(BASELINES)
    untrained_episodes: Positive | None = None


PLAN_TABLE = tuple(item.name for item in fields(_PlanTable))


def _evaluation(table: dict[str, Any], where: str) -> Evaluation:
    own = parse_options(_PlanTable, {name: table.pop(name) for name in PLAN_TABLE if name in table}, where)
    options = replace(read_plan(table, where), baselines=own.baselines)
    name = own.name or table.get("protocol") or "plan"
    found = Evaluation(name, options, untrained_episodes=own.untrained_episodes)
    for baseline in found.baselines:
        with errors_at(f"{where}: baselines"):
            if baseline != UNTRAINED and not sees_no_frame(baseline):
                raise UserError(f"{baseline} sees frames, and is no baseline; leave it out")
    return found


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


@dataclass(frozen=True)
class _ModelReader:
    """Reads tables of `[[models]]`.

    Attributes:
        train: table of `[train]`. plans: tables of evaluations by name.
        steps: of every training, instead of those of the file.
    """

    train: dict[str, Any]
    plans: Mapping[str, dict[str, Any]]
    device: str
    steps: int | None

    def choose(self, tables: list[dict[str, Any]], names: Sequence[str] | None, where: str) -> list[ModelChoice]:
        """Return the models of these labels or names, from the file or with their defaults; all of the file without `names`."""
        known = [self.read(table, f"{where}: model {n}") for n, table in enumerate(tables, start=1)]
        wanted = [] if names else known
        for name in names or ():
            labelled = [choice for choice in known if name == choice.label]
            named = [choice for choice in known if name == choice.train.model]
            wanted += labelled or named or [self.read({"model": name}, f"{where}: model {name}")]
        for choices in (known, wanted):
            labels = [choice.label for choice in choices]
            _require_distinct(labels, f"{where}: two models have the label", "give each a label")
        return wanted

    def read(self, table: dict[str, Any], where: str) -> ModelChoice:
        """Read a table; what it does not set is that of `[train]`."""
        mine = {item.name for item in fields(ModelTable)}
        own = parse_options(ModelTable, {name: table[name] for name in mine & set(table)}, where)
        settings = {name: value for name, value in table.items() if name not in mine}
        refuse_names(
            settings, ("frameskip", "split_seed"), where, "set it in [train], as all models act in the same episodes"
        )
        usual = {"model": TrainOptions.model, **self.train}
        if settings.get("model", usual["model"]) != usual["model"]:
            usual.pop("model_options", None)
        elif isinstance(more := settings.get("model_options", {}), dict):
            settings["model_options"] = {**usual.get("model_options", {}), **more}
        if "steps" in settings:
            usual.pop("epochs", None)
        trained = _train({**usual, **settings}, self.steps, self.device, where)
        choice = ModelChoice(own.label or trained.model, trained, self._actor(own, trained.model, where))
        return replace(choice, plan=self._plans(own, choice, where))

    def _actor(self, own: ModelTable, model: str, where: str) -> ActorOptions | None:
        if own.actor is None:
            return None
        if not issubclass(MODELS.get(model), Dreams):
            raise UserError(f"{where} has an actor, which {model} cannot train; choose {dreaming_models()}")
        refuse_names(own.actor, ("seed",), f"{where}: actor", "set seeds of the study instead")
        changed = {"steps": self.steps} if self.steps else {}
        return parse_options(ActorOptions, {"device": self.device, **own.actor, **changed}, f"{where}: actor")

    def _plans(self, own: ModelTable, choice: ModelChoice, where: str) -> dict[str, PlanOptions]:
        refuse_names(
            own.plan,
            (*SHARED, *PLAN_TABLE),
            f"{where}: plan",
            "set it in [[plan]], as all models act in the same episodes",
        )
        names = list(self.plans)[: None if choice.plans else 1] if own.evaluations is None else own.evaluations
        found = {}
        for name in names:
            if name not in self.plans:
                raise UserError(f"{where}: no evaluation is {name!r}; {suggest(name, list(self.plans))}")
            table = own.plan if "protocol" in own.plan else {**self.plans[name], **own.plan}
            settings = {key: value for key, value in table.items() if key not in PLAN_TABLE}
            found[name] = read_plan(settings, f"{where}: plan")
            if found[name].execute > 1 and not choice.plans:
                hint = "leave it out of evaluations, or set execute = 1 in plan"
                raise UserError(f"{where}: an actor or policy decides after each model step, unlike {name}; {hint}")
        return found


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
