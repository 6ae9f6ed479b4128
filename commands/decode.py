"""wmtrain decoder, wmcache imagine: latents as pictures, for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from wmcache.commands.shared import (
    ANY_PATH,
    PATH,
    Command,
    device_option,
    json_option,
    name_of,
    options,
    print_json,
    say,
)
from wmcache.common.errors import UserError, command
from wmcache.common.files import home
from wmcache.common.paths import AnyPath

frames_option = click.option(
    "--frames", "--dataset", "dataset", type=ANY_PATH, help="Where the store's frames are, if they have moved."
)
lpips_option = click.option(
    "--lpips/--no-lpips", default=True, help="Try to compute LPIPS; its network is fetched once, 244 MB."
)
decoder_sizes = options(
    click.option("--channels", type=click.IntRange(1), help="vqvae: channels of both stacks.  [default: 384]"),
    click.option("--residual", type=click.IntRange(1), help="vqvae: channels inside a residual block.  [default: 128]"),
    click.option("--blocks", type=click.IntRange(0, 64), help="vqvae: residual blocks of a stack.  [default: 4]"),
    click.option("--quantize", is_flag=True, default=None, help="vqvae: round tokens to a codebook first."),
    click.option("--codes", type=click.IntRange(1), help="vqvae: entries of the codebook.  [default: 2048]"),
    click.option(
        "--depth", type=click.IntRange(1), help="transposed-conv: 1/32 of the channels of the first map.  [default: 64]"
    ),
)


METRICS = {"mse": "mse", "moving_mse": "mse, moving pixels", "ssim": "ssim", "lpips": "lpips"}


@click.command(cls=Command)
@click.option("--cache", type=ANY_PATH, required=True, help="The token store.")
@frames_option
@click.option("--out", type=PATH, help="Folder of the decoder.  [default: $WMCACHE_HOME/decoders/<dataset>-<store>]")
@click.option(
    "--decoder",
    type=click.Choice(["auto", "vqvae", "transposed-conv"]),
    default="auto",
    help="Network; auto takes transposed-conv for a single token, and vqvae for a grid.",
)
@decoder_sizes
@click.option(
    "--steps",
    type=click.IntRange(1),
    default=10_000,
    help="Optimiser steps; a higher number continues a finished decoder.",
)
@click.option("--batch-size", "batch", type=click.IntRange(1), default=32, help="Frames in each step.")
@click.option("--lr", "learning_rate", type=float, default=3e-4, help="Learning rate.")
@click.option(
    "--max-frames",
    type=click.IntRange(1),
    default=20_000,
    help="Frames to train on, a random sample that is held in memory.",
)
@click.option("--dtype", default="auto", help="Compute precision: auto, float32 or bfloat16.")
@device_option
@click.option("--seed", type=click.IntRange(0), default=0, help="Seed of weights, sample and order.")
@click.option("--split-seed", type=click.IntRange(0), default=42, help="Seed of the split into train and val episodes.")
@click.option("--log-every", type=click.IntRange(1), default=20, help="Steps between two lines of the log.")
@click.option("--checkpoint-every", type=click.IntRange(1), default=500, help="Steps between two checkpoints.")
@lpips_option
@click.option("--overwrite", is_flag=True, help="Delete the decoder in --out and start from scratch.")
@json_option
def decoder(
    cache: AnyPath,
    dataset: AnyPath | None,
    out: Path | None,
    channels: int | None,
    residual: int | None,
    blocks: int | None,
    quantize: bool | None,
    codes: int | None,
    depth: int | None,
    overwrite: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train a decoder from cached tokens to frames, to look at latents with. Run again, it goes on where it stopped."""
    from wmcache.trainer.decoder import train_decoder
    from wmcache.trainer.options import DecoderOptions

    out = out or home() / "decoders" / name_of(cache)
    sizes = {
        "channels": channels,
        "residual": residual,
        "blocks": blocks,
        "quantize": quantize,
        "codes": codes,
        "depth": depth,
    }
    given = {name: value for name, value in sizes.items() if value is not None}
    frames = _frames_of(cache, dataset)
    result = train_decoder(cache, frames, out, DecoderOptions(decoder_options=given, **settings), overwrite=overwrite)
    if as_json:
        print_json(result)
        return
    say(f"{out}: {result['frames']} held-out frames, {_figures(result)}")
    if "mean_frame" in result:  # a decoder of an earlier version has no such figures
        say(f"the mean frame, for comparison: {_figures(result['mean_frame'])}")
        say(_explain_moving(result["moving"]))
    _tell_absence(result)
    say(f"draw what a world model imagines with: {command('wmcache', 'imagine', '--run', 'RUN', '--decoder', out)}")


@click.command(cls=Command)
@click.option("--run", type=PATH, required=True, help="Folder of the world model's run.")
@click.option("--decoder", type=PATH, required=True, help="Folder of a decoder of the same store.")
@frames_option
@click.option("--cache", type=ANY_PATH, help="The store, if it has moved.")
@click.option("--steps", type=click.IntRange(1), default=10, help="Model steps from one observed frame.")
@click.option("--windows", type=click.IntRange(1), default=64, help="Held-out windows that are compared.")
@click.option("--videos", type=click.IntRange(0), default=2, help="Videos to write, each of 4 windows side by side.")
@click.option("--context", type=click.IntRange(1), help="Frames that an imagined step sees.  [default: the history]")
@click.option("--seed", type=click.IntRange(0), default=0, help="Seed of the sample of windows.")
@click.option("--dtype", default="auto", help="Compute precision: auto, float32 or bfloat16.")
@device_option
@lpips_option
@click.option("--out", type=PATH, help="Folder of the pictures.  [default: RUN/imagine]")
@json_option
def imagine(
    run: Path,
    decoder: Path,
    dataset: AnyPath | None,
    cache: AnyPath | None,
    out: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Draw what a world model imagines beside what then happened: videos, a picture, and figures for each step."""
    from wmcache.planner.imagine import imagine as draw
    from wmcache.planner.options import ImagineOptions
    from wmcache.trainer.runs import read_config

    cache, out = cache or Path(read_config(run)["cache"]), out or run / "imagine"
    frames = _frames_of(cache, dataset)
    result = draw(run, decoder, frames, out, ImagineOptions(**settings), cache=cache)
    if as_json:
        print_json(result)
        return
    _print_steps(result["steps"])
    _tell_absence(result)
    say(f"pictures: {out}")


def _frames_of(cache: AnyPath, dataset: AnyPath | None) -> Any:
    """The `FrameDataset` that a store was made of."""
    from wmcache.cache.store import TokenStore
    from wmcache.pipeline.repair import open_frames

    store = TokenStore.open(cache)
    frames = open_frames(store.card, dataset)
    if frames.card.fingerprint != store.identity.dataset_fingerprint:
        raise UserError(f"{frames.path} does not hold the frames of {cache}; pass the right --frames")
    return frames


def _figures(result: dict[str, Any]) -> str:
    return ", ".join(f"{title} {_figure(name, result[name])}" for name, title in METRICS.items() if name in result)


def _figure(name: str, value: float | None) -> str:
    return "-" if value is None else f"{value:.6f}" if name.endswith("mse") else f"{value:.4f}"


def _print_steps(rows: list[dict[str, Any]]) -> None:
    """A block for each metric: pictures as lines, up to 10 model steps as columns."""
    from wmcache.planner.imagine import PICTURES

    count = min(len(rows), 10)
    shown = [rows[k * (len(rows) - 1) // max(count - 1, 1)] for k in range(count)]
    for name, title in METRICS.items():
        if name in shown[0]["imagined"]:
            click.echo(f"{title:21}" + "".join(f" {'step ' + str(row['step']):>8}" for row in shown))
            for picture, label in PICTURES.items():
                click.echo(f"  {label:19}" + "".join(f" {_figure(name, row[picture][name]):>8}" for row in shown))
    click.echo(_explain_moving(sum(row["imagined"]["moving"] for row in rows) / len(rows)))


def _explain_moving(share: float) -> str:
    from wmcache.trainer.metrics import MOVING

    rule = f"where the real frame differs from the mean train frame by more than {MOVING}"
    return f"moving: {share:.2%} of the pixels, {rule}" if share else f"moving: no pixel; a pixel moves {rule}"


def _tell_absence(result: dict[str, Any]) -> None:
    if "lpips_absent" in result:
        click.echo(f"no LPIPS: {result['lpips_absent']}")
