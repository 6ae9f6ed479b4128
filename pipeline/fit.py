"""Train an encoder on the dataset's own frames, and measure whether its latent distance is one that a planner can descend."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from wmcache.cache.store import TokenStore
from wmcache.common.cpus import available_cpus
from wmcache.common.device import autocast, choose_device, choose_dtype
from wmcache.common.errors import UserError
from wmcache.common.files import atomic_write
from wmcache.common.folders import home
from wmcache.common.jsonfiles import dump_json
from wmcache.common.options import check_options as validate_options
from wmcache.common.paths import cause_outside, unreadable
from wmcache.common.progress import seconds_between_updates
from wmcache.common.tensors import open_tensors
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import FitOptions
from wmcache.pipeline.encoders.base import Features, Preprocess, Select
from wmcache.pipeline.encoders.fitting import FitData, Fitting
from wmcache.pipeline.encoders.weights import read_metadata
from wmcache.pipeline.frames import FrameDataset
from wmcache.pipeline.probe import Landscape, probe_landscape, split_frames

SECONDS_BETWEEN_CHECKPOINTS = 30.0


@dataclass(frozen=True)
class Fitted:
    """What a fit gave.

    Attributes:
        weights: the file.
        frames: trained on.
        landscape: of held-out frames; None where the dataset shows no maze, so that no true distance is known.
    """

    weights: Path
    frames: int
    landscape: Landscape | None


def default_weights(dataset: str, encoder: str) -> Path:
    """`$WMCACHE_HOME/encoders/<dataset>-<encoder>.safetensors`."""
    return home() / "encoders" / f"{dataset}-{encoder}.safetensors"


def fit(
    dataset: FrameDataset,
    name: str,
    out: Path,
    options: FitOptions,
    *,
    max_frames: int,
    device: str = "auto",
    overwrite: bool = False,
    measure: bool = True,
) -> Fitted:
    """Fit an encoder on frames and save its weights; where the same fit has been done before, only measure it again.

    Args:
        dataset: frames to train on; a tenth of the episodes is held out.
        name: of an encoder that can be fitted.
        out: safetensors file to write.
        options: how to train, of the encoder's own kind (`encoders.fit_options`).
        max_frames: held in memory; the first episodes are taken where there are more.
        device: where to train.
        overwrite: replace the weights of another fit.
        measure: the landscape, in the end.

    Raises:
        UserError: the encoder cannot be fitted, other weights are at `out`, the dataset is too small, or the loss is not finite.
    """
    _, make = encoders.get_fit(name)  # refuses before anything is read
    spec = encoders.get_spec(name)
    where = choose_device(device)
    episode = dataset.steps.episode
    chosen = split_frames(episode, "train")[:max_frames]
    check_options(options, len(chosen), str(dataset.path))
    see = Preprocess(spec.image_size, spec.via, spec.normalisation, spec.filter, spec.lag)

    def start() -> Fitting:
        return make(FitData(episode[chosen], see, where, load_images(dataset, chosen, see)), options)

    header = describe_fit(name, dataset.card.fingerprint, len(chosen), options)
    train(start, options, header, out, where, overwrite=overwrite)
    return Fitted(out, len(chosen), measure_landscape(dataset, name, out, device) if measure else None)


def fit_adapter(
    store: TokenStore,
    name: str,
    out: Path,
    options: FitOptions,
    *,
    dataset: FrameDataset | None = None,
    base_weights: Path | None = None,
    max_frames: int,
    device: str = "auto",
    overwrite: bool = False,
    measure: bool = True,
) -> Fitted:
    """Fit an adapter on the cached features of a frozen backbone; as `fit` otherwise.

    Args:
        store: of the base's layers, or of its patch tokens where the adapter needs no more.
        name, out, options, device, overwrite, measure: see `fit`.
        dataset: the store's frames, for decoders of pixels and to measure the landscape; None trains purely from the store.
        base_weights: where the base's are, if not where they were.
        max_frames: as for `fit`; the store is read as it is needed, images are held in memory.

    Raises:
        UserError: as `fit`; or the store lacks features that the adapter needs.
    """
    _, make = encoders.get_fit(name)
    if encoders.get_entry(name).adapt is None:
        raise UserError(f"encoder {name} is fitted on frames, not on a store; leave out --cache")
    if options.needs_images and dataset is None:
        raise UserError(f"this fit of {name} needs the frames; pass --dataset, or a --decoder that needs none")
    if dataset is not None and dataset.card.fingerprint != store.identity.dataset_fingerprint:
        raise UserError(f"{dataset.path} does not hold the frames of {store.path}; pass the right --dataset")
    where = choose_device(device)
    base = encoders.create_again(store.card.encoder, weights=base_weights, device=device)
    if different := store.identity.differences(
        base.identity(store.identity.dataset_fingerprint, store.identity.store_dtype)
    ):
        raise UserError(
            f"{base.weights or base.source} are not the weights that {store.path} was extracted with ({'; '.join(different)})"
        )
    if not isinstance(base.head, Select):
        raise UserError(f"{store.path} holds tokens of an adapter; fit {name} on a store of its base")
    chosen = split_frames(store.episode, "train")[:max_frames]
    check_options(options, len(chosen), str(store.path))
    head = base.head

    def gather(rows: NDArray[np.integer]) -> Features:
        return head.restore(torch.from_numpy(store.gather(chosen[rows])).to(where).float())

    def start() -> Fitting:
        images = load_images(dataset, chosen, base.preprocess) if options.needs_images and dataset else None
        return make(FitData(store.episode[chosen], base.preprocess, where, images, base, gather), options)

    header = {
        **describe_fit(name, store.identity.dataset_fingerprint, len(chosen), options),
        "base": json.dumps(base.recipe(), sort_keys=True),
        "base_sha256": base.weights_sha256,
        "store_dtype": store.identity.store_dtype,
    }
    train(start, options, header, out, where, overwrite=overwrite)
    known = dataset if measure else None
    return Fitted(out, len(chosen), None if known is None else measure_landscape(known, name, out, device))


def describe_fit(name: str, fingerprint: str, frames: int, options: FitOptions) -> dict[str, str]:
    """The head of a weights file: all that its content depends on."""
    return {
        "encoder": name,
        "dataset": fingerprint,
        "frames": str(frames),
        "options": dump_json(asdict(options), sort_keys=True),
    }


def check_options(options: FitOptions, frames: int, where: str) -> None:
    """Refuse, as a UserError, what no fit can be made of."""
    validate_options(options)
    if frames < 2 * options.batch:
        raise UserError(
            f"{where} has {frames} training frames; a batch of {options.batch} needs twice as many: collect more, or lower --batch-size"
        )


def measure_landscape(dataset: FrameDataset, name: str, weights: Path, device: str) -> Landscape | None:
    """The landscape of a fitted encoder; None where the dataset shows no maze, so that no true distance is known."""
    if not dataset.card.maze or dataset.steps.state.shape[1] < 2:
        return None
    return probe_landscape(dataset, encoders.create(name, weights=weights, device=device))


def read_fit(weights: Path) -> dict[str, str]:
    """What a fit wrote into the head of its file; raises UserError where it cannot be read."""
    try:
        return read_metadata(weights)
    except (OSError, SafetensorError) as error:
        if outside := cause_outside(error):
            raise unreadable(weights, outside) from error
        raise UserError(f"{weights} cannot be read ({error}); make it readable, or choose another --out") from error


def without_paths(header: dict[str, str]) -> dict[str, str]:
    """A header without where the base's weights are, which may move; their hash stays."""
    base = {name: value for name, value in json.loads(header.get("base", "{}")).items() if not name.endswith("weights")}
    return {**header, "base": json.dumps(base, sort_keys=True)}


def train(
    start: Callable[[], Fitting],
    options: FitOptions,
    header: dict[str, str],
    out: Path,
    device: torch.device,
    *,
    overwrite: bool,
) -> None:
    """Descend a fitting's loss and save what it keeps; run again after it was killed, it goes on from at most half a minute before.

    Args:
        start: makes the fitting, from its options' seed alone.
        options: steps, learning rate and seed.
        header: all that the weights depend on.
        out: the file. overwrite: replace one of another header.

    Raises:
        UserError: another fit is at `out`, or the loss is not finite.
    """
    if out.exists() and not overwrite:
        if without_paths(read_fit(out)) != without_paths(header):
            raise UserError(f"{out} holds the weights of another fit; choose another --out")
        return
    torch.manual_seed(options.seed)
    fitting = start().to(device)
    parameters = [parameter for parameter in fitting.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=1e-4) if options.steps else None
    partial, saved = out.with_name(f".{out.name}.partial"), time.monotonic()
    first = _take_up(partial, fitting, optimiser, header) if optimiser else 0
    update = seconds_between_updates()
    with tqdm(
        total=options.steps, initial=first, desc=f"fit {header['encoder']}", unit=" steps", mininterval=update
    ) as bar:
        for step in range(first, options.steps):
            assert optimiser is not None
            # By the step alone, so that a fit that was killed goes on as if it had not been.
            torch.manual_seed(1_000_003 * options.seed + step)
            rows = fitting.rows(np.random.default_rng((options.seed, step)))
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(step, options)
            with autocast(device, choose_dtype("auto", device)):
                losses = fitting.loss(rows)
            if not torch.isfinite(losses["loss"]):
                hint = "try a lower --lr" if step else "all frames or tokens may be equal; choose another --dataset"
                raise UserError(f"the loss is not finite after {step} steps; {hint}")
            optimiser.zero_grad(set_to_none=True)
            losses["loss"].backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            bar.set_postfix_str(
                ", ".join(f"{name} {value.item():.3f}" for name, value in losses.items()), refresh=False
            )
            bar.update()
            if time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                _save_partial(partial, fitting, optimiser, {**header, "step": str(step + 1)})
                saved = time.monotonic()
    weights = {key: value.detach().cpu().contiguous() for key, value in fitting.kept.state_dict().items()}
    if not all(torch.isfinite(value).all() for value in weights.values()):
        raise UserError(f"the weights are not finite after {options.steps} steps; try a lower --lr")
    with atomic_write(out) as file:
        file.write(save(weights, metadata=header))
    partial.unlink(missing_ok=True)


def learning_rate(step: int, options: FitOptions) -> float:
    """Linear up over the first tenth of the steps, then down to 0 as a cosine."""
    warmup = max(1, options.steps // 10)
    if step < warmup:
        return options.learning_rate * (step + 1) / warmup
    return options.learning_rate * (1 + math.cos(math.pi * (step - warmup) / (options.steps - warmup))) / 2


def _save_partial(path: Path, fitting: Fitting, optimiser: torch.optim.Optimizer, header: dict[str, str]) -> None:
    tensors = {f"model.{name}": value for name, value in fitting.state_dict().items()}
    for number, values in optimiser.state_dict()["state"].items():
        tensors.update({f"optimiser.{number}.{name}": value for name, value in values.items()})
    with atomic_write(path) as file:
        file.write(save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, metadata=header))


def _take_up(path: Path, fitting: Fitting, optimiser: torch.optim.Optimizer, header: dict[str, str]) -> int:
    """Load what a killed fit of the same header left, if there is such; returns its number of steps."""
    try:
        with open_tensors(path) as file:
            found = dict(file.metadata() or {})
            if without_paths({**found, "step": ""}) != without_paths({**header, "step": ""}):
                return 0
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        if outside := cause_outside(error):
            raise unreadable(path, outside) from error
        return 0
    fitting.load_state_dict({name.removeprefix("model."): value for name, value in tensors.items() if name[0] == "m"})
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimiser."):
            _, number, field = name.split(".", 2)
            state.setdefault(int(number), {})[field] = value
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
    return int(found["step"])


def load_images(dataset: FrameDataset, frames: NDArray[np.int64], preprocess: Preprocess) -> Tensor:
    """Some frames, ascending, as uint8 [n, 3, S, S], resized as the encoder will; reads each shard once."""
    images = torch.empty(len(frames), 3, preprocess.image_size, preprocess.image_size, dtype=torch.uint8)
    shard_of = frames // dataset.card.frames_per_shard

    def load(shard: int) -> int:
        rows = np.flatnonzero(shard_of == shard)
        raw = dataset.read_shard(shard)[frames[rows] - dataset.shard_frames(shard).start]
        pixels = preprocess.resize(torch.from_numpy(raw)).clamp_(0, 1) * 255
        images[torch.from_numpy(rows)] = pixels.round_().byte()
        return len(rows)

    shards: Sequence[int] = np.unique(shard_of).tolist()
    with (
        ThreadPoolExecutor(available_cpus()) as pool,
        tqdm(total=len(frames), desc="read frames", unit=" frames") as bar,
    ):
        for count in pool.map(load, shards):
            bar.update(count)
    return images
