"""All settings of online training, and how its TOML file and flags are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from wmcache.cluster.tasks import parse_cluster
from wmcache.common.errors import UserError
from wmcache.common.options import Positive, parse_options
from wmcache.planner.options import PlanOptions
from wmcache.study.online_flags import ENCODER, EPISODES, OnlineCollect, OnlineFlags, OnlineTrain
from wmcache.study.options import EncoderChoice, errors_at, read_encoder, read_plan, read_toml, refuse_names
from wmcache.trainer.models import MODELS, Dreams, dreaming_models
from wmcache.trainer.models import read_options as read_model_options
from wmcache.trainer.options import ActorOptions
from wmcache.trainer.perturb import check_shifts

TABLES = ("collect", "encoder", "train", "actor", "policy", "plan")


@dataclass(frozen=True)
class OnlineOptions(OnlineFlags):
    """All settings of online training.

    Attributes:
        encoder: fitted once, on the frames of the prefill's last part, or with weights.
        policy: how the actor acts while it collects; it draws its actions.
        plan: evaluations, in which the actor takes its most probable actions.
        batch: frames in each call of the encoder.
    """

    encoder: EncoderChoice = field(default_factory=lambda: EncoderChoice(name=ENCODER))
    collect: OnlineCollect = field(default_factory=OnlineCollect)
    train: OnlineTrain = field(default_factory=OnlineTrain)
    actor: ActorOptions = field(default_factory=ActorOptions)
    policy: PlanOptions = field(default_factory=PlanOptions)
    plan: PlanOptions = field(default_factory=PlanOptions)
    batch: Positive = 32
    device: str = "auto"
    cluster: str = "local:1"

    def updates(self, env_steps: int) -> int:
        """Return the updates that the model, and the actor, have had after this many env steps."""
        return max(1, int(self.train_ratio * env_steps))


def read_online(file: Path | None, flags: Mapping[str, Any] | None = None) -> OnlineOptions:
    """Read a TOML file of online training, if there is one.

    Args:
        flags: values that win, by name: of the file's top level, or `table.name` of one of its tables.
    """
    where = str(file or "wmcache online")
    values = read_toml(file) if file else {}
    tables = {name: values.pop(name, {}) for name in TABLES}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise UserError(f"{where}: {name} is not a table; write [{name}]")
    for flag, value in (flags or {}).items():
        name, _, key = flag.rpartition(".")
        _set(tables[name] if name else values, key, value)
    by_it = "it is set by wmcache online"
    for name, refused in {
        "collect": ("seed", "episodes"),
        "train": ("seed", "steps", "epochs", "warmup", "decay", "stage", "start"),
        "actor": ("seed", "steps"),
        "policy": ("policy", "episodes", "budget", "batch", "seed", "env"),
        "plan": ("policy",),
    }.items():
        refuse_names(tables[name], refused, f"{where}: {name}", by_it)
    bare = parse_options(OnlineOptions, values, where)
    if bare.prefill > bare.steps:
        raise UserError(f"{where}: prefill {bare.prefill} is more than steps {bare.steps}; lower it, or raise steps")
    return replace(bare, **_read_tables(tables, bare, where))


def _set(table: dict[str, Any], key: str, value: Any) -> None:
    """Set an option. Those of a model are added to the table's; another model, or another encoder, does not have these."""
    if isinstance(value, dict):
        value = {**table.get(key, {}), **value}
    elif key == "model" and table.get(key, OnlineTrain.model) != value:
        table.pop("model_options", None)
    elif key == "name" and table.get(key, ENCODER) != value:
        table.clear()
    table[key] = value


def _read_tables(tables: Mapping[str, dict[str, Any]], bare: OnlineOptions, where: str) -> dict[str, Any]:
    with errors_at(f"{where}: cluster"):
        parse_cluster(bare.cluster)
    shared = {"device": bare.device, "seed": bare.seed}
    collect = parse_options(OnlineCollect, {**tables["collect"], "seed": bare.seed}, f"{where}: collect")
    trained = parse_options(OnlineTrain, {**shared, **tables["train"]}, f"{where}: train")
    with errors_at(f"{where}: train"):
        kind = MODELS.get(trained.model)
        if kind.stages or not issubclass(kind, Dreams):
            raise UserError(f"no actor learns in the imagination of model {trained.model}; choose {dreaming_models()}")
        read_model_options(trained.model, trained.model_options)
        check_shifts(trained)
    policy = read_plan(tables["policy"], f"{where}: policy")
    plan = {"episodes": EPISODES, "budget": collect.length - 1, **tables["plan"]}
    return {
        "collect": collect,
        "encoder": read_encoder({"name": ENCODER, **tables["encoder"]}, bare.seed, f"{where}: encoder"),
        "train": trained,
        "actor": parse_options(ActorOptions, {**shared, **tables["actor"]}, f"{where}: actor"),
        "policy": replace(policy, device=bare.device, draw=bool(tables["policy"].get("draw", True))),
        "plan": replace(read_plan(plan, f"{where}: plan"), device=bare.device),
    }
