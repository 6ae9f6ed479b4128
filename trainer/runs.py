"""Runs on disk: the folder of a world model or a decoder.

config.json                         all settings of the run, the shape of the data, the path of the store
identity.json                       the identity and the card of that store
metrics.jsonl                       one line a logged step
checkpoints/                        see `engine.checkpoint`
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from wmcache.cache.identity import Identity
from wmcache.cache.layout import StoreCard, read_card
from wmcache.cache.store import TokenStore
from wmcache.common.errors import UserError, reason
from wmcache.common.files import is_temporary
from wmcache.common.jsonfiles import read_json, write_json
from wmcache.common.locks import exclusive
from wmcache.common.paths import AnyPath, as_path, exists
from wmcache.common.schema import Size, parse
from wmcache.engine.checkpoint import last_checkpoint, load_tensors
from wmcache.trainer.models import MODELS, DataShape, WorldModel, build

N = TypeVar("N", bound=nn.Module)

NO_RUN = "name the folder of a run, restore the file from a copy, or train a model with: wmtrain --cache STORE"


@dataclass(frozen=True)
class _Config:
    """What is validated of a world model's settings before it is built from them."""

    model: str
    model_options: dict[str, bool | Annotated[float, Field(ge=0, le=2**16)] | Annotated[str, Field(max_length=32)]]
    shape: DataShape
    cache: str
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
    if (out / "config.json").exists() and (out / "identity.json").exists():
        return True
    names = {file.name for file in out.iterdir() if not is_temporary(file)} if out.exists() else set()
    if names - {"identity.json"}:  # a run that was killed at its start has this file only
        raise UserError(f"{out} exists and is not a run; choose another --out")
    return False


def write_settings(out: Path, config: Mapping[str, Any], store: TokenStore) -> None:
    """Write what a run is: config.json and identity.json."""
    write_json(out / "identity.json", {"identity": store.identity.to_json(), "card": asdict(store.card)})
    write_json(out / "config.json", dict(config))


def read_config(run: Path) -> dict[str, Any]:
    """Read the settings of a world model's run; raises UserError where the folder is not one."""
    file = run / "config.json"
    config = read_json(file, NO_RUN)
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


def open_store(run: Path, cache: AnyPath | None = None) -> TokenStore:
    """Open the store that a run was trained on, at `cache` if it has moved; raises UserError where it is missing or another one."""
    identity, path = read_identity(run)[1], as_path(cache or read_config(run)["cache"])
    try:
        store = TokenStore.open(path)
    except UserError as error:
        with suppress(OSError):
            if not exists(path):
                raise UserError(
                    f"{path}, the store of {run}, does not exist; if it has moved, pass its path now with --cache"
                ) from error
        raise
    if different := identity.differences(store.identity):
        raise UserError(
            f"{store.path} is not the store that {run} was trained on ({'; '.join(different)}); pass the right --cache"
        )
    return store


def load_model(run: Path, device: torch.device, *, untrained: bool = False) -> WorldModel:
    """Load the newest model of a run, frozen; `untrained` draws random weights instead, and keeps the buffers.

    Raises UserError where the folder is not a run, or has no usable checkpoint.
    """
    config = read_config(run)

    def make(statistics: dict[str, Tensor]) -> WorldModel:
        return build(config["model"], DataShape(**config["shape"]), config["model_options"], statistics)

    try:
        MODELS.get(config["model"])
    except UserError as error:
        raise UserError(f"{run} cannot be loaded: {error}") from error
    model = load_network(run, make, device)
    if untrained:
        buffers = dict(model.named_buffers())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(config.get("seed", 0)))
            model = make({name: value.cpu() for name, value in _statistics(buffers).items()})
        model.load_state_dict({**model.state_dict(), **buffers})
        model.to(device).eval().requires_grad_(False)
    return model


def load_network(run: Path, make: Callable[[dict[str, Tensor]], N], device: torch.device) -> N:
    """Load the newest network of a run, frozen; `make` builds it from the statistics of the data (`…_mean`, `…_std`) in its checkpoint.

    Raises UserError where there is none, or it is damaged or does not fit.
    """
    folder = last_checkpoint(run)
    weights = load_tensors(folder, "model.safetensors")
    statistics = _statistics(weights)
    try:
        with torch.device("meta"):  # allocates nothing, whatever sizes the settings name
            sizes = {name: value.shape for name, value in make(statistics).state_dict().items()}
        if sizes != {name: value.shape for name, value in weights.items()}:
            raise ValueError("other sizes")  # noqa: TRY301
        network = make(statistics)
        network.load_state_dict(weights)
    except (UserError, KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise UserError(
            f"{folder / 'model.safetensors'} does not fit its config.json ({reason(error, 200)}); "
            "restore its config.json, or train into another --out"
        ) from error
    return network.to(device).eval().requires_grad_(False)


def _statistics(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if name.endswith(("_mean", "_std"))}
