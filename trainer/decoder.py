"""Trains a decoder from cached tokens to images. No world model is involved, so nothing can flow back into one.

config.json, identity.json, metrics.jsonl, checkpoints/    as of a run (see `checkpoint.py`)
validation.json                                            how far held-out frames are from what is drawn of their tokens
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from wmcache.cache.identity import Identity
from wmcache.cache.store import TokenStore
from wmcache.cache.windows import batch_windows, split_episodes
from wmcache.common.device import autocast, choose_device, choose_dtype
from wmcache.common.errors import UserError
from wmcache.common.files import is_temporary, not_written
from wmcache.common.jsonfiles import read_json, write_json
from wmcache.common.locks import exclusive
from wmcache.common.memory import available_ram
from wmcache.common.paths import AnyPath, absolute
from wmcache.common.progress import seconds_between_updates
from wmcache.common.schema import parse
from wmcache.common.space import human_bytes
from wmcache.trainer.checkpoint import (
    checkpoints,
    last_checkpoint,
    load_network,
    load_training_state,
    read_identity,
    read_state,
    save_checkpoint,
    truncate_metrics,
)
from wmcache.trainer.loop import Log, signals_between_steps
from wmcache.trainer.metrics import ImageMetrics, Images, summarise, to_unit
from wmcache.trainer.models.decoders import DECODERS, Decoder, DecoderShape, build_decoder
from wmcache.trainer.options import DecoderOptions, check_options

VALIDATION_FRAMES = 512
HINT = "train a decoder with: wmtrain decoder --cache STORE"
MAY_CHANGE = {"cache", "device", "steps", "log_every", "checkpoint_every", "lpips"}

ReadFrames = Callable[[NDArray[np.int64]], Images]
"""Numbers of frames [B], ascending, to their images uint8 [B, S, S, 3]."""


@dataclass(frozen=True)
class _Config:
    """What must be true of a decoder's settings before it is built by them."""

    decoder: str
    decoder_options: dict[str, Any]
    shape: DecoderShape
    split_seed: int


def train_decoder(
    cache: AnyPath, read_frames: ReadFrames, out: Path, options: DecoderOptions, *, overwrite: bool = False
) -> dict[str, Any]:
    """Train a decoder on a store's tokens and their frames; the same call again goes on where it was stopped.

    Memory holds `max_frames` images, the tokens of two batches, and a shard of frames while they are read.

    Args:
        cache: the store.
        read_frames: gives the frames that the store's tokens were made of; asked for at most a shard's at once.
        out: the decoder's folder.
        options: see `DecoderOptions`. More `steps` than before go on from there.
        overwrite: begin anew where a decoder exists.

    Returns:
        The content of `validation.json`: over held-out frames what `validate_decoder` gives.

    Raises:
        UserError: unusable store, a decoder with other settings, images that do not fit into memory, or a loss that is not finite.
    """
    check_options(options)
    store = TokenStore.open(cache, mirrored=True)
    with exclusive(out.with_name(f".{out.name}.lock"), out, wait=False) as alone:
        if not alone:
            raise UserError(f"another wmtrain decoder is at work on {out}; wait for it, or choose another --out")
        try:
            return _train(store, cache, read_frames, out, options, overwrite=overwrite)
        except OSError as error:
            raise not_written(out, error) from error


def _train(
    store: TokenStore, cache: AnyPath, read_frames: ReadFrames, out: Path, options: DecoderOptions, *, overwrite: bool
) -> dict[str, Any]:
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    frames, held_out = choose_frames(store, options)
    image_size = read_frames(frames[:1]).shape[1]
    shape = DecoderShape(*store.card.token_grid, store.card.token_dim, image_size)
    name = options.decoder
    if name == "auto":
        name = "transposed-conv" if store.card.tokens_per_frame == 1 else "vqvae"
    config = {**asdict(options), "decoder": name, "cache": absolute(cache), "shape": asdict(shape)}
    ours = _compare(out, config, store, overwrite=overwrite)
    if ours and not overwrite and (done := _finished(out, options)):
        return done
    metrics = ImageMetrics(image_size, device, lpips=False)
    images = load_images(read_frames, frames, store.card.frames_per_shard, image_size)
    torch.manual_seed(options.seed)
    model = build_decoder(name, shape, options.decoder_options, statistics_of(store, images)).to(device)
    optimiser = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
    # Only now: an option that makes no sense must not cost a decoder that is there.
    if ours and overwrite:
        shutil.rmtree(out)
    write_json(out / "identity.json", {"identity": store.identity.to_json(), "card": asdict(store.card)})
    write_json(out / "config.json", config)
    first = load_training_state(out, model, optimiser) if checkpoints(out) else 0
    truncate_metrics(out, first)
    count = sum(parameter.numel() for parameter in model.parameters())
    tqdm.write(
        f"{name}: {count / 1e6:.2f} M parameters, {len(frames)} of {np.isin(store.episode, _episodes(store, options)).sum()} train "
        f"frames of {image_size} px, {device.type} {str(dtype).removeprefix('torch.')}, steps {first} to {max(first, options.steps)}",
        file=sys.stderr,
    )
    if first < options.steps:
        _descend(store, frames, images, model, optimiser, first, out, options, dtype)
        del images
    if options.lpips:
        metrics = ImageMetrics(image_size, device)
    real = load_images(read_frames, held_out, store.card.frames_per_shard, image_size)
    result = {
        "step": max(first, options.steps),
        "frames": len(held_out),
        **validate_decoder(model, store, held_out, real, metrics),
    }
    write_json(out / "validation.json", result)
    return result


def _descend(
    store: TokenStore,
    frames: NDArray[np.int64],
    images: Images,
    model: Decoder,
    optimiser: torch.optim.Optimizer,
    first: int,
    out: Path,
    options: DecoderOptions,
    dtype: torch.dtype,
) -> None:
    device = model.tokens_mean.device
    with (
        Log(out) as log,
        tqdm(
            total=options.steps,
            initial=first,
            desc="wmtrain decoder",
            unit=" steps",
            mininterval=seconds_between_updates(),
        ) as bar,
        signals_between_steps() as stop,
    ):
        for step in range(first, options.steps):
            chosen = batch_windows(len(frames), options.seed, step, options.batch)
            tokens = torch.from_numpy(store.gather(frames[chosen])).to(device)
            real = to_unit(images[chosen]).to(device)
            model.train()
            optimiser.zero_grad(set_to_none=True)
            with autocast(device, dtype):
                losses = model.loss(tokens, real)
            if not torch.isfinite(losses["loss"]):
                raise UserError(_not_finite(step, out))
            losses["loss"].backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            done = step + 1
            bar.update()
            if done % options.log_every == 0 or done == options.steps:
                values = {name: value.item() for name, value in losses.items()}
                log.write(done, values)
                bar.set_postfix_str(f"loss {values['loss']:.5f}", refresh=False)
            if done % options.checkpoint_every == 0 or done == options.steps or stop.wanted:
                # The step may have left weights that the next loss would show to be bad: better not to keep them.
                with torch.no_grad(), autocast(device, dtype):
                    if not torch.isfinite(model.eval().loss(tokens, real)["loss"]):
                        raise UserError(_not_finite(done, out))
                save_checkpoint(out, done, model, optimiser)
            stop.now_if_wanted()


def load_decoder(folder: Path, device: torch.device) -> Decoder:
    """The newest decoder of a folder, ready to draw.

    Raises:
        UserError: the folder is no decoder's, or holds no usable checkpoint.
    """
    config = read_decoder_config(folder)

    def make(statistics: dict[str, Tensor]) -> Decoder:
        return build_decoder(config["decoder"], DecoderShape(**config["shape"]), config["decoder_options"], statistics)

    decoder: Decoder = load_network(
        folder, make, device, "restore its config.json, or train another decoder into another --out"
    )
    return decoder


def read_decoder_config(folder: Path) -> dict[str, Any]:
    """The settings of a decoder; raises UserError where the folder is no decoder's."""
    file = folder / "config.json"
    config = read_json(file, HINT)
    if missing := {"decoder", "decoder_options", "shape", "cache", "split_seed"} - set(config):
        raise UserError(f"{file} is not a decoder's (it lacks {', '.join(sorted(missing))}); {HINT}")
    parse(_Config, config, file, HINT, exact=False)
    if config["decoder"] not in DECODERS:
        raise UserError(f"{file} names an unknown decoder {config['decoder'][:80]!r}; {HINT}")
    parse(DECODERS[config["decoder"]][0], config["decoder_options"], file, HINT)
    return config


def read_decoder_identity(folder: Path) -> Identity:
    """The identity of the store that a decoder was trained on; raises UserError where the folder is no decoder's."""
    read_decoder_config(folder)
    return read_identity(folder)[1]


def statistics_of(store: TokenStore, images: Images) -> dict[str, Tensor]:
    """Mean and standard deviation of the tokens and the mean image, for a decoder's buffers."""
    mean = images.mean(0, dtype=np.float64, keepdims=True)
    return {
        "tokens_mean": torch.from_numpy(store.mean),
        "tokens_std": torch.from_numpy(store.std),
        "images_mean": torch.from_numpy(mean).permute(0, 3, 1, 2)[0].float() / 127.5 - 1,
    }


def choose_frames(store: TokenStore, options: DecoderOptions) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Frames to train on, and held-out ones to validate on; ascending, and the same whenever the options are."""
    found = []
    for split, most in (("train", options.max_frames), ("val", VALIDATION_FRAMES)):
        there = np.flatnonzero(np.isin(store.episode, _episodes(store, options, split)))
        if len(there) > most:
            there = np.sort(np.random.default_rng(options.seed).choice(there, most, replace=False))
        found.append(there)
    return found[0], found[1]


def _episodes(store: TokenStore, options: DecoderOptions, split: str = "train") -> NDArray[np.int64]:
    return split_episodes(int(store.episode[-1]) + 1, split, options.split_seed)


def load_images(
    read_frames: ReadFrames,
    frames: NDArray[np.int64],
    frames_per_shard: int,
    image_size: int,
    hint: str = "lower --max-frames",
) -> Images:
    """Some frames, ascending, uint8 [len(frames), S, S, 3]; each shard is read once.

    Raises:
        UserError: there is not so much memory; `hint` ends the message.
    """
    needed, free = len(frames) * image_size**2 * 3, available_ram()
    if needed > free:
        raise UserError(
            f"{len(frames)} frames of {image_size} px need {human_bytes(needed)} of memory, {human_bytes(free)} are free; {hint}"
        )
    images = np.empty((len(frames), image_size, image_size, 3), np.uint8)
    shard_of = frames // frames_per_shard
    with tqdm(total=len(frames), desc="read frames", unit=" frames", mininterval=seconds_between_updates()) as bar:
        for shard in np.unique(shard_of):
            here = np.flatnonzero(shard_of == shard)
            images[here] = read_frames(frames[here])
            bar.update(len(here))
    return images


@torch.inference_mode()
def validate_decoder(
    model: Decoder, store: TokenStore, frames: NDArray[np.int64], images: Images, metrics: ImageMetrics
) -> dict[str, Any]:
    """What is drawn of cached tokens against the frames themselves.

    Args:
        model: the decoder.
        store: whose tokens.
        frames: [B], which. images: uint8 [B, S, S, 3] of them.
        metrics: what to compare by.

    Returns:
        What `summarise` gives of all frames; the same of the mean train frame in place of what is drawn, as `mean_frame`; and
        `lpips_absent`, the reason where there is no LPIPS.
    """
    model.eval()
    parts: dict[str, dict[str, list[NDArray[np.float64]]]] = {"drawn": {}, "mean_frame": {}}
    for rows in np.array_split(np.arange(len(frames)), max(1, math.ceil(len(frames) / 32))):
        tokens, real = torch.from_numpy(store.gather(frames[rows])).to(model.tokens_mean.device), to_unit(images[rows])
        for kind, drawn in (("drawn", model(tokens)), ("mean_frame", model.images_mean.expand(*real.shape))):
            for name, values in metrics(drawn, real, model.images_mean).items():
                parts[kind].setdefault(name, []).append(values)
    means = {kind: summarise({n: np.concatenate(v) for n, v in found.items()}) for kind, found in parts.items()}
    result: dict[str, Any] = {**means["drawn"], "mean_frame": means["mean_frame"]}
    return result if metrics.lpips_absent is None else {**result, "lpips_absent": metrics.lpips_absent}


def _compare(out: Path, config: dict[str, Any], store: TokenStore, *, overwrite: bool) -> bool:
    """Whether there is a decoder at `out`; raises UserError where it is another, or something else."""
    ours = (out / "config.json").exists() and (out / "identity.json").exists()
    there_is = {file.name for file in out.iterdir() if not is_temporary(file)} if out.exists() else set()
    if not ours and there_is - {"identity.json"}:  # which is what a decoder begins with
        raise UserError(f"{out} exists and is not a decoder of ours; choose another --out")
    if not ours:
        return False
    there = read_decoder_config(out)
    different = [
        f"{name} {there.get(name)} != {value}"
        for name, value in config.items()
        if name not in MAY_CHANGE and there.get(name) != value
    ]
    different += [f"the store's identity, {item}" for item in read_identity(out)[1].differences(store.identity)]
    if different and not overwrite:
        raise UserError(f"{out} is a decoder with other settings ({'; '.join(different)}); choose another --out")
    return True


def _finished(out: Path, options: DecoderOptions) -> dict[str, Any] | None:
    """What the last validation found, where there is nothing left to do."""
    if not checkpoints(out) or not (out / "validation.json").exists():
        return None
    step = int(read_state(last_checkpoint(out))["step"])
    done = read_json(out / "validation.json", "move it away, then run the same command again")
    whole = done.get("step") == step >= options.steps and ("lpips" in done or not options.lpips)
    return done if whole else None


def _not_finite(step: int, out: Path) -> str:
    return (
        f"the loss of step {step} is not finite; the last checkpoint in {out}, if any, is good: "
        "train with a lower --lr into another --out"
    )
