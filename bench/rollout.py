"""Error of world models' rollouts by model step on the same held-out windows, and whether a difference of two models is real."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from wmcache.bench.compare import names_of
from wmcache.cache.store import TokenStore
from wmcache.cache.windows import Windows
from wmcache.common.device import autocast, choose_device, choose_dtype
from wmcache.common.errors import UserError
from wmcache.common.paths import AnyPath
from wmcache.common.progress import seconds_between_updates
from wmcache.trainer.models import WorldModel, rollout
from wmcache.trainer.runs import data_split, load_model, open_store, read_config, read_identity

Float = NDArray[np.float64]
Part = Literal["latents", "proprio"]

BATCH = 64
COPYING = "copying"
RESAMPLES = 4000
LEVEL = 0.95


@torch.inference_mode()
def compare_rollouts(
    runs: Sequence[Path],
    *,
    steps: int = 20,
    observed: int = 1,
    windows: int = 512,
    part: Part = "latents",
    cache: AnyPath | Sequence[AnyPath] | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> list[dict[str, Any]]:
    """Measure rollouts without noise of runs that were trained on one store.

    Args:
        steps: model steps that are imagined. observed: frames before them.
        windows: held-out windows; fewer where there are not so many.
        part: `latents`, in the store's units, or standardised `proprio`.
        cache: the store, or the stores of the runs in order, if they have moved.

    Returns:
        A row for each `step`, and one for all: `copying`, the MSE of copying the last observed frame; `runs`, the MSE of each as a share
        of that; and `gains`, for each run but the first the share of its MSE that the first run saves, and the ends of its 95 % interval.
        The interval is that of a bootstrap over held-out episodes, paired by window; it holds for these runs, not for other seeds.

    Raises:
        UserError: runs of different data, or a run that does not predict the part.
    """
    names, where = names_of(runs, "--run"), choose_device(device)
    store, held_out = _open(runs, cache, observed, steps)
    models = {name: load_model(run, where) for name, run in zip(names, runs, strict=True)}
    for name, model in models.items():
        check_part(name, model, part)
    chosen = np.sort(np.random.default_rng(0).permutation(len(held_out))[:windows])
    errors: dict[str, list[Float]] = {name: [] for name in (COPYING, *models)}
    update = seconds_between_updates()
    with tqdm(total=len(chosen), desc="bench rollout", unit=" windows", mininterval=update) as bar:
        for numbers in np.array_split(chosen, math.ceil(len(chosen) / BATCH)):
            batch = {name: torch.from_numpy(value).to(where) for name, value in held_out.batch(numbers).items()}
            for name, model in models.items():
                with autocast(where, choose_dtype(dtype, where)):
                    own, copied = window_errors(model, batch, observed, part)
                errors[name].append(own)
            errors[COPYING].append(copied)
            bar.update(len(numbers))
    episodes = store.episode[held_out.starts[chosen]]
    return tabulate({name: np.concatenate(found) for name, found in errors.items()}, episodes)


def check_part(name: str, model: WorldModel, part: Part) -> None:
    """Raise UserError where a model does not predict a part of frames in units that all models share."""
    sizes = {"latents": int(model.has_latents), "proprio": model.shape.proprio_dim}
    if part == "proprio":
        zeros = torch.zeros(1, 1, model.shape.proprio_dim, device=model.action_mean.device)
        sizes[part] *= model.encode_proprio(zeros).shape[-1] == model.shape.proprio_dim
    if not sizes[part]:
        other = next(known for known in sizes if known != part)
        raise UserError(f"--part {part}: {name} does not predict it; choose --part {other}, or other runs")


def window_errors(model: WorldModel, batch: dict[str, Tensor], observed: int, part: Part) -> tuple[Float, Float]:
    """Compute the MSE of rollouts of windows, and of copying their last observed frame, [B, model steps] each."""
    tokens, actions = batch["tokens"].float(), batch["action"][:, :-1]
    imagined = rollout(model, tokens[:, :observed], batch["proprio"][:, :observed], actions)
    if part == "latents":
        real, found = tokens.flatten(2), imagined.latents[:, 0].flatten(2)
    else:
        real, found = model.encode_proprio(batch["proprio"]), imagined.proprio[:, 0]
    following, copied = real[:, observed:], real[:, observed - 1 : observed]
    own, copying = ((guess.float() - following).square().mean(2).double().cpu().numpy() for guess in (found, copied))
    return own, copying


def tabulate(errors: dict[str, Float], episodes: NDArray[np.integer]) -> list[dict[str, Any]]:
    """Compute the rows of `compare_rollouts` from errors [windows, model steps] of `copying` and of each run, and the windows' episodes."""
    found, rows = np.unique(episodes, return_inverse=True)
    draws = np.random.default_rng(0).multinomial(len(found), np.full(len(found), 1 / len(found)), RESAMPLES)
    drawn = draws[:, rows]  # how often each resample has each window
    first, *others = [name for name in errors if name != COPYING]
    steps = errors[COPYING].shape[1]
    table = []
    for label, columns in {**{str(k + 1): [k] for k in range(steps)}, "all": [*range(steps)]}.items():
        sums = {name: values[:, columns].sum(1) for name, values in errors.items()}
        totals = {name: float(values.sum()) for name, values in sums.items()}
        gains = {}
        for name in others:
            with np.errstate(invalid="ignore", divide="ignore"):
                resampled = 1 - (drawn @ sums[first]) / (drawn @ sums[name])
                ends = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
            gains[name] = [1 - share(totals[first], totals[name]), *ends]
        row = {"step": label, COPYING: float(errors[COPYING][:, columns].mean()), "gains": gains}
        row["runs"] = {name: share(totals[name], totals[COPYING]) for name in (first, *others)}
        table.append(row)
    return table


def share(part: float, whole: float) -> float:
    """Divide; nan where frames do not change, or nothing is wrong."""
    return part / whole if whole else math.nan


def _open(
    runs: Sequence[Path], cache: AnyPath | Sequence[AnyPath] | None, observed: int, steps: int
) -> tuple[TokenStore, Windows]:
    """Open the store of runs, and its held-out windows."""
    settings = []
    for run in runs:
        config, (_, identity) = read_config(run), read_identity(run)
        settings.append((int(config["frameskip"]), data_split(config)[0]))
        different = read_identity(runs[0])[1].differences(identity)
        different += [
            f"--{flag} {one} != {two}"
            for flag, one, two in zip(("frameskip", "split-seed"), settings[0], settings[-1], strict=True)
            if one != two
        ]
        if different:
            raise UserError(
                f"{runs[0]} and {run} were trained on different data: {'; '.join(different)}; choose runs of one store"
            )
    (frameskip, split), store = settings[0], open_store(runs[0], cache)
    longest = store.longest_episode("val", seed=split) // frameskip
    if observed + steps > longest:
        raise UserError(
            f"--observed {observed} and --steps {steps} are more than the {longest} frames, {frameskip} env steps apart, of the longest "
            "held-out episode; lower one of them"
        )
    return store, store.windows(observed, steps, frameskip, "val", seed=split)
