"""Checkpoints: folders of safetensors and JSON, each whole or absent.

checkpoints/step-00001200/          model.safetensors, optimizer.safetensors, state.json
checkpoints/last                    symbolic link to the newest
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from wmcache.common.errors import UnreadableError, UserError, reason
from wmcache.common.files import sha256_of, sync
from wmcache.common.jsonfiles import read_json, require_seal, seal, write_json
from wmcache.common.paths import cause_outside, unreadable
from wmcache.common.schema import parse
from wmcache.common.tensors import load_tensors as load_file

KEEP = 2  # the newest, and the one before it in case the newest turns out bad
FILES = ("model.safetensors", "optimizer.safetensors")
FALL_BACK = "move its folder out of checkpoints to continue from the checkpoint before it"


@dataclass(frozen=True)
class Progress:
    """How far a run is: steps of all stages together, the last stage (empty for tasks without stages) and the step where it began."""

    step: int = 0
    stage: str = ""
    begun: int = 0
    finished: bool = False


def save_checkpoint(run: Path, progress: Progress, network: nn.Module, optimiser: torch.optim.Optimizer) -> Path:
    """Write a checkpoint to a temporary folder, rename it, and point `last` to it; returns the folder.

    A kill at any moment leaves the checkpoint before it as it was. Older ones are deleted, except those that end a stage.
    """
    folder = run / "checkpoints"
    final, temporary = folder / f"step-{progress.step:08d}", folder / f".step-{progress.step:08d}.tmp"
    try:
        for unfinished in folder.glob(".step-*.tmp"):
            shutil.rmtree(unfinished, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(_contiguous(network.state_dict()), temporary / FILES[0])
        save_file(_contiguous(_training_state(network, optimiser)), temporary / FILES[1])
        checksums = {name: sha256_of(temporary / name) for name in FILES}
        write_json(temporary / "state.json", seal({**asdict(progress), "sha256": checksums}))
        for file in temporary.iterdir():
            sync(file)
        sync(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        link, last = folder / ".last.tmp", folder / "last"
        link.unlink(missing_ok=True)
        link.symlink_to(final.name)
        if last.is_dir() and not last.is_symlink():  # some programs copy a link as a folder
            shutil.rmtree(last)
        link.replace(last)
        sync(folder)
    except (OSError, SafetensorError, UserError) as error:
        why = reason(error.__cause__ or error)
        raise UserError(f"cannot write {final} ({why}); free space, then run the same command again") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in checkpoints(run)[:-KEEP]:
        if not _ends_a_stage(old):
            shutil.rmtree(old)
    return final


def _ends_a_stage(folder: Path) -> bool:
    try:
        progress = read_progress(folder)
    except UserError as error:  # keep what cannot be read at the moment, and not the rest of an interrupted deletion
        return isinstance(error, UnreadableError)
    return bool(progress.stage) and progress.finished


def _training_state(network: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the states of the random generators, and those of the optimiser as `<entry>.<name of the parameter>`."""
    tensors = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    for name, parameter in network.named_parameters():
        for entry, value in optimiser.state.get(parameter, {}).items():
            tensors[f"{entry}.{name}"] = value
    return tensors


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().contiguous() for name, value in tensors.items()}


def load_training_state(run: Path, network: nn.Module, optimiser: torch.optim.Optimizer) -> int:
    """Load the newest checkpoint into `network`, `optimiser` and the random generators; returns its step."""
    folder = last_checkpoint(run)
    load_weights(folder, network)
    tensors = load_tensors(folder, FILES[1])
    states: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        entry, _, name = key.partition(".")
        states.setdefault(name, {})[entry] = value
    names = {parameter: name for name, parameter in network.named_parameters()}
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            optimiser.state[parameter] = {
                # Adam counts its steps on the CPU, except fused.
                entry: value if entry == "step" and not group.get("fused") else value.to(parameter.device)
                for entry, value in states.get(names[parameter], {}).items()
            }
    try:
        torch.set_rng_state(tensors["rng.cpu"])
        if torch.cuda.is_available() and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"])
    except (KeyError, RuntimeError, TypeError) as error:
        raise UserError(f"{folder / FILES[1]} is not of a training ({reason(error)}); {FALL_BACK}") from error
    return read_progress(folder).step


def load_weights(folder: Path, network: nn.Module) -> None:
    """Load a checkpoint's weights into `network`; raises UserError where they do not fit."""
    try:
        network.load_state_dict(load_tensors(folder, FILES[0]))
    except RuntimeError as error:
        raise misfit(folder, error) from error


def misfit(folder: Path, error: Exception) -> UserError:
    """Return the error of weights that do not fit the network of their run's settings."""
    return UserError(
        f"{folder / FILES[0]} does not fit its config.json ({reason(error, 200)}); restore that, or train into another --out"
    )


def load_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """Load a file of a checkpoint; raises UserError where it is damaged."""
    file = folder / name
    try:
        if sha256_of(file) != _read_state(folder)["sha256"].get(name):
            raise UserError(f"{file} differs from its checksum; {FALL_BACK}")
        return load_file(file)
    except (OSError, SafetensorError) as error:
        if outside := cause_outside(error):
            raise unreadable(file, outside) from error
        raise UserError(f"{file} cannot be read ({reason(error)}); {FALL_BACK}") from error


def _read_state(folder: Path) -> dict[str, Any]:
    file = folder / "state.json"
    return require_seal(read_json(file, FALL_BACK), file, FALL_BACK)


def read_progress(folder: Path) -> Progress:
    """Read how far a checkpoint is; raises UserError where it is damaged."""
    return parse(Progress, _read_state(folder), folder / "state.json", FALL_BACK, exact=False)


def last_checkpoint(run: Path) -> Path:
    """Return the folder of the newest checkpoint; raises UserError where there is none."""
    if not (found := checkpoints(run)):
        raise UserError(f"{run} has no checkpoint yet; run its wmtrain again")
    last = run / "checkpoints" / "last"
    target = last.parent / last.readlink() if last.is_symlink() else None
    return target if target in found else found[-1]


def checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))
