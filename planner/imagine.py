"""Pictures of a world model's imagination: open-loop rollouts of held-out windows beside the real frames. Never used for planning."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
import numpy as np
import torch
from einops import rearrange
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from wmcache.cache.store import TokenStore
from wmcache.cache.windows import Windows
from wmcache.common.device import autocast, choose_device, choose_dtype
from wmcache.common.errors import UserError
from wmcache.common.figures import png_bytes
from wmcache.common.files import atomic_write, make_folder
from wmcache.common.frames import Frames, load_frames
from wmcache.common.jsonfiles import write_json
from wmcache.common.paths import AnyPath
from wmcache.common.progress import seconds_between_updates
from wmcache.common.video import ffmpeg, write_mp4
from wmcache.planner.decode import Draw, OwnDecoder, open_encoder
from wmcache.planner.options import ImagineOptions
from wmcache.trainer.decoder import load_decoder, read_decoder_config
from wmcache.trainer.decoders import Decoder
from wmcache.trainer.metrics import MOVING, ImageMetrics, Images, summarise, to_pixels, to_unit
from wmcache.trainer.models import WorldModel, rollout
from wmcache.trainer.runs import data_split, load_model, open_store, read_config, read_identity

Scalar = TypeVar("Scalar", bound=np.generic)

BATCH = 16
DEFAULT_FPS = 20
"""Of stores that record none."""
SIDE_BY_SIDE = 4
"""Windows in a video."""
PICTURED = 3
"""Windows in the picture."""
COLUMNS = 10
"""Most steps of a window in the picture."""
PICTURES = {
    "imagined": "imagined",
    "floor": "decoder's best",
    "copying": "observed frame",
    "mean_frame": "mean frame",
}
"""Key in metrics.json of what is compared with the real frame -> its label.

Decoded from the imagined latent, and from the real one; the observed frame; and the mean of the decoder's training frames, with an
encoder's own decoder that of the real frames.
"""
PANEL = 224
GAP = 8
RC: dict[Any, Any] = {"font.size": 8, "axes.titlesize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7}

Rollouts = dict[str, Images]
"""Frames of some windows, the observed one first, uint8 [B, 1 + steps, S, S, 3].

`real`; `reconstructed`, decoded from their cached tokens; and `imagined`, decoded from what the world model imagines.
"""


def imagine(
    run: Path, decoder: Path | None, source: Frames, out: Path, options: ImagineOptions, *, cache: AnyPath | None = None
) -> dict[str, Any]:
    """Compare imagined frames with real ones, and write `metrics.json`, `errors.png`, `rollout-*.mp4` and `rollouts.png`.

    Args:
        run: folder of a world model.
        decoder: folder of a decoder of the same store; None: the encoder's own.
        source: the frames that the store's tokens were made of.
        cache: the store, if it has moved.

    Returns:
        The content of `metrics.json`; `steps` has the metrics of each of PICTURES by model step, see `summarise`.
    """
    if options.videos:
        ffmpeg()  # a missing program is reported before any work
    device = choose_device(options.device)
    store, windows = _open(run, decoder, cache, options.steps)
    size = int(store.card.dataset["image_size"])
    draw = load_decoder(decoder, device) if decoder else OwnDecoder(open_encoder(run, device=str(device)), size)
    model = _load(run, device, options.context)
    metrics = ImageMetrics(draw.image_size, device, lpips=options.lpips)
    dtype = choose_dtype(options.dtype, device)
    chosen = np.random.default_rng(options.seed).permutation(len(windows))[: options.windows]
    frames = np.unique(windows.frames(chosen))
    images = load_frames(source, frames, store.card.frames_per_shard, draw.image_size, "lower --windows")
    mean = draw.images_mean if isinstance(draw, Decoder) else to_unit(images.mean(0, keepdims=True))[0].to(device)
    shown: list[Rollouts] = []
    compared: list[dict[str, list[dict[str, NDArray[np.float64]]]]] = [defaultdict(list) for _ in range(options.steps)]
    with tqdm(total=len(chosen), desc="imagine", unit=" windows", mininterval=seconds_between_updates()) as bar:
        for batch in np.array_split(chosen, math.ceil(len(chosen) / BATCH)):
            real = images[np.searchsorted(frames, windows.frames(batch))]
            data = {name: torch.from_numpy(value).to(device) for name, value in windows.batch(batch).items()}
            rollouts, drawn = _roll_out(model, draw, mean, data, real, dtype)
            for step, found in enumerate(compared):
                for name, part in drawn.items():
                    found[name].append(metrics(part[:, step], to_unit(real[:, step + 1]), mean))
            if sum(len(part["real"]) for part in shown) < max(PICTURED, SIDE_BY_SIDE * options.videos):
                shown.append(rollouts)
            bar.update(len(batch))
    result: dict[str, Any] = {
        "options": asdict(options),
        "run": str(run),
        "decoder": decoder and str(decoder),
        "frameskip": windows.frameskip,
        "windows": len(chosen),
        "steps": [
            {"step": k, **{name: summarise(_join(parts)) for name, parts in found.items()}}
            for k, found in enumerate(compared, start=1)
        ],
    }
    if metrics.lpips_absent is not None:
        result["lpips_absent"] = metrics.lpips_absent
    fps = float(store.card.dataset.get("fps") or DEFAULT_FPS) / windows.frameskip
    _write(out, shown, fps, options.videos, result)
    return result


def _load(run: Path, device: torch.device, context: int | None) -> WorldModel:
    """Load a model that imagines latents, which sees at most `context` frames."""
    model = load_model(run, device)
    if not model.has_latents:
        raise UserError(
            f"{run} imagines proprio alone, which no decoder draws; see: wmcache bench rollout --part proprio"
        )
    model.context = min(context or model.context, model.context)
    return model


def _open(run: Path, decoder: Path | None, cache: AnyPath | None, steps: int) -> tuple[TokenStore, Windows]:
    """Open the store of a run and a decoder that belong together, and its held-out windows."""
    config, identity = read_config(run), read_identity(run)[1]
    frameskip, (split, _) = int(config["frameskip"]), data_split(config)
    different = [] if decoder is None else [*identity.differences(read_identity(decoder)[1])]
    if decoder is not None and split != (other := read_decoder_config(decoder)["split_seed"]):
        different.append(f"held-out episodes, --split-seed {other} != {split}")
    if different:
        raise UserError(
            f"{decoder} and {run} were trained on different data: {'; '.join(different)}; pass another --decoder"
        )
    store = open_store(run, cache)
    longest = store.longest_episode() // frameskip - 1
    if steps > longest:
        raise UserError(
            f"--steps {steps} is more than the {longest} of the longest episode, of {frameskip} env steps each; lower it"
        )
    return store, store.windows(1, steps, frameskip, "val", seed=split)


@torch.inference_mode()
def _roll_out(
    model: WorldModel, draw: Draw, mean: Tensor, data: dict[str, Tensor], real: Images, dtype: torch.dtype
) -> tuple[Rollouts, dict[str, Tensor]]:
    """Imagine and decode windows; returns frames to show, and by PICTURES, images [B, steps, 3, S, S] in [-1, 1] to compare."""
    tokens, steps = data["tokens"].float(), real.shape[1] - 1
    with autocast(tokens.device, dtype):
        latents = rollout(model, tokens[:, :1], data["proprio"][:, :1], data["action"][:, :steps]).latents[:, 0]
    reconstructed, imagined = _decode(draw, tokens), _decode(draw, latents)
    seen = torch.cat([reconstructed[:, :1], imagined], 1)
    copying = to_unit(real[:, 0]).to(tokens.device)[:, None].expand_as(imagined)
    drawn = (imagined, reconstructed[:, 1:], copying, mean.expand_as(imagined))
    decoded = {"reconstructed": reconstructed, "imagined": seen}
    pictures = {name: to_pixels(part.flatten(0, 1)).reshape(real.shape) for name, part in decoded.items()}
    return {"real": real, **pictures}, dict(zip(PICTURES, drawn, strict=True))


def _decode(draw: Draw, latents: Tensor) -> Tensor:
    """[B, T, N, D] -> [B, T, 3, S, S], a step at a time to bound memory."""
    return torch.stack([draw(latents[:, step].float()) for step in range(latents.shape[1])], 1)


def _join(parts: Sequence[Mapping[str, NDArray[Scalar]]]) -> dict[str, NDArray[Scalar]]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _write(out: Path, parts: list[Rollouts], fps: float, videos: int, result: dict[str, Any]) -> None:
    make_folder(out)
    for old in (*out.glob("rollout-*.mp4"), out / "metrics.json"):
        old.unlink(missing_ok=True)
    rollouts = _join(parts)
    for number, first in enumerate(range(0, min(SIDE_BY_SIDE * videos, len(rollouts["real"])), SIDE_BY_SIDE)):
        real, imagined = (rollouts[name][first : first + SIDE_BY_SIDE] for name in ("real", "imagined"))
        write_video(out / f"rollout-{number:03d}.mp4", real, imagined, fps)
    for name, picture in (("rollouts", draw_rollouts(rollouts)), ("errors", draw_errors(result["steps"]))):
        with atomic_write(out / f"{name}.png") as file:
            file.write(picture)
    write_json(out / "metrics.json", result)  # last, so that its presence means that the rest is complete


def write_video(path: Path, real: Images, imagined: Images, fps: float) -> None:
    """Write windows side by side, real frames above imagined ones, uint8 [B, T, S, S, 3] each; atomically."""
    scale = max(1, PANEL // real.shape[2])
    large = np.stack([real, imagined]).repeat(scale, 4).repeat(scale, 3)
    border = (GAP // 2, GAP // 2 + large.shape[3] % 2)  # white; the sides of a video must be even
    framed = np.pad(large, ((0, 0), (0, 0), (0, 0), border, border, (0, 0)), constant_values=255)
    write_mp4(path, list(rearrange(framed, "rows b t h w c -> t (rows h) (b w) c")), fps)


@matplotlib.rc_context(RC)
def draw_errors(steps: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw the error of each picture by model step, over all pixels and over those that move; returns a PNG."""
    figure = Figure(figsize=(8.6, 3.2), layout="constrained", dpi=120)
    panels = figure.subplots(1, 2)
    share = float(np.mean([row["imagined"]["moving"] for row in steps]))
    titles = {"mse": "all pixels", "moving_mse": f"pixels that move: {share:.2%}"}
    numbers = [row["step"] for row in steps]
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        for (name, label), line in zip(PICTURES.items(), ("-", "--", ":", "-."), strict=True):
            values = [math.nan if row[name][key] is None else row[name][key] for row in steps]
            axes.plot(numbers, values, line, marker=".", label=label)
        axes.set(ylim=(0, None), xlabel="model step", ylabel="mean squared error of values in [0, 1]", title=title)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"a pixel moves where the real frame differs from the mean frame by more than {MOVING}")
    return png_bytes(figure)


@matplotlib.rc_context(RC)
def draw_rollouts(rollouts: Rollouts) -> bytes:
    """Draw the first windows: real, reconstructed and imagined frames as rows, model steps as columns; returns a PNG."""
    count, length = min(PICTURED, len(rollouts["real"])), rollouts["real"].shape[1]
    steps = np.unique(np.linspace(0, length - 1, min(length, COLUMNS + 1)).astype(int))
    figure = Figure(figsize=(1.15 * len(steps) + 0.4, 1.15 * 3 * count + 0.3), layout="constrained", dpi=110)
    rows = figure.subplots(3 * count, len(steps), squeeze=False)
    for window in range(count):
        for kind, (name, frames) in enumerate(rollouts.items()):
            for axes, step in zip(rows[3 * window + kind], steps, strict=True):
                axes.imshow(frames[window, step])
                axes.set(xticks=[], yticks=[])
                if step == 0:
                    axes.set_ylabel(name)
                if window == kind == 0:
                    axes.set_title(f"step {step}" if step else "observed")
    return png_bytes(figure)
