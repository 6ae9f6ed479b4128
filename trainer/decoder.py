"""Trains a decoder from cached tokens to images; no world model is involved.

config.json, identity.json, metrics.jsonl, checkpoints/    as of a run, see `runs.py`
validation.json                                            errors of images decoded from held-out frames' tokens
"""

from __future__ import annotations

import itertools
import math
import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from wmcache.cache.store import TokenStore
from wmcache.cache.windows import batch_windows
from wmcache.common.device import choose_device, choose_dtype
from wmcache.common.errors import UserError
from wmcache.common.files import not_written
from wmcache.common.frames import Frames, load_frames
from wmcache.common.jsonfiles import read_json, write_json
from wmcache.common.options import check_options
from wmcache.common.paths import AnyPath, absolute
from wmcache.common.schema import parse
from wmcache.engine import loop
from wmcache.engine.checkpoint import Progress, checkpoints, last_checkpoint, read_progress
from wmcache.trainer.decoders import Decoder, DecoderShape, build_decoder
from wmcache.trainer.metrics import ImageMetrics, Images, summarise, to_unit
from wmcache.trainer.options import DecoderOptions
from wmcache.trainer.runs import differences, foreign_identity, is_run, load_network, lock_run, write_settings

VALIDATION_FRAMES = 512
HINT = "train a decoder with: wmtrain decoder --cache STORE"
MAY_CHANGE = {"cache", "device", "steps", "log_every", "checkpoint_every", "lpips"}

Batch = tuple[Tensor, Tensor]
"""Tokens [B, N, D] and images [B, 3, S, S] in [-1, 1]."""


@dataclass(frozen=True)
class _Config:  # validated before a decoder is built of it
    decoder: str
    decoder_options: dict[str, Any]
    shape: DecoderShape
    cache: str
    split_seed: int


def train_decoder(
    cache: AnyPath, source: Frames, out: Path, options: DecoderOptions, *, overwrite: bool = False
) -> dict[str, Any]:
    """Train a decoder on a store's tokens and their frames; the same call again continues where it was stopped.

    Memory contains `max_frames` images, the tokens of a batch, and a shard of frames while they are read. `overwrite` starts from scratch
    where a decoder exists. Returns the content of `validation.json`: what `validate_decoder` measures on held-out frames.
    """
    check_options(options)
    store = TokenStore.open(cache, mirrored=True)
    with lock_run(out, "wmtrain decoder"):
        try:
            return _train(store, cache, source, out, options, overwrite=overwrite)
        except OSError as error:
            raise not_written(out, error) from error


def _train(
    store: TokenStore, cache: AnyPath, source: Frames, out: Path, options: DecoderOptions, *, overwrite: bool
) -> dict[str, Any]:
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    frames, held_out = choose_frames(store, options)
    image_size = source.read_frames(frames[:1]).shape[1]
    shape = DecoderShape(*store.card.token_grid, store.card.token_dim, image_size)
    name = options.decoder
    if name == "auto":
        name = "transposed-conv" if store.card.tokens_per_frame == 1 else "vqvae"
    config = {**asdict(options), "decoder": name, "cache": absolute(cache), "shape": asdict(shape)}
    exists = is_run(out)
    different = differences(read_decoder_config(out), config, config.keys() - MAY_CHANGE) if exists else []
    if exists and not overwrite:
        if different := different + foreign_identity(out, store.identity):
            raise UserError(f"{out} is a decoder with other settings ({'; '.join(different)}); choose another --out")
        if checkpoints(out) and (out / "validation.json").exists():
            done = read_json(out / "validation.json", "move it away, then run the same command again")
            step, measured = read_progress(last_checkpoint(out)).step, "lpips" in done or not options.lpips
            if done.get("step") == step >= options.steps and measured:
                return done
    metrics = ImageMetrics(image_size, device, lpips=False)
    images = load_frames(source, frames, store.card.frames_per_shard, image_size, "lower --max-frames")
    torch.manual_seed(options.seed)
    decoder = build_decoder(name, shape, options.decoder_options, statistics_of(store, images)).to(device)
    # Deleted only now: an option that is refused must not cost a decoder.
    if exists and overwrite:
        shutil.rmtree(out)
    write_settings(out, config, store)
    first = read_progress(last_checkpoint(out)).step if checkpoints(out) else 0
    last = max(first, options.steps)
    count = sum(parameter.numel() for parameter in decoder.parameters())
    shown = f"{device.type} {str(dtype).removeprefix('torch.')}, steps {first} to {last}"
    size = f"{count / 1e6:.2f} M parameters, {len(frames)} train frames of {image_size} px"
    tqdm.write(f"{name}: {size}, {shown}", file=sys.stderr)
    task = _DecoderTask(decoder, store, frames, images, out, options)
    how = loop.LoopOptions(
        last, options.batch, device, dtype, log_every=options.log_every, checkpoint_every=options.checkpoint_every
    )
    loop.run(task, how, out, Progress(first))
    del images, task
    if options.lpips:
        metrics = ImageMetrics(image_size, device)
    real = load_frames(source, held_out, store.card.frames_per_shard, image_size, "lower --max-frames")
    figures = validate_decoder(decoder, store, held_out, real, metrics)
    result = {"step": last, "frames": len(held_out), **figures}
    write_json(out / "validation.json", result)
    return result


@dataclass
class _DecoderTask(loop.Task[Batch]):
    """A decoder for the training loop, on a store's frames [B] and their images, uint8 [B, S, S, 3]."""

    network: Decoder
    store: TokenStore
    frames: NDArray[np.int64]
    images: Images
    out: Path
    options: DecoderOptions
    title: str = "wmtrain decoder"
    unit: str = "frames"
    hint: str = "the last checkpoint, if any, is good; train with a lower --lr into another --out"

    def optimiser(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.network.parameters(), lr=self.options.learning_rate)

    def learning_rate(self, step: int) -> float:  # noqa: ARG002
        return self.options.learning_rate

    def batches(self, first: int) -> AbstractContextManager[Iterator[Batch]]:
        return nullcontext(map(self._batch, itertools.count(first)))

    def _batch(self, step: int) -> Batch:
        device = self.network.tokens_mean.device
        chosen = batch_windows(len(self.frames), self.options.seed, step, self.options.batch)
        tokens = torch.from_numpy(self.store.gather(self.frames[chosen]))
        return tokens.to(device), to_unit(self.images[chosen]).to(device)

    def loss(self, batch: Batch, step: int) -> dict[str, Tensor]:  # noqa: ARG002
        return self.network.loss(*batch)

    def next_loss(self, batch: Batch) -> Tensor:
        return self.network.loss(*batch)["loss"]


def load_decoder(folder: Path, device: torch.device) -> Decoder:
    """Load the newest decoder of a folder, frozen."""
    config = read_decoder_config(folder)

    def make(statistics: dict[str, Tensor]) -> Decoder:
        return build_decoder(config["decoder"], DecoderShape(**config["shape"]), config["decoder_options"], statistics)

    return load_network(folder, make, device)


def read_decoder_config(folder: Path) -> dict[str, Any]:
    """Read the settings of a decoder; raises UserError where the folder is not a decoder's."""
    file = folder / "config.json"
    config = read_json(file, HINT)
    parse(_Config, config, file, HINT, exact=False, fault="is not a decoder's")
    return config


def statistics_of(store: TokenStore, images: Images) -> dict[str, Tensor]:
    """Return mean and standard deviation of the tokens and the mean image, for a decoder's buffers."""
    mean = images.mean(0, dtype=np.float64, keepdims=True)
    return {
        "tokens_mean": torch.from_numpy(store.mean),
        "tokens_std": torch.from_numpy(store.std),
        "images_mean": torch.from_numpy(mean).permute(0, 3, 1, 2)[0].float() / 127.5 - 1,
    }


def choose_frames(store: TokenStore, options: DecoderOptions) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose frames to train on and held-out ones to validate on; ascending, and the same for the same options."""
    chosen = []
    for split, most in (("train", options.max_frames), ("val", VALIDATION_FRAMES)):
        frames = store.frames_of(split, options.split_seed)
        if len(frames) > most:
            frames = np.sort(np.random.default_rng(options.seed).choice(frames, most, replace=False))
        chosen.append(frames)
    return chosen[0], chosen[1]


@torch.inference_mode()
def validate_decoder(
    decoder: Decoder, store: TokenStore, frames: NDArray[np.int64], images: Images, metrics: ImageMetrics
) -> dict[str, Any]:
    """Compare images decoded from cached tokens with the frames themselves, and these with the mean train frame (`mean_frame`)."""
    decoder.eval()
    found: dict[str, list[dict[str, NDArray[np.float64]]]] = {"drawn": [], "mean_frame": []}
    for rows in np.array_split(np.arange(len(frames)), max(1, math.ceil(len(frames) / 32))):
        tokens = torch.from_numpy(store.gather(frames[rows])).to(decoder.tokens_mean.device)
        real = to_unit(images[rows])
        for kind, drawn in (("drawn", decoder(tokens)), ("mean_frame", decoder.images_mean.expand(*real.shape))):
            found[kind].append(metrics(drawn, real, decoder.images_mean))
    means = [summarise({n: np.concatenate([p[n] for p in parts]) for n in parts[0]}) for parts in found.values()]
    absent = {} if metrics.lpips_absent is None else {"lpips_absent": metrics.lpips_absent}
    return {**means[0], "mean_frame": means[1], **absent}
