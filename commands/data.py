"""wmcache collect, import, fit, extract, encoders: from the world, or from others, to tokens."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from wmcache.cache.files import home, human_bytes
from wmcache.commands.shared import (
    PATH,
    Command,
    Group,
    create_encoder,
    dataset_option,
    device_option,
    encoder_options,
    json_option,
    open_dataset,
    options,
)

DEFAULT_ENV = "wmcache/PointMaze-UMaze-v0"
frames_per_shard_option = click.option(
    "--frames-per-shard",
    type=click.IntRange(1),
    default=512,
    help="Frames in each tar, and in each Zarr shard made from it.",
)
import_options = options(
    click.option("--out", type=PATH, required=True, help="Folder of the dataset."), frames_per_shard_option
)
shape_options = options(
    click.option(
        "--crop",
        type=click.Choice(["none", "center"]),
        default="none",
        help="center: take the central square of images that are not square.",
    ),
    click.option(
        "--image-size", type=click.IntRange(8, 8192), help="Resize squares to this side.  [default: as they are]"
    ),
    click.option("--fps", type=click.IntRange(1), default=20, help="Env steps a second, for videos made later."),
)


@click.command(cls=Command)
@click.option("--env", default=DEFAULT_ENV, help="Environment id, layout name (UMaze), or a .txt grid.")
@click.option("--episodes", type=click.IntRange(1), default=2000, help="Episodes; DINO-WM has 2000.")
@click.option("--length", type=click.IntRange(1), default=100, help="Frames in each episode.")
@click.option("--policy", default="random", help="Behaviour policy: random (DINO-WM) or held.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the dataset; the same seed gives the same bytes.")
@click.option("--image-size", type=click.IntRange(8, 2048), default=224, help="Side of the frames in pixels.")
@frames_per_shard_option
@click.option("--workers", type=click.IntRange(1), default=os.cpu_count() or 1, help="Processes.")
@click.option("--out", type=PATH, help="Folder of the dataset.  [default: $WMCACHE_HOME/pointmaze-<maze>]")
def collect(env: str, out: Path | None, **settings: Any) -> None:
    """Collect a dataset of frames. Run again, it goes on where it stopped."""
    from wmcache.envs import find_maze
    from wmcache.pipeline.collect import collect as run

    out = out or home() / f"pointmaze-{find_maze(env).name.lower()}"
    _print_card(out, run(env, out, **settings))


def _print_card(out: Path, card: Any) -> None:
    size = sum(shard["bytes"] for shard in card.shards)
    click.echo(f"{out}: {card.episodes} episodes, {card.frames} frames, {len(card.shards)} shards, {human_bytes(size)}")
    click.echo(f"fingerprint {card.fingerprint}")


@click.group("import", cls=Group)
def import_() -> None:
    """Make a dataset of other people's frames. Run again, it goes on where it stopped."""


@import_.command("dino-wm")
@click.argument("folder", type=PATH)
@click.option("--maze", default="UMaze", help="Layout that the data was collected in, or a .txt grid.")
@import_options
def import_dino_wm(folder: Path, out: Path, **settings: Any) -> None:
    """Import DINO-WM's PointMaze FOLDER: states.pth, actions.pth, seq_lengths.pth, obses/episode_XXX.pth."""
    from wmcache.pipeline.importers.dino_wm import import_dino_wm as run

    _print_card(out, run(folder, out, **settings))


@import_.command("frames")
@click.argument("folder", type=PATH)
@click.option(
    "--actions",
    "table",
    type=PATH,
    required=True,
    help="CSV or Parquet, a row a frame: episode, step, file or video, action_0 ..., state_0 ...",
)
@shape_options
@import_options
def import_frames(folder: Path, out: Path, crop: str, image_size: int | None, **settings: Any) -> None:
    """Import the images or videos in FOLDER beside a table of actions and states."""
    from wmcache.pipeline.importers import Shape
    from wmcache.pipeline.importers.frames import import_frames as run

    _print_card(out, run(folder, out=out, shape=Shape(crop, image_size), **settings))


@import_.command("minari")
@click.argument("dataset")
@click.option(
    "--image-key", help="Observation that is the image, as in pixels or agent.image.  [default: the only one]"
)
@click.option("--state-key", help="Observation that is the state.  [default: the only vector]")
@shape_options
@import_options
def import_minari(dataset: str, out: Path, crop: str, image_size: int | None, **settings: Any) -> None:
    """Import a local Minari DATASET, by its id or its folder."""
    from wmcache.pipeline.importers import Shape
    from wmcache.pipeline.importers.minari import import_minari as run

    _print_card(out, run(dataset, out, shape=Shape(crop, image_size), **settings))


@click.command(cls=Command)
@dataset_option
@click.option("--encoder", "name", default="tcn", help="An encoder that can be fitted.")
@click.option("--steps", type=click.IntRange(1), default=400, help="Optimiser steps.")
@click.option("--batch-size", "batch", type=click.IntRange(2), default=256, help="Pairs of frames in each step.")
@click.option("--max-lag", type=click.IntRange(1), default=4, help="Positives are 1 to this many env steps apart.")
@click.option(
    "--spread", type=click.FloatRange(0), default=0.2, help="Weight of the term that drives all frames apart."
)
@click.option("--lr", "learning_rate", type=float, default=1e-3, help="Peak learning rate.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of weights and batches.")
@click.option("--max-frames", type=click.IntRange(1), default=50_000, help="Frames held in memory.")
@click.option("--overwrite", is_flag=True, help="Replace the weights of another fit.")
@device_option
@click.option(
    "--out", type=PATH, help="File to write.  [default: $WMCACHE_HOME/encoders/<dataset>-<encoder>.safetensors]"
)
def fit(
    dataset: Path | None, name: str, max_frames: int, overwrite: bool, device: str, out: Path | None, **settings: Any
) -> None:
    """Fit an encoder on the dataset's own frames, and measure its latent landscape."""
    from wmcache.pipeline.encoders import FitOptions
    from wmcache.pipeline.fit import default_weights
    from wmcache.pipeline.fit import fit as run

    frames = open_dataset(dataset)
    out = out or default_weights(frames, name)
    result = run(frames, name, out, FitOptions(**settings), max_frames=max_frames, device=device, overwrite=overwrite)
    click.echo(f"{result.weights}: fitted on {result.frames} frames")
    if (landscape := result.landscape) is None:
        click.echo("the landscape is not measured: the frames show no maze, so their true distances are not known")
        return
    click.echo(
        f"Spearman correlation of squared token distance and geodesic distance, held-out episodes: {landscape.spearman:.3f}"
    )
    click.echo(f"held-out frames from which descending that distance gets stuck: {landscape.stuck:.1%}")


@click.command(cls=Command)
@dataset_option
@encoder_options
@click.option(
    "--out", type=PATH, help="The store.  [default: $WMCACHE_HOME/stores/<dataset>/<encoder>-<image size>.zarr]"
)
@click.option(
    "--store-dtype",
    type=click.Choice(["float16", "int8"]),
    default="float16",
    help="What tokens are stored in; int8 takes half the room, with a step for each channel of each shard.",
)
@click.option("--dry-run", is_flag=True, help="Print what would be done, and stop.")
def extract(
    dataset: Path | None,
    batch: int,
    workers: int,
    out: Path | None,
    store_dtype: str,
    dry_run: bool,
    **encoder: Any,
) -> None:
    """Encode every frame of a dataset once. Run again, or beside itself, it does only the shards that are not there yet."""
    from wmcache.pipeline.extract import default_store, forecast
    from wmcache.pipeline.extract import extract as run

    frames = open_dataset(dataset)
    network = create_encoder(frames, **encoder)
    out = out or default_store(frames, network, store_dtype)
    if dry_run:
        plan = forecast(frames, network, out, dtype=store_dtype, batch=batch, workers=workers)
        click.echo(f"{plan.out}: {plan.shards} shards, {plan.frames} frames to do")
        click.echo(
            f"{human_bytes(plan.bytes_needed)} needed, {human_bytes(plan.bytes_free)} free, about {plan.seconds:.0f} s"
        )
        return
    run(frames, network, out, dtype=store_dtype, batch=batch, workers=workers)
    rows, columns = network.token_grid
    click.echo(f"{out}: {frames.card.frames} frames, {rows} x {columns} tokens of {network.token_dim}")


@click.command(cls=Command)
@json_option
def encoders(as_json: bool) -> None:
    """List the known encoders."""
    from wmcache.pipeline.encoders import specs

    rows = [{**asdict(spec), "token_grid": spec.token_grid(spec.image_size)} for spec in specs()]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    click.echo(f"{'name':10} {'grid':>7} {'dim':>5} {'input':>7}  {'licence':12} source")
    for row in rows:
        grid = "{} x {}".format(*row["token_grid"])
        click.echo(
            f"{row['name']:10} {grid:>7} {row['token_dim']:>5} {row['image_size']:>4} px  {row['licence']:12} {row['source']}"
        )
        click.echo(f"{'':10} {row['summary']}")
