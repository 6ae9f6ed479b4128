"""wmcache collect, import, fit, extract, derive, encoders: from the world, or from others, to tokens."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from wmcache.cache.errors import UserError
from wmcache.cache.files import home, human_bytes
from wmcache.commands.shared import (
    PATH,
    Command,
    Group,
    create_encoders,
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


FIT = {
    "steps": ("--steps", click.IntRange(1), "Optimiser steps."),
    "batch": ("--batch-size", click.IntRange(2), "Frames, or pairs of frames, in each step."),
    "learning_rate": ("--lr", float, "Peak learning rate."),
    "seed": ("--seed", click.IntRange(0), "Of weights and batches."),
    "max_lag": ("--max-lag", click.IntRange(1), "Positives are 1 to this many env steps apart (tcn)."),
    "spread": ("--spread", click.FloatRange(0), "Weight of the term that drives all frames apart (tcn)."),
    "latent": ("--latent", click.IntRange(1), "Channels of the latent (vae, beta-vae, vfm-vae)."),
    "beta": ("--beta", click.FloatRange(0), "Weight of the KL divergence (vae, beta-vae)."),
    "free_bits": ("--free-bits", click.FloatRange(0), "Of the KL divergence, for each latent channel (vae)."),
    "foreground": ("--foreground/--whole-image", bool, "Subtract the mean frame first (vae, beta-vae)."),
    "decoder": ("--decoder", click.Choice(["tokens", "pixels"]), "What is reconstructed (dino-tok, vfm-vae)."),
    "shallow": ("--shallow", click.IntRange(1), "Channels of the shallow branch (dino-tok)."),
    "codes": ("--codes", click.IntRange(2), "Entries of each codebook (dino-tok-vq)."),
    "variance": ("--variance", click.FloatRange(0, 1), "That the kept components explain (dino-tok-vq)."),
    "kl": ("--kl", click.FloatRange(0), "Weight of the KL divergence (vfm-vae)."),
    "align": ("--align", click.FloatRange(0), "Weight of the alignment with the last layer (vfm-vae)."),
    "dim": ("--dim", click.IntRange(1), "Components (pca)."),
}
"""Options of the fits: field -> flag, type, help. What is not given is the encoder's own default; what it does not have is refused."""

fit_flags = options(
    *(click.option(flag, f"fit_{name}", type=kind, default=None, help=text) for name, (flag, kind, text) in FIT.items())
)


@click.command(cls=Command)
@dataset_option
@click.option("--encoder", "name", default="tcn", help="An encoder that can be fitted.")
@fit_flags
@click.option("--cache", type=PATH, help="For an adapter: the store of its base's layers.  [default: made if need be]")
@click.option("--base", help="For an adapter: the encoder of that store.  [default: the adapter's own]")
@click.option("--base-weights", type=PATH, help="For an adapter: the base's weights.  [default: as extract finds them]")
@click.option("--max-frames", type=click.IntRange(1), default=50_000, help="Frames to train on.")
@click.option("--overwrite", is_flag=True, help="Replace the weights of another fit.")
@device_option
@click.option(
    "--out", type=PATH, help="File to write.  [default: $WMCACHE_HOME/encoders/<dataset>-<encoder>.safetensors]"
)
def fit(
    dataset: Path | None,
    name: str,
    cache: Path | None,
    base: str | None,
    base_weights: Path | None,
    out: Path | None,
    **settings: Any,
) -> None:
    """Fit an encoder on the dataset's own frames, or an adapter on a store, and measure its latent landscape."""
    from wmcache.cache.store import TokenStore
    from wmcache.pipeline import encoders
    from wmcache.pipeline.fit import default_weights, fit_adapter
    from wmcache.pipeline.fit import fit as run

    given = {field: value for field in FIT if (value := settings.pop(f"fit_{field}")) is not None}
    chosen, entry = encoders.fit_options(name, given), encoders.get_entry(name)
    if entry.load is not None:
        if cache or base or base_weights:
            raise UserError(f"encoder {name} is fitted on frames, not on a store; leave out --cache and --base")
        frames = open_dataset(dataset)
        out = out or default_weights(frames.card.name, name)
        result = run(frames, name, out, chosen, **settings)
    else:
        if cache and base:
            raise UserError("--cache says which store the adapter is fitted on; leave out --base")
        frames = None if cache and dataset is None and not chosen.needs_images else open_dataset(dataset)
        if cache is None:
            cache = _layers_store(frames, base or entry.base, base_weights, settings["device"])
        store = TokenStore.open(cache)
        out = out or default_weights(str(store.card.dataset["name"]), name)
        result = fit_adapter(store, name, out, chosen, dataset=frames, base_weights=base_weights, **settings)
    click.echo(f"{result.weights}: fitted on {result.frames} frames")
    if (landscape := result.landscape) is None:
        click.echo("the landscape is not measured: without frames of a maze their true distances are not known")
        return
    click.echo(
        f"Spearman correlation of squared token distance and geodesic distance, held-out episodes: {landscape.spearman:.3f}"
    )
    click.echo(f"held-out frames from which descending that distance gets stuck: {landscape.stuck:.1%}")


def _layers_store(frames: Any, base: str, weights: Path | None, device: str) -> Path:
    """The store of an adapter's base at its usual place, extracted where it is not there yet."""
    from wmcache.pipeline.extract import default_store
    from wmcache.pipeline.extract import extract as run

    (encoder,) = create_encoders(
        frames.card.name, names=base, weights=(str(weights),) if weights else (), device=device
    )
    out: Path = default_store(frames.card.name, encoder)
    run(frames, encoder, out)
    return out


@click.command(cls=Command)
@dataset_option
@encoder_options
@click.option(
    "--out",
    type=PATH,
    help="The store, or of several the folder.  [default: $WMCACHE_HOME/stores/<dataset>/<encoder>-<image size>.zarr]",
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
    """Encode every frame of a dataset once, several encoders in one pass. Run again, or beside itself, it does what is missing."""
    from wmcache.pipeline.extract import default_store, extract_together, forecast

    frames = open_dataset(dataset)
    networks = create_encoders(frames.card.name, **encoder)
    places = [default_store(frames.card.name, network, store_dtype) for network in networks]
    if out is not None:
        places = [out] if len(networks) == 1 else [out / place.name for place in places]
    stores = list(zip(networks, places, strict=True))
    if dry_run:
        for network, place in stores:
            plan = forecast(frames, network, place, dtype=store_dtype, batch=batch, workers=workers)
            click.echo(f"{plan.out}: {plan.shards} shards, {plan.frames} frames to do")
            click.echo(
                f"{human_bytes(plan.bytes_needed)} needed, {human_bytes(plan.bytes_free)} free, about {plan.seconds:.0f} s"
            )
        return
    extract_together(frames, stores, dtype=store_dtype, batch=batch, workers=workers)
    for network, place in stores:
        rows, columns = network.token_grid
        click.echo(f"{place}: {frames.card.frames} frames, {rows} x {columns} tokens of {network.token_dim}")


@click.command(cls=Command)
@click.argument("store", type=PATH)
@click.option("--encoder", "name", required=True, help="On the same backbone: dinov2-cls, dinov2-pooled, an adapter, …")
@click.option("--weights", type=PATH, help="The encoder's.  [default: the store's, or those fitted on its dataset]")
@click.option("--base-weights", type=PATH, help="Of an adapter's base, if they have moved.")
@click.option("--out", type=PATH, help="The new store.  [default: where extract would put it]")
@click.option("--store-dtype", type=click.Choice(["float16", "int8"]), default="float16", help="As for extract.")
@device_option
def derive(
    store: Path,
    name: str,
    weights: Path | None,
    base_weights: Path | None,
    out: Path | None,
    store_dtype: str,
    device: str,
) -> None:
    """Make other tokens of those in STORE, without an image: the class token, means, adapters. Run again, it goes on."""
    from wmcache.cache.store import TokenStore
    from wmcache.pipeline.derive import create_for
    from wmcache.pipeline.derive import derive as run
    from wmcache.pipeline.extract import default_store

    source = TokenStore.open(store)
    encoder = create_for(source, name, weights=weights, base_weights=base_weights, device=device)
    out = out or default_store(str(source.card.dataset["name"]), encoder, store_dtype)
    run(source, encoder, out, dtype=store_dtype)
    rows, columns = encoder.token_grid
    click.echo(f"{out}: {len(source)} frames, {rows} x {columns} tokens of {encoder.token_dim}, derived from {store}")


@click.command(cls=Command)
@json_option
def encoders(as_json: bool) -> None:
    """List the known encoders."""
    from wmcache.pipeline.encoders import get_entry, specs

    rows = [
        {**asdict(spec), "token_grid": spec.token_grid, "fitted": get_entry(spec.name).fit is not None}
        for spec in specs()
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    click.echo(f"{'name':22} {'tokens':>8} {'dim':>5} {'input':>7}  summary; source; licence")
    for row in rows:
        grid = "{} x {}".format(*row["token_grid"])
        known = "; ".join(filter(None, (row["summary"], row["source"], row["licence"])))
        click.echo(f"{row['name']:22} {grid:>8} {row['token_dim']:>5} {row['image_size']:>4} px  {known}")
