"""Runs on disk: the folder of a world model or a decoder, and whether a run continues, from where.

config.json                         all settings of the run, the shape of the data, the path of the store
identity.json                       the identity and the card of that store
metrics.jsonl                       one line a logged step
checkpoints/                        see `engine.checkpoint`
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from wmcache.cache.identity import Identity
from wmcache.cache.joined import grows, open_stores
from wmcache.cache.layout import StoreCard, read_card
from wmcache.cache.store import TokenStore
from wmcache.common.errors import MissingError, UserError
from wmcache.common.files import is_temporary, sha256_of
from wmcache.common.folders import did_you_mean
from wmcache.common.jsonfiles import read_json, write_json
from wmcache.common.locks import exclusive
from wmcache.common.paths import AnyPath, absolute, as_path
from wmcache.common.schema import Size, parse
from wmcache.engine.checkpoint import (
    FILES,
    Progress,
    checkpoints,
    last_checkpoint,
    load_tensors,
    load_weights,
    misfit,
    read_progress,
)
from wmcache.trainer.models import DataShape, Trainable, WorldModel, build, read_options
from wmcache.trainer.models.trainable import without_proprio
from wmcache.trainer.options import TrainOptions

N = TypeVar("N", bound=nn.Module)

MAY_CHANGE = {
    *("cache", "device", "residence", "compile", "log_every", "validate_every", "checkpoint_every"),
    *("stage", "start"),
}
SCHEDULE = ("steps", "epochs", "learning_rate", "warmup", "decay")
MAY_CHANGE_ON_RESUME = MAY_CHANGE.union(SCHEDULE)
MAY_CHANGE_WITH_THE_STAGE = MAY_CHANGE_ON_RESUME | {
    *("batch", "accumulate", "beta2", "weight_decay", "decay_all", "clip"),
}
NO_RUN = "name the folder of a run, restore the file from a copy, or train a model with: wmtrain --cache STORE"


@dataclass(frozen=True)
class _Config:  # validated before a model is built of it
    model: str
    model_options: dict[str, bool | Annotated[float, Field(ge=0, le=2**16)] | Annotated[str, Field(max_length=32)]]
    shape: DataShape
    cache: str | list[str]
    frameskip: Size


@contextmanager
def lock_run(out: Path, program: str = "wmtrain") -> Iterator[None]:
    """Keep other processes from writing to a run; raises UserError where one already does."""
    with exclusive(out.with_name(f".{out.name}.lock"), out, wait=False) as locked:
        if not locked:
            raise UserError(f"another {program} is at work on {out}; wait for it, or choose another --out")
        yield


def is_run(out: Path) -> bool:
    """Whether a folder is a run or a decoder; raises UserError where it contains anything else."""
    names = {file.name for file in out.iterdir() if not is_temporary(file)} if out.exists() else set()
    found = {"config.json", "identity.json"} <= names
    if not found and names - {"identity.json"}:  # a run that was killed at its start has this file only
        raise UserError(f"{out} exists and is not a run; choose another --out")
    return found


def describe_caches(caches: Sequence[AnyPath]) -> str | list[str]:
    """Return the entry `cache` of config.json: a path, or the paths of several stores that are read as one."""
    paths = [absolute(path) for path in caches]
    return paths[0] if len(paths) == 1 else paths


def caches_of(config: Mapping[str, Any]) -> list[AnyPath]:
    """Return the paths of a run's stores."""
    cache = config["cache"]
    return [as_path(path) for path in ([cache] if isinstance(cache, str) else cache)]


def moved_caches(cache: AnyPath | Sequence[AnyPath] | None) -> list[AnyPath]:
    """Return the present paths of a run's stores as a list; empty where they have not moved."""
    return [] if cache is None else list(cache) if isinstance(cache, Sequence) else [cache]


def write_settings(out: Path, config: Mapping[str, Any], store: TokenStore) -> None:
    """Write what a run is: config.json and identity.json."""
    write_json(out / "identity.json", {"identity": store.identity.to_json(), "card": store.card.to_json()})
    write_json(out / "config.json", dict(config))


def read_config(run: Path) -> dict[str, Any]:
    """Read the settings of a world model's run; raises UserError where the folder is not one."""
    file = run / "config.json"
    try:
        config = read_json(file, NO_RUN)
    except MissingError:
        raise MissingError(f"{file} does not exist; {did_you_mean(run, 'run', NO_RUN)}") from None
    parse(_Config, config, file, NO_RUN, exact=False, fault="is not a run's")
    return config


def differences(before: Mapping[str, Any], now: Mapping[str, Any], names: Collection[str]) -> list[str]:
    """Describe the settings among `names` that differ, as `name before != now`."""
    return [
        f"{name} {before.get(name)} != {value}"
        for name, value in now.items()
        if name in names and before.get(name) != value
    ]


def read_identity(run: Path) -> tuple[StoreCard, Identity]:
    """Read the card and the identity of a run's store; raises UserError where the folder is not a run."""
    file = run / "identity.json"
    saved = read_json(file, NO_RUN)
    return read_card(saved, file), Identity.from_json(saved.get("identity"), str(file))


def foreign_identity(run: Path, identity: Identity) -> list[str]:
    """Describe how the identity of a store differs from that of a run's store."""
    return [f"the store's identity, {item}" for item in read_identity(run)[1].differences(identity)]


def open_store(run: Path, cache: AnyPath | Sequence[AnyPath] | None = None) -> TokenStore:
    """Open the store that a run was trained on, or its stores as one; raises UserError where one is missing or another one.

    Args:
        cache: their present paths, in order, if they have moved.
    """
    caches, moved = caches_of(read_config(run)), moved_caches(cache)
    if moved and len(moved) != len(caches):
        raise UserError(f"{run} has {len(caches)} stores, not {len(moved)}; pass --cache for each of them, in order")
    try:
        store = open_stores(moved or caches)
    except MissingError as error:
        raise UserError(f"{error}; if the store of {run} has moved, pass its path now with --cache") from error
    if different := foreign_identity(run, store.identity):
        why = f"{store.path} is not the store that {run} was trained on ({'; '.join(different)})"
        raise UserError(f"{why}; pass the right --cache")
    return store


def load_model(run: Path, device: torch.device) -> WorldModel:
    """Load the newest world model of a run, frozen; raises UserError where the run is of a policy."""
    model = load_trained(run, device)
    if not isinstance(model, WorldModel):
        raise needs_world_model(run)
    return model


def require_actions(model: Trainable, run: Path) -> None:
    """Raise UserError for a world model that predicts videos without actions."""
    if isinstance(model, WorldModel) and not model.takes_actions:
        raise UserError(
            f"{run} predicts videos without actions, so nothing can act on it; train on a store with actions, without --actions none"
        )


def needs_world_model(run: Path) -> UserError:
    """Return the error for a run of a policy where a world model is needed."""
    kind = read_config(run)["model"]
    return UserError(
        f"{run} is a policy, {kind}, and no world model; name the run of a world model, or act with: wmplan --policy actor"
    )


def data_split(config: Mapping[str, Any]) -> tuple[int, float]:
    """Return the seed of a run's split into train and val episodes, and the share of the train episodes that it was trained on."""
    return int(config.get("split_seed", 42)), float(config.get("episodes_fraction", 1.0))


def load_trained(run: Path, device: torch.device, *, untrained: bool = False) -> Trainable:
    """Load the newest model or policy of a run, frozen; `untrained` draws random weights, and keeps the statistics and the stage."""
    config = read_config(run)

    def make(statistics: dict[str, Tensor]) -> Trainable:
        return build(config["model"], DataShape(**config["shape"]), config["model_options"], statistics)

    model = load_network(run, make, device)
    if untrained:
        saved = model.state_dict()
        statistics = _statistics(saved)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(config.get("seed", 0)))
            model = make({name: value.cpu() for name, value in statistics.items()})
        stage = {name: value for name, value in saved.items() if name == "stage"}
        model.load_state_dict({**model.state_dict(), **statistics, **stage})
        model.to(device).eval().requires_grad_(False)
    return model


def load_network(run: Path, make: Callable[[dict[str, Tensor]], N], device: torch.device) -> N:
    """Load the newest network of a run, frozen; `make` builds it from the statistics of the data (`…_mean`, `…_std`) in its checkpoint."""
    folder = last_checkpoint(run)
    weights = load_tensors(folder, FILES[0])
    statistics = _statistics(weights)
    try:
        with torch.device("meta"):  # allocates nothing, whatever sizes the settings name
            sizes = {name: value.shape for name, value in make(statistics).state_dict().items()}
        if sizes != {name: value.shape for name, value in weights.items()}:
            raise ValueError("other sizes")  # noqa: TRY301
        network = make(statistics)
        network.load_state_dict(weights)
    except (UserError, KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise misfit(folder, error) from error
    return network.to(device).eval().requires_grad_(False)


def weights_checksum(run: Path) -> str:
    """Return the SHA-256 of a run's newest weights."""
    return sha256_of(last_checkpoint(run) / FILES[0])


def _statistics(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if name.endswith(("_mean", "_std"))}


def find_stages(
    out: Path, model: Trainable, config: Mapping[str, Any], identity: Identity, *, overwrite: bool
) -> tuple[list[Progress], bool]:
    """Find what is left to train, without writing anything; where a run starts from another one, load its weights into `model`.

    Returns:
        Where each stage that has steps left begins or continues, and whether the wanted stage follows one that the run has.
    """
    wanted = config["stage"]
    if wanted != "all" and wanted not in model.stages:
        raise UserError(f"--stage {wanted} is unknown; known are {', '.join((*model.stages, 'all'))}")
    stages = model.stages or ("",) if wanted == "all" else (wanted,)
    progress = _find_progress(out, model, stages[0], config, identity, overwrite=overwrite)
    begins = model.stage_number(wanted) > model.stage_number(progress.stage) > 0
    if progress.stage in stages and not progress.finished and progress.step >= progress.begun + config["steps"]:
        done = progress.step - progress.begun
        raise UserError(f"unfinished stage {progress.stage} of {out} has had {done} steps; --steps must be more")
    left: list[Progress] = []
    for stage in stages:
        # Lowering `--steps` does not reopen a finished stage.
        if model.stage_number(stage) >= model.stage_number(progress.stage):
            begun = progress.begun if stage == progress.stage else progress.step
            if progress.step < begun + config["steps"]:
                left.append(Progress(progress.step, stage, begun))
            progress = Progress(max(progress.step, begun + config["steps"]), stage, begun, finished=True)
    return left, begins


def _find_progress(
    out: Path, model: Trainable, stage: str, config: Mapping[str, Any], identity: Identity, *, overwrite: bool
) -> Progress:
    before = max(0, model.stage_number(stage) - 1)
    previous = model.stages[before - 1] if before else ""
    start, progress, begun = config["start"], Progress(), not overwrite and bool(checkpoints(out))
    if begun:
        progress = read_progress(last_checkpoint(out))
        late = bool(model.stages) and model.stage_number(progress.stage) <= before
        refused = late or read_config(out).get("start") != start
    else:
        refused = start and Path(start).resolve() == out.resolve()
    if start and not model.stages and refused:
        raise UserError(f"{out} does not begin from {start}; leave out --from, or choose another --out")
    if start and model.stages and (refused or not before):
        raise UserError(f"--stage {stage or 'all'} of {out} cannot start from {start}; leave out --from")
    if start and not (progress.stage or begun):
        _load_start(Path(start), model, previous, identity, config)
        progress = Progress(stage=previous, finished=bool(previous))
    reached = model.stage_number(progress.stage)
    if reached < before or (before and reached == before and not progress.finished):
        why = f"stage {stage} needs a finished stage {previous}, which {out} does not have"
        raise UserError(f"{why}; train it with --stage {previous}, or name a run that has it with --from")
    return progress


def _load_start(start: Path, model: Trainable, stage: str, identity: Identity, config: Mapping[str, Any]) -> None:
    if not (start / "config.json").exists():
        raise UserError(f"--from {start} is not a run; name the folder of one, or leave it out")
    before = read_config(start)
    folder = finished_stage(start, stage) if stage else last_checkpoint(start)
    names = {"history", "frameskip", "split_seed", "episodes_fraction", *config["model_options"]}
    different = _differences(before, config, names - model.may_change_after(stage))
    grown = not stage and grows(read_identity(start)[1], identity)
    if different := different + ([] if grown else foreign_identity(start, identity)):
        raise UserError(f"{start} is of another model or store ({'; '.join(different)}); name another --from")
    load_weights(folder, model)


def recorded_start(out: Path) -> str | None:
    """Return the run that a run began from, if any."""
    start = read_config(out).get("start") if is_run(out) else None
    return str(start) if start else None


def finished_stage(run: Path, stage: str) -> Path:
    """Return the newest checkpoint that ends a stage; raises UserError where the folder is not a run, or has none."""
    read_config(run)
    for folder in reversed(checkpoints(run)):
        progress = read_progress(folder)
        if progress.stage == stage and progress.finished:
            return folder
    raise UserError(f"{run} has no finished stage {stage}; train it there with --stage {stage}, or name another --from")


def prepare_run(
    out: Path, config: dict[str, Any], store: TokenStore, *, resume: bool, overwrite: bool, begins: bool, finished: bool
) -> bool:
    """Write what a run is, and return whether it has a checkpoint; raises UserError where what differs may not change."""
    exists = is_run(out)
    if resume and not checkpoints(out):
        raise UserError(f"{out} has no checkpoint to resume; run without --resume")
    if exists and overwrite:
        shutil.rmtree(out)
    elif exists:
        before = read_config(out)
        free = MAY_CHANGE_WITH_THE_STAGE if begins else MAY_CHANGE_ON_RESUME if resume else MAY_CHANGE
        names = {*config, *config["model_options"]} - {*free, "model_options"}
        different = _differences({**asdict(TrainOptions()), **before}, config, names)
        grown = resume and grows(read_identity(out)[1], store.identity)
        foreign = [] if grown else foreign_identity(out, store.identity)
        if different or foreign:
            resumes = not foreign and names & MAY_CHANGE_ON_RESUME & {text.split()[0] for text in different}
            hint = "continue it with --resume and its other options, or " if resumes and checkpoints(out) else ""
            found = "; ".join([*different, *foreign])
            raise UserError(f"{out} is a run with other settings ({found}); {hint}choose another --out")
        config = {**config, "start": config["start"] or before.get("start")}
        if finished:  # with the steps that it has had
            config |= {name: before[name] for name in SCHEDULE if name in before}
    write_settings(out, config, store)
    return bool(checkpoints(out))


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], names: Collection[str]) -> list[str]:
    """Describe the settings and the model's options among `names` that differ; for another model only that."""
    if before["model"] != now["model"]:
        return [f"model {before['model']} != {now['model']}"]
    old, new = ({**config, "shape": asdict(DataShape(**config["shape"])), **_full(config)} for config in (before, now))
    return differences(old, new, names)


def _full(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return all options of a run's model: those that are newer than the run had their defaults."""
    options = read_options(config["model"], config["model_options"])
    # Some earlier runs record another choice for data that has none.
    return asdict(options if config["shape"]["proprio_dim"] else without_proprio(options))
