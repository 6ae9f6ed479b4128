"""Runs on disk: a folder of JSON and safetensors, in which every file and every checkpoint is whole or absent.

config.json                         all settings of the run, the shape of the data, the path of the store
identity.json                       the identity and the card of that store
metrics.jsonl                       one line a logged step
checkpoints/step-00001200/          model.safetensors, optimizer.safetensors, state.json
checkpoints/last                    symbolic link to the newest
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from wmcache.cache.identity import Identity
from wmcache.cache.layout import StoreCard, read_card, require_identity
from wmcache.cache.store import TokenStore
from wmcache.common.errors import MissingError, UnreadableError, UserError
from wmcache.common.files import sha256_of, sync
from wmcache.common.folders import did_you_mean
from wmcache.common.jsonfiles import read_json, require_seal, seal, write_json
from wmcache.common.paths import AnyPath, as_path, cause_outside, exists, unreadable
from wmcache.common.schema import Size, parse
from wmcache.common.tensors import load_tensors as open_all
from wmcache.trainer.models import DataShape, build, get_options, read_options

KEEP = 2
"""Checkpoints that stay: the newest, and the one before it for the case that the newest turns out bad."""

FILES = ("model.safetensors", "optimizer.safetensors")
FALL_BACK = "move its folder out of checkpoints to continue from the checkpoint before it"
REFIT = "restore its config.json, or train into another --out"
NO_RUN = "name the folder of a run, restore the file from a copy, or train a model with: wmtrain --cache STORE"


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        step: of all stages together.
        stage: that is or was trained last; empty before the first, and for models without stages.
        begun: the step that it began at.
        finished: whether it has had all of its steps.
    """

    step: int = 0
    stage: str = ""
    begun: int = 0
    finished: bool = False


def save_checkpoint(
    run: Path,
    step: int,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    *,
    stage: str = "",
    begun: int = 0,
    finished: bool = False,
) -> Path:
    """Write a checkpoint to a temporary folder, rename it, then move `last`; returns its folder.

    A kill at any moment leaves the previous checkpoint as it was. The end of a stage is kept for good; for `stage`, `begun` and
    `finished` see `Progress`.

    Raises:
        UserError: it cannot be written.
    """
    folder = run / "checkpoints"
    final, temporary = folder / f"step-{step:08d}", folder / f".step-{step:08d}.tmp"
    try:
        for unfinished in folder.glob(".step-*.tmp"):
            shutil.rmtree(unfinished, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(_contiguous(model.state_dict()), temporary / "model.safetensors")
        save_file(_optimiser_tensors(model, optimiser), temporary / "optimizer.safetensors")
        checksums = {name: sha256_of(temporary / name) for name in FILES}
        write_json(
            temporary / "state.json", seal({**asdict(Progress(step, stage, begun, finished)), "sha256": checksums})
        )
        for file in temporary.iterdir():
            sync(file)
        sync(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        link = folder / ".last.tmp"
        link.unlink(missing_ok=True)
        link.symlink_to(final.name)
        last = folder / "last"
        if last.is_dir() and not last.is_symlink():  # as some programs copy a link
            shutil.rmtree(last)
        link.replace(last)
        sync(folder)
    except (OSError, SafetensorError, UserError) as error:
        raise UserError(
            f"cannot write checkpoint {final} ({error.__cause__ or error}); free space, then run the same command again"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in checkpoints(run)[:-KEEP]:
        if not _ends_a_stage(old):
            shutil.rmtree(old)
    return final


def _ends_a_stage(folder: Path) -> bool:
    try:
        progress = read_progress(folder)
    except UnreadableError:
        return True  # what cannot be read just now is kept
    except UserError:
        return False
    return bool(progress.stage) and progress.finished


def finished_stage(run: Path, stage: str) -> Path:
    """The newest checkpoint of a run that ends this stage; raises UserError where the folder is no run, or has none."""
    read_config(run)
    for folder in reversed(checkpoints(run)):
        progress = read_progress(folder)
        if progress.stage == stage and progress.finished:
            return folder
    raise UserError(f"{run} has no finished stage {stage}; train it there with --stage {stage}, or name another --from")


def load_training_state(run: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> int:
    """Put the newest checkpoint into `model` and `optimiser` and restore the random generators; returns its step.

    Raises:
        UserError: there is none, or it is damaged or of another shape.
    """
    folder = last_checkpoint(run)
    load_weights(folder, model)
    tensors = load_tensors(folder, "optimizer.safetensors")
    named = dict(model.named_parameters())
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            name = next(key for key, value in named.items() if value is parameter)
            state = {}
            for moment in ("step", "exp_avg", "exp_avg_sq"):
                value = tensors.get(f"{moment}.{name}")
                if value is None:
                    raise UserError(f"{folder / 'optimizer.safetensors'} lacks {moment}.{name}; {FALL_BACK}")
                state[moment] = value if moment == "step" and not group.get("fused") else value.to(parameter.device)
            optimiser.state[parameter] = state
    torch.set_rng_state(tensors["rng.cpu"])
    if torch.cuda.is_available() and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    return read_progress(folder).step


def load_model(run: Path, device: torch.device, *, untrained: bool = False) -> Any:
    """The newest model of a run, ready to imagine: an `nn.Module` that is a `WorldModel`.

    Args:
        run: its folder. device: where the model goes.
        untrained: random weights instead of the trained ones; sizes, statistics of the data and whatever else is not trained stay.

    Raises:
        UserError: the folder is no run, or holds no usable checkpoint.
    """
    config = read_config(run)

    def make(statistics: dict[str, Tensor]) -> nn.Module:
        model: nn.Module = build(config["model"], DataShape(**config["shape"]), config["model_options"], statistics)
        return model

    try:
        get_options(config["model"])
    except UserError as error:
        raise UserError(f"{run} cannot be loaded: {error}") from error
    model = load_network(run, make, device, REFIT)
    if untrained:
        known = dict(model.named_buffers())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(config.get("seed", 0)))
            model = make({name: value.cpu() for name, value in known.items() if name.endswith(("_mean", "_std"))})
        model.load_state_dict({**model.state_dict(), **known})
        model.to(device).eval().requires_grad_(False)
    return model


def open_store(run: Path, cache: AnyPath | None = None) -> TokenStore:
    """The store that a run was trained on.

    Args:
        run: its folder. cache: where the store is now, if it has moved.

    Raises:
        UserError: it is not there, or `cache` is another one.
    """
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


def load_network(run: Path, make: Callable[[dict[str, Tensor]], nn.Module], device: torch.device, hint: str) -> Any:
    """The newest network of a run, frozen.

    Args:
        run: its folder. device: where it goes.
        make: the network by the run's settings, from the statistics (`…_mean`, `…_std`) that its checkpoint holds.
        hint: what to do where the checkpoint does not fit those settings.

    Raises:
        UserError: there is no checkpoint, or it is damaged or does not fit.
    """
    folder = last_checkpoint(run)
    weights = load_tensors(folder, "model.safetensors")
    statistics = {name: value for name, value in weights.items() if name.endswith(("_mean", "_std"))}
    try:
        with torch.device("meta"):  # costs no memory, whatever sizes the settings name
            sizes = {name: value.shape for name, value in make(statistics).state_dict().items()}
        if sizes != {name: value.shape for name, value in weights.items()}:
            raise ValueError("it has other sizes")  # noqa: TRY301
        model = make(statistics)
        model.load_state_dict(weights)
    except (UserError, KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder / 'model.safetensors'} does not fit its config.json ({reason}); {hint}") from error
    return model.to(device).eval().requires_grad_(False)


def load_weights(folder: Path, model: nn.Module) -> None:
    """Put a checkpoint's weights into `model`; raises UserError where they do not fit."""
    try:
        model.load_state_dict(load_tensors(folder, "model.safetensors"))
    except RuntimeError as error:
        raise UserError(
            f"{folder} does not fit its config.json ({' '.join(str(error).split())[:200]}); {REFIT}"
        ) from error


def read_config(run: Path) -> dict[str, Any]:
    """The settings of a run; raises UserError where the folder is no run."""
    try:
        config = read_json(run / "config.json", NO_RUN)
    except MissingError:
        raise MissingError(f"{run / 'config.json'} does not exist; {did_you_mean(run, 'run', NO_RUN)}") from None
    if missing := {"model", "model_options", "shape", "cache", "frameskip"} - set(config):
        raise UserError(f"{run / 'config.json'} is not a run's (it lacks {', '.join(sorted(missing))}); {NO_RUN}")
    parse(_Config, config, run / "config.json", NO_RUN, exact=False)
    return config


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's settings, each option of its model for itself; one that is younger than the run has its default, which it had then."""
    chosen = asdict(read_options(config["model"], config["model_options"]))
    return {**{name: value for name, value in config.items() if name != "model_options"}, **chosen}


@dataclass(frozen=True)
class _Config:
    """What must be true of a run's settings before a model is built by them."""

    model: str
    model_options: dict[str, bool | Annotated[float, Field(ge=0, le=2**16)] | Annotated[str, Field(max_length=32)]]
    shape: DataShape
    cache: str
    frameskip: Size


def read_identity(run: Path) -> tuple[StoreCard, Identity]:
    """The card and the identity of the store that a run was trained on; raises UserError where the folder is no run."""
    file = run / "identity.json"
    saved = read_json(file, NO_RUN)
    require_identity(saved, file, NO_RUN)
    return read_card(saved), Identity.from_json(saved["identity"], str(file))


def read_state(folder: Path) -> dict[str, Any]:
    """The step of a checkpoint and the checksums of its files; raises UserError where it is not what was written."""
    file = folder / "state.json"
    return require_seal(read_json(file, FALL_BACK), file, FALL_BACK)


def read_progress(folder: Path) -> Progress:
    """How far a checkpoint is; raises UserError where it is not what was written."""
    file = folder / "state.json"
    known = {
        name: value for name, value in read_state(folder).items() if name in {"step", "stage", "begun", "finished"}
    }
    return parse(Progress, known, file, FALL_BACK)


def last_checkpoint(run: Path) -> Path:
    """The folder of the newest checkpoint; raises UserError where there is none."""
    if not (found := checkpoints(run)):
        raise UserError(f"{run} has no checkpoint yet; run its wmtrain again")
    last = run / "checkpoints" / "last"
    target = last.parent / last.readlink() if last.is_symlink() else None
    return target if target in found else found[-1]


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))


def truncate_metrics(run: Path, step: int) -> None:
    """Drop what was logged after `step`, which a resumed run will log again."""
    file = run / "metrics.jsonl"
    if file.exists():
        lines = [line for line in file.read_text(errors="replace").splitlines() if _step(line) <= step]
        temporary = file.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in lines))
        temporary.replace(file)


def _step(line: str) -> float:
    """The step of a logged line; infinite for a line that a kill or a full disk has garbled."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf


def _optimiser_tensors(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    for name, parameter in model.named_parameters():
        for moment, value in optimiser.state[parameter].items():
            tensors[f"{moment}.{name}"] = value
    return _contiguous(tensors)


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().contiguous() for name, value in tensors.items()}


def load_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """A file of a checkpoint; raises UserError where it is not what was written."""
    file = folder / name
    try:
        if sha256_of(file) != read_state(folder)["sha256"].get(name):
            raise UserError(f"{file} differs from its checksum; {FALL_BACK}")
        return open_all(file)
    except (OSError, SafetensorError) as error:
        if outside := cause_outside(error):
            raise unreadable(file, outside) from error
        raise UserError(f"{file} cannot be read ({error}); {FALL_BACK}") from error
