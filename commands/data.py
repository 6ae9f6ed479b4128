"""wmcache collect, import, fit, extract, derive, encoders: from the world, or from others, to tokens."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import MISSING, asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from wmcache.commands.shared import (
    ANY_PATH,
    PATH,
    Command,
    Group,
    cluster_option,
    create_encoders,
    dataset_option,
    device_option,
    encoder_options,
    json_option,
    open_dataset,
    options,
    print_json,
    say,
)
from wmcache.common.errors import UserError, command
from wmcache.common.folders import home
from wmcache.common.options import Declared, declared
from wmcache.common.paths import AnyPath, absolute
from wmcache.common.space import human_bytes


def _read_slice(ctx: click.Context, parameter: click.Parameter, value: str) -> tuple[int, int]:  # noqa: ARG001 (click's signature)
    """`I/N` -> (I, N), the I-th (from 0) of N slices."""
    found = re.fullmatch("([0-9]{1,9})/([1-9][0-9]{0,8})", value)
    if found is None:
        raise click.ClickException(f"--shard-slice {value!r} is no slice; write I/N, as in 0/8 for the first of 8")
    number, count = map(int, found.groups())
    if number >= count:
        raise click.ClickException(
            f"--shard-slice {value}: the slices of {count} are numbered from 0 to {count - 1}; a job array has to begin at 0, "
            f"as in sbatch --array=0-{max(0, count - 1)}"
        )
    return number, count


ALREADY = " (already complete)"
DEFAULT_ENV = "wmcache/PointMaze-UMaze-v0"
frames_per_shard_option = click.option(
    "--frames-per-shard",
    type=click.IntRange(1),
    default=512,
    help="Frames in each tar, and in each Zarr shard made from it.",
)


@click.command(cls=Command)
@click.option("--env", default=DEFAULT_ENV, help="Environment id, layout name (UMaze), or a .txt grid.")
@click.option("--episodes", type=click.IntRange(1), default=2000, help="Episodes to collect; DINO-WM has 2000.")
@click.option("--length", type=click.IntRange(1), default=100, help="Frames in each episode.")
@click.option("--policy", default="random", help="Behaviour policy: random (DINO-WM) or held.")
@click.option(
    "--seed", type=click.IntRange(0), default=0, help="Seed of the dataset; the same seed gives the same bytes."
)
@click.option("--image-size", type=click.IntRange(8, 2048), default=224, help="Side of the frames in pixels.")
@frames_per_shard_option
@cluster_option("local")
@click.option("--out", type=ANY_PATH, help="Folder of the dataset.  [default: $WMCACHE_HOME/pointmaze-<maze>]")
def collect(env: str, out: AnyPath | None, **settings: Any) -> None:
    """Collect a dataset of frames. Run again, it goes on where it stopped."""
    from wmcache.envs import MazeError, find_maze
    from wmcache.pipeline.collect import collect as run

    try:
        maze = find_maze(env)
    except MazeError as error:
        raise UserError(f"--env {env!r}: {error}; for frames of other environments: wmcache import frames") from error
    out = out or home() / f"pointmaze-{maze.name.lower()}"
    _make_dataset(out, partial(run, env, out, **settings))


def _make_dataset(out: AnyPath, make: Callable[[], Any]) -> None:
    """Make a dataset, or finish it, and print what it is."""
    from wmcache.pipeline.frames import is_complete

    already = is_complete(out)
    card = make()
    size = sum(shard["bytes"] for shard in card.shards)
    state = ALREADY if already else ""
    say(f"{out}: {card.episodes} episodes, {card.frames} frames, {len(card.shards)} shards, {human_bytes(size)}{state}")
    click.echo(f"fingerprint {card.fingerprint}")


class _Imports(Group):
    """A command for each registered import format, made when it is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 (click's signature)
        from wmcache.pipeline.importers import IMPORTERS

        return list(IMPORTERS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        from wmcache.pipeline.importers import IMPORTERS

        try:
            kind: Any = IMPORTERS.get(cmd_name)
        except UserError as error:
            ctx.fail(str(error))
        params: list[click.Parameter] = [
            click.Argument(["source"], metavar=kind.metavar, type=PATH if "source" in kind.local else str),
            *(
                _field_option(known, local=known.name in kind.local)
                for known in declared(kind)
                if known.name != "source"
            ),
            click.Option(["--out"], type=ANY_PATH, required=True, help="Folder of the dataset."),
        ]
        command = Command(cmd_name, callback=partial(_import, kind), params=params, help=kind.__doc__)
        return frames_per_shard_option(command)


def _field_option(known: Declared, *, local: bool) -> click.Option:
    kind: Any = PATH if local else click.Choice(known.choices) if known.choices else known.kind
    if kind is int:
        bounds: dict[str, Any] = {"min": known.least, "max": known.most}
        kind = click.IntRange(**bounds)
    default: dict[str, Any] = {"required": True} if known.default is MISSING else {"default": known.default}
    return click.Option([known.flag, known.name], type=kind, help=known.help, **default)


def _import(kind: Any, source: str | Path, out: AnyPath, frames_per_shard: int, **settings: Any) -> None:
    from wmcache.pipeline.importers import write_dataset

    settings = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    importer = kind(str(source), **settings)
    _make_dataset(out, lambda: write_dataset(importer.open(), out, frames_per_shard=frames_per_shard))


@click.group("import", cls=_Imports)
def import_() -> None:
    """Make a dataset of other people's frames. Run again, it continues where it stopped."""


FIT = {
    "steps": ("--steps", click.IntRange(1), "Optimiser steps."),
    "batch": ("--batch-size", click.IntRange(2), "Frames, or pairs of frames, in each step."),
    "learning_rate": ("--lr", float, "Peak learning rate."),
    "seed": ("--seed", click.IntRange(0), "Seed of weights and batches."),
    "max_lag": ("--max-lag", click.IntRange(1), "Positives are 1 to this many env steps apart (tcn)."),
    "spread": ("--spread", click.FloatRange(0), "Weight of the term that drives all frames apart (tcn)."),
    "latent": ("--latent", click.IntRange(1), "Channels of the latent (vae, beta-vae, vfm-vae)."),
    "beta": ("--beta", click.FloatRange(0), "Weight of the KL divergence (vae, beta-vae)."),
    "free_bits": ("--free-bits", click.FloatRange(0), "Free bits of the KL divergence for each latent channel (vae)."),
    "foreground": ("--foreground/--whole-image", bool, "Subtract the mean frame first (vae, beta-vae)."),
    "decoder": ("--decoder", click.Choice(["tokens", "pixels"]), "What is reconstructed (dino-tok, vfm-vae)."),
    "shallow": ("--shallow", click.IntRange(1), "Channels of the shallow branch (dino-tok)."),
    "codes": ("--codes", click.IntRange(2), "Entries of each codebook (dino-tok-vq)."),
    "variance": (
        "--variance",
        click.FloatRange(0, 1),
        "Share of the variance that the kept components explain (dino-tok-vq).",
    ),
    "kl": ("--kl", click.FloatRange(0), "Weight of the KL divergence (vfm-vae)."),
    "align": ("--align", click.FloatRange(0), "Weight of the alignment with the last layer (vfm-vae)."),
    "dim": ("--dim", click.IntRange(1), "Principal components to keep (pca)."),
}
"""Options of the fits: field -> flag, type, help. What is not given is the encoder's own default; what it does not have is refused."""

fit_flags = options(
    *(click.option(flag, f"fit_{name}", type=kind, default=None, help=text) for name, (flag, kind, text) in FIT.items())
)


@click.command(cls=Command)
@dataset_option
@click.option("--encoder", "name", default="tcn", help="Encoder to fit; see: wmcache encoders.")
@fit_flags
@click.option(
    "--cache", type=ANY_PATH, help="For an adapter: the store of its base's layers.  [default: made if need be]"
)
@click.option("--base", help="For an adapter: the encoder of that store.  [default: the adapter's own]")
@click.option("--base-weights", type=PATH, help="For an adapter: the base's weights.  [default: as extract finds them]")
@click.option("--max-frames", type=click.IntRange(1), default=50_000, help="Frames to train on.")
@click.option("--overwrite", is_flag=True, help="Replace the weights of another fit.")
@device_option
@cluster_option()
@click.option(
    "--out", type=PATH, help="File to write.  [default: $WMCACHE_HOME/encoders/<dataset>-<encoder>.safetensors]"
)
def fit(
    dataset: AnyPath | None,
    name: str,
    cache: AnyPath | None,
    base: str | None,
    base_weights: Path | None,
    out: Path | None,
    cluster: str,
    **settings: Any,
) -> None:
    """Fit an encoder on the dataset's own frames, or an adapter on a store, and measure its latent landscape."""
    from wmcache.cache.store import TokenStore
    from wmcache.cluster.tasks import run_alone
    from wmcache.pipeline import encoders
    from wmcache.pipeline.fit import default_weights

    given = {field: value for field in FIT if (value := settings.pop(f"fit_{field}")) is not None}
    chosen, entry = encoders.fit_options(name, given), encoders.get_entry(name)
    if entry.load is not None:
        if cache or base or base_weights:
            raise UserError(f"encoder {name} is fitted on frames, not on a store; leave out --cache and --base")
        frames = open_dataset(dataset)
        out = out or default_weights(frames.card.name, name)
        store = None
    else:
        if cache and base:
            raise UserError("--cache says which store the adapter is fitted on; leave out --base")
        frames = None if cache and dataset is None and not chosen.needs_images else open_dataset(dataset)
        if cache is None:
            cache = _layers_store(frames, base or entry.base, base_weights, settings["device"], cluster)
        store = TokenStore.open(cache)
        frames = frames or _frames_of(store)
        out = out or default_weights(str(store.card.dataset["name"]), name)
        settings["base_weights"] = base_weights and base_weights.absolute()
    places = [None if found is None else absolute(found.path) for found in (frames, store)]
    task = partial(_fit, *places, name=name, out=out.absolute(), options=chosen, **settings)
    already = out.exists() and not settings["overwrite"]
    result = replace(run_alone(task, cluster=cluster, label=f"fit {name}"), weights=out)
    say(f"{result.weights}: fitted on {result.frames} frames{ALREADY if already else ''}")
    if (landscape := result.landscape) is None:
        reason = f"{frames.path} shows no maze, so the true distances are not known" if frames is not None else ""
        if store is not None and frames is None:
            reason = f"the frames of {store.path} are not at {store.card.dataset.get('path')}; name their place with --dataset"
        click.echo(f"the landscape is not measured: {reason}")
        return
    rank = "none, all distances are equal" if landscape.spearman is None else f"{landscape.spearman:.3f}"
    click.echo(f"Spearman correlation of squared token distance and geodesic distance, held-out episodes: {rank}")
    click.echo(f"held-out frames from which descending that distance gets stuck: {landscape.stuck:.1%}")


def _frames_of(store: Any) -> Any:
    """The frames of a store, on which a fit is measured; None where they are not where the store says."""
    from wmcache.pipeline.repair import open_frames

    try:
        frames = open_frames(store.card, None)
    except UserError:
        return None
    return frames if frames.card.fingerprint == store.identity.dataset_fingerprint else None


def _fit(dataset: str | None, store: str | None, *, name: str, out: Path, options: Any, **settings: Any) -> Any:
    """The task of a fit: on the frames, or where there is a store on that."""
    from wmcache.cache.store import TokenStore
    from wmcache.common.paths import as_path
    from wmcache.pipeline.fit import fit as run
    from wmcache.pipeline.fit import fit_adapter
    from wmcache.pipeline.frames import FrameDataset

    frames: Any = None if dataset is None else FrameDataset.open(as_path(dataset))
    if store is None:
        return run(frames, name, out, options, **settings)
    return fit_adapter(TokenStore.open(as_path(store)), name, out, options, dataset=frames, **settings)


def _layers_store(frames: Any, base: str, weights: Path | None, device: str, cluster: str) -> AnyPath:
    """The store of an adapter's base at its usual place, extracted where it is not there yet."""
    from wmcache.pipeline.extract import extract_together as run
    from wmcache.pipeline.stores import default_store

    (encoder,) = create_encoders(
        frames.card.name, names=base, weights=(str(weights),) if weights else (), device=device
    )
    out: AnyPath = default_store(frames.card.name, encoder)
    run(frames, [(encoder, out)], cluster=cluster, device=device)
    return out


@click.command(cls=Command)
@dataset_option
@encoder_options
@click.option(
    "--out",
    type=ANY_PATH,
    help="The store, or the folder of several stores.  [default: $WMCACHE_HOME/stores/<dataset>/<encoder>-<image size>.zarr]",
)
@click.option(
    "--store-dtype",
    type=click.Choice(["float16", "int8"]),
    default="float16",
    help="What tokens are stored in; int8 takes half the space, with one scale for each channel of each shard.",
)
@click.option(
    "--shard-slice",
    "part",
    callback=_read_slice,
    default="0/1",
    metavar="I/N",
    help="Do the I-th (from 0) of N slices of the shards, for batch arrays; wmcache finalize, or whoever is last, completes the store.",
)
@click.option(
    "--change-maps",
    type=click.IntRange(1),
    is_flag=False,
    flag_value=5,
    metavar="[FRAMESKIP]",
    help="Also what has changed since so many env steps before (5), which ddp-wm learns from; or later: wmcache derive change-maps.",
)
@click.option("--dry-run", is_flag=True, help="Print what would be done, and stop.")
def extract(
    dataset: AnyPath | None,
    batch: int,
    cluster: str,
    out: AnyPath | None,
    store_dtype: str,
    part: tuple[int, int],
    change_maps: int | None,
    dry_run: bool,
    **encoder: Any,
) -> None:
    """Encode every frame of a dataset once, several encoders in one pass. Run again, or beside itself, it does what is missing."""
    from wmcache.cluster.tasks import parse_cluster
    from wmcache.pipeline.extract import extract_together, forecast
    from wmcache.pipeline.stores import default_store

    frames = open_dataset(dataset)
    networks = create_encoders(frames.card.name, **encoder)
    places: list[AnyPath] = [default_store(frames.card.name, network, store_dtype) for network in networks]
    if out is not None:
        places = [out] if len(networks) == 1 else [out / place.name for place in places]
    stores = list(zip(networks, places, strict=True))
    if change_maps:
        from wmcache.cache.change_maps import change_maps_path
        from wmcache.pipeline.encoders.changes import changes_for

        stores += [
            (changes_for(network.token_grid, change_maps, device="cpu"), change_maps_path(place, change_maps))
            for network, place in stores
        ]
    if dry_run:
        for network, place in stores:
            plan = forecast(frames, network, place, dtype=store_dtype, batch=batch, cluster=cluster, part=part)
            say(f"{plan.out}: {plan.shards} shards, {plan.frames} frames to do")
            free = "" if plan.bytes_free is None else f"{human_bytes(plan.bytes_free)} free, "
            workers = parse_cluster(cluster).workers
            whose = "" if workers == 1 else f" of {workers or 'a single'} workers like this process"
            click.echo(f"{human_bytes(plan.bytes_needed)} needed, {free}about {plan.seconds:.0f} s{whose}")
        return
    device = encoder["device"]
    done = extract_together(frames, stores, dtype=store_dtype, batch=batch, cluster=cluster, device=device, part=part)
    for (network, place), (worked, shards) in zip(stores, done, strict=True):
        rows, columns = network.token_grid
        if shards:
            count = -(-frames.card.frames // frames.card.frames_per_shard)
            say(
                f"{place}: slice {part[0]} of {part[1]} is done, {len(shards)} of {count} shards are other slices' and not done yet; "
                f"whoever is last completes the store, or: {command('wmcache', 'finalize', place)}"
            )
        else:
            state = "" if worked else ALREADY
            say(f"{place}: {frames.card.frames} frames, {rows} x {columns} tokens of {network.token_dim}{state}")


class _Derive(Group):
    """A group whose first word may be left out: `wmcache derive STORE …` makes tokens."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["tokens", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_Derive)
def derive() -> None:
    """Make other stores of STORE; `wmcache derive STORE …` is short for `wmcache derive tokens STORE …`."""


@derive.command("change-maps")
@click.argument("store", type=ANY_PATH)
@click.option(
    "--frameskip",
    type=click.IntRange(1),
    default=5,
    help="Env steps between the frames that are compared; the same as wmtrain's --frameskip.",
)
@click.option("--dataset", type=ANY_PATH, help="Where the frames are, if they have moved.")
@cluster_option()
def derive_change_maps(store: AnyPath, frameskip: int, dataset: AnyPath | None, cluster: str) -> None:
    """Make what has changed from frame to frame, 2 x 2 cells a patch, which ddp-wm learns from. Run again, it goes on."""
    from wmcache.cache.change_maps import change_maps_path
    from wmcache.cache.store import TokenStore
    from wmcache.pipeline.change_maps import derive_change_maps as run
    from wmcache.pipeline.stores import is_complete

    source = TokenStore.open(store)
    state = ALREADY if is_complete(change_maps_path(source.path, frameskip)) else ""
    out = run(source, frameskip, dataset=dataset, cluster=cluster)
    rows, columns = source.card.token_grid
    say(f"{out}: {len(source)} frames, {2 * rows} x {2 * columns} cells, since {frameskip} env steps before{state}")


@derive.command("tokens")
@click.argument("store", type=ANY_PATH)
@click.option(
    "--encoder", "name", required=True, help="Encoder on the same backbone: dinov2-cls, dinov2-pooled, an adapter, …"
)
@click.option(
    "--weights", type=PATH, help="Weights of the encoder.  [default: the store's, or those fitted on its dataset]"
)
@click.option("--base-weights", type=PATH, help="Weights of an adapter's base encoder, if they have moved.")
@click.option("--out", type=ANY_PATH, help="The new store.  [default: where extract would put it]")
@click.option(
    "--store-dtype",
    type=click.Choice(["float16", "int8"]),
    default="float16",
    help="What tokens are stored in; int8 takes half the space.",
)
@device_option
@cluster_option()
def derive_tokens(
    store: AnyPath,
    name: str,
    weights: Path | None,
    base_weights: Path | None,
    out: AnyPath | None,
    store_dtype: str,
    device: str,
    cluster: str,
) -> None:
    """Make other tokens of those in STORE, without an image: the class token, means, adapters. Run again, it goes on."""
    from wmcache.cache.store import TokenStore
    from wmcache.pipeline.derive import create_for
    from wmcache.pipeline.derive import derive as run
    from wmcache.pipeline.stores import default_store

    source = TokenStore.open(store)
    encoder = create_for(source, name, weights=weights, base_weights=base_weights, device=device)
    out = out or default_store(str(source.card.dataset["name"]), encoder, store_dtype)
    state = "" if run(source, encoder, out, dtype=store_dtype, cluster=cluster, device=device) else ALREADY
    rows, columns = encoder.token_grid
    say(f"{out}: {len(source)} frames, {rows} x {columns} tokens of {encoder.token_dim}, derived from {store}{state}")


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
        print_json(rows)
        return
    click.echo(f"{'name':22} {'tokens':>8} {'dim':>5} {'input':>7}  summary; source; licence")
    for row in rows:
        grid = "{} x {}".format(*row["token_grid"])
        known = "; ".join(filter(None, (row["summary"], row["source"], row["licence"])))
        click.echo(f"{row['name']:22} {grid:>8} {row['token_dim']:>5} {row['image_size']:>4} px  {known}")
