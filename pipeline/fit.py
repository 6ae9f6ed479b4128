"""Fits an encoder to a dataset's frames, or an adapter to a store's features, and measures the landscape of its latent distance."""

from __future__ import annotations

import glob
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from wmcache.cache.joined import SEPARATOR
from wmcache.cache.store import TokenStore
from wmcache.cache.windows import split_frames
from wmcache.cluster.tasks import run_alone
from wmcache.common.cpus import available_cpus
from wmcache.common.device import choose_device, choose_dtype
from wmcache.common.errors import UserError
from wmcache.common.files import write_whole
from wmcache.common.folders import home
from wmcache.common.jsonfiles import dump_json, json_digest
from wmcache.common.options import check_options
from wmcache.common.paths import AnyPath, absolute, as_path
from wmcache.common.reading import reading
from wmcache.engine.checkpoint import Progress, checkpoints, last_checkpoint, read_progress
from wmcache.engine.loop import LoopOptions, Task, require_finite, run
from wmcache.engine.optimisers import warmup_cosine
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import Encoder, FitOptions
from wmcache.pipeline.encoders.base import Features, Preprocess, Select
from wmcache.pipeline.encoders.fitting import FitData, Fitting
from wmcache.pipeline.encoders.weights import read_metadata
from wmcache.pipeline.extract import extract_together
from wmcache.pipeline.frames import FrameDataset
from wmcache.pipeline.probe import Landscape, open_known_geometry, probe_landscape
from wmcache.pipeline.stores import create_encoders, default_store, default_weights, frames_of, require_frames

SECONDS_BETWEEN_CHECKPOINTS = 30.0


@dataclass(frozen=True)
class Fitted:
    """Where the weights of a fit are, its training frames, and the landscape of held-out ones, None where no geometry is known."""

    weights: Path
    frames: int
    landscape: Landscape | None


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
    more: Sequence[FrameDataset] = (),
) -> Fitted:
    """Fit an encoder to frames and save its weights; where they exist already, only measure them.

    Args:
        options: of the encoder's own kind (`encoders.fit_options`).
        max_frames: held in memory; the first episodes where there are more, and of each dataset an equal share.
        overwrite: replace the weights of another fit.
        more: datasets whose frames are fitted on too; held-out frames of the first one are measured.

    Raises:
        UserError: the encoder cannot be fitted, other weights are at `out`, the dataset is too small, or the loss is not finite.
    """
    _, make = encoders.get_fit(name)  # refuses before anything is read
    preprocess, where = encoders.get_spec(name).preprocess, choose_device(device)
    datasets, share = (dataset, *more), max_frames // (1 + len(more))
    chosen = [_training_frames(part.steps.episode, options, share, part.path) for part in datasets]

    def start() -> Fitting:
        images = [load_images(part, rows, preprocess) for part, rows in zip(datasets, chosen, strict=True)]
        before = np.cumsum([0, *(part.card.episodes for part in datasets)])
        episode = [
            part.steps.episode[rows] + first for part, rows, first in zip(datasets, chosen, before, strict=False)
        ]
        pixels = torch.cat(images) if more else images[0]
        return make(FitData(np.concatenate(episode), preprocess, where, pixels), options)

    frames, fingerprints = sum(map(len, chosen)), [part.card.fingerprint for part in datasets]
    header = _header(name, SEPARATOR.join(fingerprints), frames, options)
    _train(start, options, header, out, where, overwrite=overwrite)
    return Fitted(out, frames, _measure_landscape(dataset, name, out, device) if measure else None)


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
    """Fit an adapter to the cached features of a frozen backbone; arguments not listed are those of `fit`.

    Args:
        store: of the base's layers, or of its patch tokens where the adapter needs no more; it is read as it is needed.
        dataset: the store's frames, for decoders of pixels and to measure the landscape; None trains purely from the store.
        base_weights: where the base's weights are now, if they have moved.
    """
    _, make = encoders.get_fit(name)
    if encoders.get_entry(name).adapt is None:
        raise UserError(f"encoder {name} is fitted on frames, not on a store; leave out --cache")
    if options.needs_images and dataset is None:
        raise UserError(f"this fit of {name} needs the frames; pass --dataset, or a --decoder that needs none")
    if dataset is not None:
        require_frames(store, dataset)
    base = encoders.create_again(store.card.encoder, weights=base_weights, device=device)
    identity = base.identity(store.identity.dataset_fingerprint, store.identity.store_dtype)
    if different := "; ".join(store.identity.differences(identity)):
        raise UserError(f"{base.weights or base.source} are not the weights of {store.path} ({different})")
    if not isinstance(head := base.head, Select):
        raise UserError(f"{store.path} contains tokens of an adapter; fit {name} on a store of its base")
    where, chosen = base.device, _training_frames(store.episode, options, max_frames, store.path)

    def gather(rows: NDArray[np.integer]) -> Features:
        return head.restore(torch.from_numpy(store.gather(chosen[rows])).to(where).float())

    def start() -> Fitting:
        images = load_images(dataset, chosen, base.preprocess) if options.needs_images and dataset else None
        return make(FitData(store.episode[chosen], base.preprocess, where, images, base, gather), options)

    header = {
        **_header(name, store.identity.dataset_fingerprint, len(chosen), options),
        "base": json.dumps(base.recipe(), sort_keys=True),
        "base_sha256": base.weights_sha256,
        "store_dtype": store.identity.store_dtype,
    }
    _train(start, options, header, out, where, overwrite=overwrite)
    return Fitted(out, len(chosen), _measure_landscape(dataset, name, out, device) if measure and dataset else None)


def _training_frames(
    episode: NDArray[np.integer], options: FitOptions, max_frames: int, where: AnyPath
) -> NDArray[np.int64]:
    check_options(options)
    chosen = split_frames(episode, "train")[:max_frames]
    if len(chosen) < 2 * options.batch:
        hint = f"a batch of {options.batch} needs twice as many; collect more, or lower --batch-size"
        raise UserError(f"{where} has {len(chosen)} train frames, {hint}")
    return chosen


def _header(name: str, fingerprint: str, frames: int, options: FitOptions) -> dict[str, str]:
    # Everything that the content of a weights file depends on.
    return {
        "encoder": name,
        "dataset": fingerprint,
        "frames": str(frames),
        "options": dump_json(asdict(options), sort_keys=True),
    }


def _measure_landscape(dataset: FrameDataset, name: str, weights: Path, device: str) -> Landscape | None:
    state, card = dataset.steps.state, dataset.card
    if state is None or state.shape[1] < 2:
        return None
    if (geometry := open_known_geometry(card.env, card.layout, dataset.path)) is None:
        return None
    return probe_landscape(dataset, encoders.create(name, weights=weights, device=device), geometry)


def read_fit(weights: Path) -> dict[str, str]:
    """Read the metadata of a fit's file."""
    with reading(weights, f"{weights} cannot be read", "choose another --out"):
        return read_metadata(weights)


def _without_paths(header: dict[str, str]) -> dict[str, str]:
    # The base's weights may move; their hash stays.
    base = {name: value for name, value in json.loads(header.get("base", "{}")).items() if not name.endswith("weights")}
    return {**header, "base": json.dumps(base, sort_keys=True)}


def _train(
    start: Callable[[], Fitting],
    options: FitOptions,
    header: dict[str, str],
    out: Path,
    device: torch.device,
    *,
    overwrite: bool,
) -> None:
    """Train a fitting and write its weights; after a kill, the same call continues from the last checkpoint.

    Checkpoints are in a hidden folder beside the weights, named by the digest of the header, and deleted in the end.
    """
    if out.exists() and not overwrite:
        if _without_paths(read_fit(out)) != _without_paths(header):
            raise UserError(f"{out} is of another fit; choose another --out")
        return
    torch.manual_seed(options.seed)
    task = FitTask(start().to(device), options, f"fit {header['encoder']}", out)
    if options.steps:
        folder = out.with_name(f".{out.name}.{json_digest(_without_paths(header))[:16]}.fit")
        done = read_progress(last_checkpoint(folder)) if checkpoints(folder) else Progress()
        how = LoopOptions(
            options.steps,
            options.batch,
            device,
            choose_dtype("auto", device),
            log=False,
            checkpoint_every=options.steps,
            checkpoint_seconds=SECONDS_BETWEEN_CHECKPOINTS,
        )
        run(task, how, folder, Progress(done.step))
    weights = {name: value.detach().cpu().contiguous() for name, value in task.network.weights().items()}
    require_finite(task, options.steps, weights.values())
    write_whole(out, save(weights, metadata=header))
    for unfinished in out.parent.glob(f".{glob.escape(out.name)}.*.fit"):
        shutil.rmtree(unfinished)
    out.with_name(f".{out.name}.partial").unlink(missing_ok=True)  # of an older version


@dataclass
class FitTask(Task[NDArray[np.integer]]):
    """A fitting for the training loop. What a step draws depends on the seed and the step alone."""

    network: Fitting
    options: FitOptions
    title: str
    out: Path
    unit: str = "frames"
    hint: str = "lower --lr, or choose another --dataset if its frames are all equal"

    def optimiser(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(parameters, lr=self.options.learning_rate, weight_decay=1e-4)

    def learning_rate(self, step: int) -> float:
        """Return the rate of a cosine after warmup."""
        return warmup_cosine(step, self.options.steps, self.options.learning_rate)

    def batches(self, first: int) -> AbstractContextManager[Iterator[NDArray[np.integer]]]:
        """Draw rows of the training frames."""
        draw = (np.random.default_rng((self.options.seed, step)) for step in itertools.count(first))
        return nullcontext(map(self.network.rows, draw))

    def before_step(self, step: int) -> None:
        """Seed what the loss draws."""
        torch.manual_seed(1_000_003 * self.options.seed + step)

    def loss(self, batch: NDArray[np.integer], step: int) -> dict[str, Tensor]:  # noqa: ARG002
        """Return the fitting's own loss."""
        return self.network.loss(batch)


def load_images(dataset: FrameDataset, frames: NDArray[np.int64], preprocess: Preprocess) -> Tensor:
    """Read frames [n], ascending, as uint8 [n, 3, S, S], resized as the encoder does; each shard once."""
    images = torch.empty(len(frames), 3, preprocess.image_size, preprocess.image_size, dtype=torch.uint8)
    shard_of = frames // dataset.card.frames_per_shard

    def load(shard: int) -> int:
        rows = np.flatnonzero(shard_of == shard)
        raw = dataset.read_shard(shard)[frames[rows] - dataset.card.shard_frames(shard).start]
        pixels = preprocess.resize(torch.from_numpy(raw)).clamp_(0, 1) * 255
        images[torch.from_numpy(rows)] = pixels.round_().byte()
        return len(rows)

    with (
        tqdm(total=len(frames), desc="read frames", unit=" frames") as bar,
        ThreadPoolExecutor(available_cpus()) as pool,
    ):
        for count in pool.map(load, np.unique(shard_of).tolist()):
            bar.update(count)
    return images


@dataclass(frozen=True)
class FitJob:
    """What a fit reads and writes.

    Attributes:
        frames: path of those to fit on, or to measure on; None where a store's frames are not available.
        store: path of the store of an adapter's base; None for other encoders.
        more: paths of other frames to fit on.
    """

    name: str
    options: FitOptions
    frames: str | None
    store: str | None
    out: Path
    more: tuple[str, ...] = ()

    @property
    def unmeasured(self) -> str:
        """Explain why the landscape of such a fit is not known."""
        if self.frames is not None:
            return f"shortest paths are not known in the environment of {self.frames}"
        where = TokenStore.open(as_path(str(self.store))).card.dataset.get("path")
        return f"the frames of {self.store} are not at {where}; pass their location with --dataset"

    def run(self, cluster: str, **settings: Any) -> Fitted:
        """Fit in a process of the cluster; `settings` are those of `fit_adapter`, whose `base_weights` are for an adapter only."""
        return run_alone(partial(self._fit, self.out.absolute(), **settings), cluster=cluster, label=f"fit {self.name}")

    def _fit(self, out: Path, *, base_weights: Path | None = None, **settings: Any) -> Fitted:
        frames = None if self.frames is None else FrameDataset.open(as_path(self.frames))
        if self.store is None:
            assert frames is not None
            more = [FrameDataset.open(as_path(path)) for path in self.more]
            return fit(frames, self.name, out, self.options, more=more, **settings)
        store = TokenStore.open(as_path(self.store))
        where = base_weights and base_weights.absolute()
        return fit_adapter(store, self.name, out, self.options, dataset=frames, base_weights=where, **settings)


def prepare_fit(
    name: str,
    options: Mapping[str, Any],
    *,
    dataset: AnyPath | None,
    cache: AnyPath | None,
    base: str | None,
    base_weights: Path | None,
    out: Path | None,
    device: str,
    cluster: str,
    more: Sequence[AnyPath] = (),
) -> FitJob:
    """Find what a fit needs, and extract the store of an adapter's base if it is missing.

    Args:
        dataset: the frames; None takes the default dataset, or with `cache` the store's.
        cache: for an adapter, the store of its base; None takes the default one.
        base, base_weights: for an adapter, the encoder of that store, and its weights.
        device, cluster: for the extraction.
        more: other frames to fit on.

    Raises:
        UserError: unknown encoder or option, settings that do not go together, or no dataset or store.
    """
    chosen, entry = encoders.fit_options(name, options), encoders.get_entry(name)
    if entry.load is not None:
        if cache or base or base_weights:
            raise UserError(f"encoder {name} is fitted on frames, not on a store; leave out --cache and --base")
        frames = open_dataset(dataset)
        seen = {frames.card.fingerprint}
        for path in more:
            if (fingerprint := FrameDataset.open(path).card.fingerprint) in seen:
                raise UserError(f"--dataset {path} is given twice; name each dataset once")
            seen.add(fingerprint)
        out = out or default_weights(frames.card.name, name)
        return FitJob(name, chosen, absolute(frames.path), None, out, tuple(map(absolute, more)))
    if more:
        raise UserError(f"encoder {name} is fitted on one dataset; leave out --dataset {more[0]}")
    if cache and base:
        raise UserError("--cache has the store that the adapter is fitted on; leave out --base")
    known = None if cache and dataset is None and not chosen.needs_images else open_dataset(dataset)
    if cache is None:
        assert known is not None
        weights = [str(base_weights)] if base_weights else []
        (encoder,) = create_encoders(known.card, encoder=base or entry.base, weights=weights, device=device)
        cache = default_store(known.card.name, encoder)
        extract_together(known, [(encoder, cache)], cluster=cluster, device=device)
    store = TokenStore.open(cache)
    with suppress(UserError):  # without frames, the fit is not measured
        known = known or frames_of(store)
    out = out or default_weights(str(store.card.dataset["name"]), name)
    return FitJob(name, chosen, absolute(known.path) if known else None, absolute(store.path), out)


def open_dataset(path: AnyPath | None) -> FrameDataset:
    """Open a dataset, or the default one."""
    return FrameDataset.open(path or home() / "pointmaze-umaze")


def open_inputs(dataset: AnyPath | None, encoder: dict[str, Any]) -> tuple[FrameDataset, list[Encoder]]:
    """Open a dataset, and create encoders with its fitted weights; `encoder` has arguments of `create_encoders`."""
    frames = open_dataset(dataset)
    return frames, create_encoders(frames.card, **encoder)
