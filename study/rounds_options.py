"""All settings of rounds, and how their TOML file is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Le

from wmcache.cluster.tasks import parse_cluster
from wmcache.common.errors import UserError
from wmcache.common.options import Natural, Positive, option, parse_options
from wmcache.pipeline.options import CollectOptions
from wmcache.planner.controllers.options import ControllerOptions
from wmcache.planner.options import PlanOptions
from wmcache.study.options import EncoderChoice, errors_at, read_encoder, read_plan, read_toml, refuse_names
from wmcache.trainer.models import MODELS
from wmcache.trainer.models import read_options as read_model_options
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.perturb import check_shifts

SEEDS = 1000
"""Datasets of one seed; the last of `rounds` is below it."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class FirstRound(CollectOptions):
    """How the first round collects, and all rounds but for policy and number of episodes."""

    episodes: Positive = option(20)
    image_size: Annotated[int, Ge(8), Le(2048)] = option(112)


@dataclass(frozen=True)
class RoundsOptions:
    """All settings of rounds.

    Attributes:
        later_episodes: of each round after the first; None: as many.
        encoder: fitted once, on the first round's frames, or with weights.
        train: `steps` are those of each round. Warm-up is in the first round only; each round ends with the decay of its own steps, and
            the next one begins at the learning rate of the constant phase.
        controller: trained on each round's model, from the controller of the round before; it collects and is evaluated instead of the
            run (arXiv 1803.10122, section 5).
        variants: further controllers by name, with other settings; trained and evaluated beside it in each round, and not used to collect.
        policy: how the run acts that collects, see `planner.collect.collect`.
        plan: the evaluation after each round.
        batch: frames in each call of the encoder.
    """

    encoder: EncoderChoice
    rounds: Annotated[Positive, Le(SEEDS)] = 3
    seed: Natural = 0
    collect: FirstRound = field(default_factory=FirstRound)
    later_episodes: Positive | None = None
    train: TrainOptions = field(default_factory=TrainOptions)
    controller: ControllerOptions | None = None
    variants: Mapping[str, ControllerOptions] = field(default_factory=dict)
    policy: PlanOptions = field(default_factory=PlanOptions)
    plan: PlanOptions = field(default_factory=PlanOptions)
    batch: Positive = 32
    device: str = "auto"
    cluster: str = "local:1"

    @property
    def actors(self) -> dict[str, ControllerOptions | None]:
        """What is trained and evaluated in each round, by the end of its folders' names; None: the run itself."""
        return {"": self.controller, **{f"-{name}": varied for name, varied in self.variants.items()}}


def read_rounds(file: Path, flags: Mapping[str, Any] | None = None) -> RoundsOptions:
    """Read a TOML file of rounds; `flags` are values of its top level that win."""
    where = str(file)
    values = read_toml(file) | {name: value for name, value in (flags or {}).items() if value is not None}
    tables = {name: values.pop(name, {}) for name in ("collect", "encoder", "train", "policy", "plan")}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise UserError(f"{where}: {name} is not a table; write [{name}]")
    refuse_names(tables["collect"], ("seed",), f"{where}: collect", "set the seed of all at the top")
    refuse_names(tables["train"], ("seed", "epochs", "stage", "start"), f"{where}: train", "it is set by the rounds")
    refuse_names(
        tables["policy"], ("episodes", "budget", "batch", "seed", "env"), f"{where}: policy", "no round uses it"
    )
    controlled, varied = values.pop("controller", None), values.pop("variants", {})
    bare = parse_options(RoundsOptions, {**values, "encoder": {"name": ""}}, where)
    with errors_at(f"{where}: cluster"):
        parse_cluster(bare.cluster)
    settings = {"device": bare.device, "seed": bare.seed, **tables["train"]}
    trained = parse_options(TrainOptions, settings, f"{where}: train")
    with errors_at(f"{where}: train"):
        read_model_options(trained.model, trained.model_options)
        check_shifts(trained)
        if MODELS.get(trained.model).stages:
            raise UserError(f"model {trained.model} is trained in stages, which no round goes on with; choose another")
    return replace(
        bare,
        collect=parse_options(FirstRound, {**tables["collect"], "seed": bare.seed}, f"{where}: collect"),
        encoder=read_encoder(tables["encoder"], bare.seed, f"{where}: encoder"),
        train=trained,
        controller=_controller(controlled, bare, f"{where}: controller"),
        variants=_variants(varied, controlled, bare, f"{where}: variants"),
        policy=replace(read_plan(tables["policy"], f"{where}: policy"), device=bare.device),
        plan=replace(read_plan(tables["plan"], f"{where}: plan"), device=bare.device),
    )


def _controller(table: Any, bare: RoundsOptions, where: str) -> ControllerOptions | None:
    if isinstance(table, dict):
        refuse_names(table, ("seed", "start"), where, "it is set by the rounds")
        table = {"device": bare.device, **table, "seed": bare.seed}
    return None if table is None else parse_options(ControllerOptions, table, where)


def _variants(tables: Any, base: Any, bare: RoundsOptions, where: str) -> dict[str, ControllerOptions]:
    found = {}
    for name, table in tables.items() if isinstance(tables, dict) else [("", tables)]:
        if not isinstance(table, dict) or not NAME.fullmatch(name):
            raise UserError(
                f"{where}: write [variants.NAME] with settings that differ, NAME of letters, digits, '.', '-' and '_'"
            )
        if not isinstance(base, dict):
            raise UserError(f"{where} has {name} and there is no [controller]; add it")
        found[name] = _controller({**base, **table}, bare, f"{where}.{name}")
    return {name: options for name, options in found.items() if options is not None}
