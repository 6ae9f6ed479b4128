"""Makes runs of DINO-WM's checkpoints (arXiv 2411.04983; train.py in its repository).

hydra.yaml                  the settings of its training
checkpoints/model_*.pth     a dict of whole pickled modules: predictor, action_encoder, proprio_encoder, decoder, and their optimisers
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from torch import Tensor

from wmcache.cache.store import TokenStore
from wmcache.common.errors import UserError, command, reason
from wmcache.common.files import cannot_write, sha256_of, temporary_for
from wmcache.common.paths import AnyPath, absolute
from wmcache.common.readme import write_readme
from wmcache.engine.checkpoint import Progress, checkpoints, save_checkpoint
from wmcache.trainer.dino_wm_modules import EMBEDDING, PREDICTOR, ModuleReader
from wmcache.trainer.models import Trainable, build
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.pickled_modules import load_modules, shown
from wmcache.trainer.presets import PRESETS
from wmcache.trainer.readme import run_readme
from wmcache.trainer.runs import is_run, lock_run, read_config, write_settings
from wmcache.trainer.train import data_shape, make_optimiser, statistics_of

KNOWN_PREFIXES = (
    *("torch.nn.modules.", "torch.optim.", "accelerate.", "dinov2."),
    *("models.vit.", "models.proprio.", "models.vqvae.", "models.decoder.", "models.dino."),
)
KNOWN_NAMES = {
    *("__builtin__.set", "__builtin__.dict", "builtins.set", "builtins.dict"),
    *("torch.device", "torch.Size", "torch.float32", "torch.float16", "torch.bfloat16"),
    "functools.partial",
}
"""Classes of the modules and optimisers in a checkpoint. None of them is imported: see `pickled_modules`."""

MAX_YAML_BYTES = 1_000_000
REQUIRED: dict[str, Any] = {
    "env.name": "point_maze",
    "num_pred": 1,
    "has_predictor": True,
    "num_action_repeat": 1,
    "num_proprio_repeat": 1,
    "model.train_encoder": False,
    "encoder._target_": "models.dino.DinoV2Encoder",
    "encoder.name": "dinov2_vits14",
    "encoder.feature_key": "x_norm_patchtokens",
    "predictor._target_": PREDICTOR,
    "action_encoder._target_": EMBEDDING,
    "proprio_encoder._target_": EMBEDDING,
}
"""Settings that `DinoWm`, the encoder `dinov2` and the statistics of a store implement."""

TRAINED_WITH = ("warmup", "decay", "beta2", "decay-all", "clip", "dtype")


class Imported(NamedTuple):
    """What was imported, and whether it was trained on standardised actions and proprio."""

    epoch: int
    parameters: int
    standardised: bool


class _Settings(NamedTuple):
    history: int
    frameskip: int
    concat_dim: int
    image_size: int
    standardised: bool
    rollouts: int | None


def import_dino_wm(
    folder: Path, cache: AnyPath, out: Path, *, checkpoint: str = "latest", overwrite: bool = False
) -> Imported:
    """Make a run of a DINO-WM checkpoint as wmtrain would write it; wmplan and wmtrain --resume continue from it.

    Args:
        cache: a store of the frames that the model was trained on, encoded by DINOv2 as the reference does.
        out: the run's folder, written as a whole or not at all; `overwrite` replaces another run.
        checkpoint: `latest`, or the number of an epoch.
    """
    settings = _read_settings(folder / "hydra.yaml")
    store = TokenStore.open(cache)
    _check_store(store, cache, settings, folder / "hydra.yaml")
    file = folder / "checkpoints" / f"model_{checkpoint}.pth"
    root = load_modules(file, lambda name: name in KNOWN_NAMES or name.startswith(KNOWN_PREFIXES))
    reader = ModuleReader(file, settings.image_size // 16, settings.history, settings.concat_dim)
    weights, options, epoch = reader.read(root)
    reference = {name.replace("-", "_"): PRESETS["dino-wm"][name] for name in TRAINED_WITH}
    sizes: dict[str, Any] = {"history": settings.history, "frameskip": settings.frameskip, "steps": 0, "batch": 32}
    training = TrainOptions(model_options=asdict(options), **sizes, **reference)
    shape = data_shape(store, training)
    statistics = statistics_of(store, settings.frameskip)
    if not settings.standardised:
        for name, value in statistics.items():
            if not name.startswith("tokens"):
                value.fill_(float(name.endswith("std")))
    model = build("dino-wm", shape, asdict(options), statistics).eval()
    load_imported(model, weights, file, cache)
    source = {"format": "dino-wm", "file": str(file.absolute()), "sha256": sha256_of(file), "epoch": epoch}
    config = {**asdict(training), "cache": absolute(cache), "shape": asdict(shape), "imported": source}
    write_run(out, config, store, model, training, overwrite=overwrite)
    return Imported(epoch, sum(value.numel() for value in model.parameters()), settings.standardised)


def read_yaml(file: Path, hint: str) -> Any:
    """Read a file of settings, without making objects of it; raise UserError, which ends with `hint`, where that is not possible."""
    try:
        if file.stat().st_size > MAX_YAML_BYTES:
            raise UserError(f"{file} is too large for settings; {hint}")
        return yaml.safe_load(file.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{file} does not exist; {hint}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({reason(error)}); {hint}") from error


def entry(config: Any, name: str) -> Any:
    """Return an entry of nested dicts, by its path with dots; None where there is none."""
    for part in name.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


def whole_number(config: Any, name: str, least: int, most: int, file: Path, hint: str) -> int:
    """Return an entry that is a whole number; raise UserError for any other one."""
    value = entry(config, name)
    if type(value) is not int or not least <= value <= most:
        raise UserError(f"{file}: {name} is {shown(value)}, not a whole number from {least} to {most}; {hint}")
    return value


def require_settings(config: Any, required: Mapping[str, Any], file: Path) -> None:
    """Raise UserError for the first entry that is not as required."""
    for name, needed in required.items():
        if (value := entry(config, name)) != needed or type(value) is not type(needed):
            raise UserError(f"{file}: {name} is {shown(value)}; only checkpoints with {needed!r} can be imported")


def _read_settings(file: Path) -> _Settings:
    hint = "it is what train.py of DINO-WM writes beside checkpoints/"
    config = read_yaml(file, hint)
    get, number = partial(entry, config), partial(whole_number, config, file=file, hint=hint)
    require_settings(config, REQUIRED, file)
    standardised = get("env.dataset.normalize_action")
    standardised = get("normalize_action") if standardised is None else standardised
    if type(standardised) is not bool:
        raise UserError(f"{file}: normalize_action is {shown(standardised)}, not true or false; {hint}")
    rollouts = "env.dataset.n_rollout"
    episodes = None if get(rollouts) is None else number(rollouts, 1, 2**31)
    sizes = number("num_hist", 1, 1024), number("frameskip", 1, 1024), number("concat_dim", 0, 1)
    return _Settings(*sizes, number("img_size", 16, 8192), standardised, episodes)


def _check_store(store: TokenStore, cache: AnyPath, settings: _Settings, file: Path) -> None:
    """Raise UserError where the tokens are not from the reference's encoder (models/visual_world_model.py)."""
    side = settings.image_size // 16
    wanted = {
        **{"encoder": "dinov2", "layer": "norm", "token_selection": "patch", "image_size": 14 * side},
        "resize": f"bilinear antialias {settings.image_size}>{14 * side}",
        "normalisation": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        "token_grid": (side, side),
    }
    found = {**vars(store.identity), "token_grid": store.card.token_grid}
    different = [f"{name} {found[name]}, not {value}" for name, value in wanted.items() if found[name] != value]
    if different:
        hint = f"for a checkpoint with img_size 224, make a store with: {command('wmcache', 'extract', '--encoder', 'dinov2')}"
        raise UserError(f"{cache} has {'; '.join(different)}; {hint}")
    episodes = int(store.episode.max()) + 1
    if settings.standardised and settings.rollouts not in (None, episodes):
        why = f"{file}: env.dataset.n_rollout is {settings.rollouts}, but {cache} has {episodes} episodes, so another mean"
        raise UserError(f"{why}; extract a dataset of just those episodes")


def load_imported(model: Trainable, weights: Mapping[str, Tensor], file: Path, cache: AnyPath) -> None:
    """Load the weights of a checkpoint; raise UserError where they do not fit the store or the settings."""
    sizes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if different := sorted(name for name in {*sizes, *found} if sizes.get(name) != found.get(name)):
        name = different[0]
        why = f"{name} is {found.get(name)}, where the store and the settings make it {sizes.get(name)}"
        raise UserError(f"{file} does not fit {cache}: {why}; use a store of the frames that the model was trained on")
    model.load_state_dict(weights, strict=False)  # the statistics are there already


def write_run(
    out: Path, config: dict[str, Any], store: TokenStore, model: Trainable, training: TrainOptions, *, overwrite: bool
) -> None:
    """Write the run beside its path, then move it there."""
    with lock_run(out, "program"):
        if is_run(out) and not overwrite:
            if checkpoints(out) and read_config(out) == json.loads(json.dumps(config)):
                return
            raise UserError(f"{out} is another run; choose another --out")
        temporary = temporary_for(out)
        try:
            with cannot_write(out):
                save_checkpoint(temporary, Progress(), model, make_optimiser(model, training))
                write_settings(temporary, config, store)
                (temporary / "metrics.jsonl").touch()
                write_readme(temporary, run_readme(config, temporary))
                if out.exists():
                    shutil.rmtree(out)
                temporary.rename(out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
