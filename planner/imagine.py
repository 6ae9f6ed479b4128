"""What a world model imagines, drawn: open-loop rollouts of held-out windows beside the real frames. For looking, never for planning."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from wmcache.cache.store import TokenStore
from wmcache.cache.windows import Windows
from wmcache.common.device import autocast, choose_device, choose_dtype
from wmcache.common.errors import UserError
from wmcache.common.files import atomic_write, make_folder
from wmcache.common.jsonfiles import write_json
from wmcache.common.paths import AnyPath
from wmcache.common.progress import seconds_between_updates
from wmcache.common.video import ffmpeg, write_mp4
from wmcache.envs import FPS
from wmcache.planner.options import ImagineOptions
from wmcache.trainer.checkpoint import load_model, open_store, read_config, read_identity
from wmcache.trainer.decoder import ReadFrames, load_decoder, load_images, read_decoder_config, read_decoder_identity
from wmcache.trainer.metrics import MOVING, ImageMetrics, Images, summarise, to_pixels, to_unit
from wmcache.trainer.models.decoders import Decoder

SIDE_BY_SIDE = 4
"""Windows in a video."""
PICTURED = 3
"""Windows, and at most so many steps of each, in the picture."""
COLUMNS = 10
PICTURES = {
    "imagined": "imagined",
    "floor": "decoder's best",
    "copying": "observed frame",
    "mean_frame": "mean frame",
}
"""What is compared with the real frames, and what people read."""
PANEL = 224
GAP = 8


@dataclass(frozen=True)
class Rollouts:
    """Frames of some windows, the observed one first, uint8 [B, 1 + steps, S, S, 3] each.

    Attributes:
        real: as the camera saw them.
        reconstructed: drawn of their own, cached tokens: the best that this decoder can show.
        imagined: drawn of what the world model made of the first frame and the actions; the first is a reconstruction.
    """

    real: Images
    reconstructed: Images
    imagined: Images


def imagine(
    run: Path,
    decoder: Path,
    read_frames: ReadFrames,
    out: Path,
    options: ImagineOptions,
    *,
    cache: AnyPath | None = None,
) -> dict[str, Any]:
    """Imagine, draw, compare with the real frames, and write `metrics.json`, `errors.png`, `rollout-*.mp4` and `rollouts.png`.

    Args:
        run: the world model's. decoder: folder of a decoder of the same store.
        read_frames: gives the frames that the store's tokens were made of.
        out: folder to write.
        options: see `ImagineOptions`.
        cache: where the store is now, if not where it was.

    Returns:
        The content of `metrics.json`. `steps` has a row for each model step. Four pictures are compared with the real frame: `imagined`,
        decoded from the imagined latent; `floor`, decoded from the real latent, the best that a world model can reach; `copying`, the
        real observed frame, as if nothing moved; `mean_frame`, the mean of the frames that the decoder was trained on, which shows
        nothing that moves. Each has `mse`, `ssim`, `moving`, `moving_mse` and, where it is available, `lpips` (see `summarise`);
        `lpips_absent` says why it is not.

    Raises:
        UserError: no run, no decoder, of different stores or splits, or windows that are longer than episodes.
    """
    if options.videos:
        ffmpeg()  # before any work
    device = choose_device(options.device)
    config, store = _check(run, decoder, cache)
    windows = _windows(store, options, int(config["frameskip"]), int(config.get("split_seed", 42)))
    model, draw = load_model(run, device), load_decoder(decoder, device)
    metrics = ImageMetrics(draw.shape.image_size, device, lpips=options.lpips)
    dtype = choose_dtype(options.dtype, device)
    rng = np.random.default_rng(options.seed)
    chosen = rng.permutation(len(windows))[: options.windows]
    frames = np.unique(windows.frames(chosen))
    images = load_images(read_frames, frames, store.card.frames_per_shard, draw.shape.image_size, "lower --windows")
    shown = min(len(chosen), max(PICTURED, SIDE_BY_SIDE * options.videos))
    kept: list[Rollouts] = []
    parts: dict[str, dict[str, list[NDArray[np.float64]]]] = {name: {} for name in PICTURES}
    batches = np.array_split(chosen, math.ceil(len(chosen) / 16))
    with tqdm(total=len(chosen), desc="imagine", unit=" windows", mininterval=seconds_between_updates()) as bar:
        for batch in batches:
            real = images[np.searchsorted(frames, windows.frames(batch))]
            rollouts, drawn = _roll_out(model, draw, windows, batch, real, options.context, dtype)
            for name, pictures in drawn.items():
                for key, values in _compare(metrics, pictures, real, draw.images_mean).items():
                    parts[name].setdefault(key, []).append(values)
            if sum(len(part.real) for part in kept) < shown:
                kept.append(rollouts)
            bar.update(len(batch))
    whole = {name: {key: np.concatenate(values) for key, values in found.items()} for name, found in parts.items()}
    result: dict[str, Any] = {
        "options": asdict(options),
        "run": str(run),
        "decoder": str(decoder),
        "frameskip": windows.frameskip,
        "windows": len(chosen),
        "steps": [
            {
                "step": k + 1,
                **{name: summarise({key: v[:, k] for key, v in found.items()}) for name, found in whole.items()},
            }
            for k in range(options.steps)
        ],
    }
    if metrics.lpips_absent is not None:
        result["lpips_absent"] = metrics.lpips_absent
    _write(out, _join(kept, shown), windows.frameskip, options.videos)
    with atomic_write(out / "errors.png") as file:
        file.write(draw_errors(result["steps"]))
    write_json(out / "metrics.json", result)  # last, so that its presence means that all else is there
    return result


def _check(run: Path, decoder: Path, cache: AnyPath | None) -> tuple[dict[str, Any], TokenStore]:
    """The run's settings and its store, once run, decoder and store are known to belong together."""
    config, identity = read_config(run), read_identity(run)[1]
    if different := identity.differences(read_decoder_identity(decoder)):
        raise UserError(
            f"{decoder} was not trained on the store of {run} ({'; '.join(different)}); "
            "name its own --decoder, or train one: wmtrain decoder --cache STORE --out DECODER"
        )
    split, other = config.get("split_seed", 42), read_decoder_config(decoder)["split_seed"]
    if split != other:
        raise UserError(
            f"{decoder} holds out other episodes than {run} (--split-seed {other} != {split}); "
            f"name another --decoder, or train one: wmtrain decoder --split-seed {split} --out DECODER"
        )
    return config, open_store(run, cache)


def _windows(store: TokenStore, options: ImagineOptions, frameskip: int, split_seed: int) -> Windows:
    longest = int(np.bincount(store.episode).max()) // frameskip - 1
    if options.steps > longest:
        raise UserError(
            f"--steps {options.steps} is more than the {longest} model steps of {frameskip} env steps that follow the first frame of the "
            "longest episode"
        )
    return store.windows(1, options.steps, frameskip, "val", seed=split_seed)


@torch.inference_mode()
def _roll_out(
    model: Any,
    draw: Decoder,
    windows: Windows,
    batch: NDArray[np.int64],
    real: Images,
    context: int | None,
    dtype: torch.dtype,
) -> tuple[Rollouts, dict[str, Tensor]]:
    """Draw some windows.

    Args:
        model, draw: what imagines and what draws.
        windows, batch: which. real: uint8 [B, 1 + steps, S, S, 3] of them.
        context, dtype: of the model.

    Returns:
        What people look at; and by name what is to be compared with the real frames after the first, [B, steps, 3, S, S] in [-1, 1].
    """
    device = draw.tokens_mean.device
    data = {name: torch.from_numpy(value).to(device) for name, value in windows.batch(batch).items()}
    tokens = data["tokens"].float()
    with autocast(device, dtype):
        latents, _ = model.rollout(tokens[:, :1], data["proprio"][:, :1], data["action"][:, : windows.predict], context)
    reconstructed, imagined = _draw(draw, tokens), _draw(draw, latents)
    seen = torch.cat([reconstructed[:, :1], imagined], 1)
    copying = to_unit(real[:, 0]).to(device)[:, None].expand_as(imagined)
    pictures = (to_pixels(part.flatten(0, 1)).reshape(real.shape) for part in (reconstructed, seen))
    mean_frame = draw.images_mean.expand_as(imagined)
    drawn = (imagined, reconstructed[:, 1:], copying, mean_frame)
    return Rollouts(real, *pictures), dict(zip(PICTURES, drawn, strict=True))


def _draw(draw: Decoder, latents: Tensor) -> Tensor:
    """[B, T, N, D] -> [B, T, 3, S, S]; a step at a time, so that a batch's features fit into memory."""
    return torch.stack([draw(latents[:, step].float()) for step in range(latents.shape[1])], 1)


def _compare(metrics: ImageMetrics, drawn: Tensor, real: Images, mean: Tensor) -> dict[str, NDArray[np.float64]]:
    """By metric [B, steps], of drawn [B, steps, 3, S, S] against real frames [B, 1 + steps, S, S, 3]."""
    steps = [metrics(drawn[:, step], to_unit(real[:, step + 1]), mean) for step in range(drawn.shape[1])]
    return {name: np.stack([step[name] for step in steps], 1) for name in steps[0]}


def _join(parts: list[Rollouts], count: int) -> Rollouts:
    return Rollouts(
        *(
            np.concatenate([getattr(part, name) for part in parts])[:count]
            for name in ("real", "reconstructed", "imagined")
        )
    )


def _write(out: Path, rollouts: Rollouts, frameskip: int, videos: int) -> None:
    make_folder(out)
    for old in out.glob("rollout-*.mp4"):  # there may have been more
        old.unlink()
    (out / "metrics.json").unlink(missing_ok=True)
    for number in range(min(videos, math.ceil(len(rollouts.real) / SIDE_BY_SIDE))):
        chosen = slice(number * SIDE_BY_SIDE, (number + 1) * SIDE_BY_SIDE)
        write_video(
            out / f"rollout-{number:03d}.mp4", rollouts.real[chosen], rollouts.imagined[chosen], FPS / frameskip
        )
    with atomic_write(out / "rollouts.png") as file:
        file.write(draw_rollouts(rollouts))


def write_video(path: Path, real: Images, imagined: Images, fps: float) -> None:
    """Windows side by side, real frames above imagined ones, uint8 [B, T, S, S, 3] each; written whole or not at all."""
    scale = max(1, PANEL // real.shape[2])
    frames = []
    for step in range(real.shape[1]):
        rows = [np.concatenate([_panel(frame, scale) for frame in part[:, step]], 1) for part in (real, imagined)]
        frames.append(np.concatenate(rows))
    write_mp4(path, frames, fps)


def _panel(frame: Images, scale: int) -> Images:
    """The frame enlarged, with a white rim that makes its sides even."""
    large = frame.repeat(scale, 0).repeat(scale, 1)
    odd = large.shape[0] % 2
    return np.pad(large, ((GAP // 2, GAP // 2 + odd),) * 2 + ((0, 0),), constant_values=255)


def draw_errors(steps: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG: the error of each picture by model step, over all pixels and over those that move."""
    figure = Figure(figsize=(8.6, 3.2), layout="constrained", dpi=120)
    panels = figure.subplots(1, 2)
    share = float(np.mean([row["imagined"]["moving"] for row in steps]))
    titles = {"mse": "all pixels", "moving_mse": f"pixels that move: {share:.2%}"}
    numbers = [row["step"] for row in steps]
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        for (name, label), line in zip(PICTURES.items(), ("-", "--", ":", "-."), strict=True):
            values = [math.nan if row[name][key] is None else row[name][key] for row in steps]
            axes.plot(numbers, values, line, marker=".", label=label)
        axes.set(ylim=(0, None))
        axes.set_xlabel("model step", fontsize=8)
        axes.set_ylabel("mean squared error of values in [0, 1]", fontsize=8)
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=7)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8
    )
    figure.suptitle(f"a pixel moves where the real frame differs from the mean frame by more than {MOVING}", fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def draw_rollouts(rollouts: Rollouts) -> bytes:
    """A PNG: for each of the first windows its real, reconstructed and imagined frames as rows, model steps as columns."""
    count, length = min(PICTURED, len(rollouts.real)), rollouts.real.shape[1]
    steps = np.unique(np.linspace(0, length - 1, min(length, COLUMNS + 1)).astype(int))
    figure = Figure(figsize=(1.15 * len(steps) + 0.4, 1.15 * 3 * count + 0.3), layout="constrained", dpi=110)
    rows = figure.subplots(3 * count, len(steps), squeeze=False)
    for window in range(count):
        for kind, name in enumerate(("real", "reconstructed", "imagined")):
            for column, step in enumerate(steps):
                axes = rows[3 * window + kind, column]
                axes.imshow(getattr(rollouts, name)[window, step])
                axes.set_xticks([])
                axes.set_yticks([])
                if column == 0:
                    axes.set_ylabel(name, fontsize=8)
                if window == kind == 0:
                    axes.set_title("observed" if step == 0 else f"step {step}", fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()
