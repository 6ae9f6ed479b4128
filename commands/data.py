"""wmcache collect, import, fit, extract, derive, encoders: from the world, or from others, to tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click

from wmcache.commands.command import Command, Group, take_chosen
from wmcache.commands.options import ByName, Option, make_options, options_of
from wmcache.commands.output import print_json, say
from wmcache.commands.shared import (
    ANY_PATH,
    PATH,
    base_weights_option,
    cluster_option,
    dataset_option,
    device_option,
    encoder_options,
    json_option,
    moved_dataset_option,
    store_argument,
    store_dtype_option,
)
from wmcache.common.errors import UserError, command
from wmcache.common.folders import home
from wmcache.common.paths import AnyPath
from wmcache.common.space import human_bytes
from wmcache.pipeline.options import CollectOptions

ALREADY = " (already complete)"


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


@click.command(cls=Command)
@options_of(CollectOptions)
@cluster_option("local")
@click.option("--out", type=ANY_PATH, help="Folder of the dataset.  [default: $WMCACHE_HOME/pointmaze-<maze>]")
def collect(env: str, out: AnyPath | None, **settings: Any) -> None:
    """Collect a dataset of frames. Run again, it goes on where it stopped."""
    from wmcache.envs import find_maze
    from wmcache.pipeline.collect import collect as run

    try:
        maze = find_maze(env)
    except UserError as error:
        raise UserError(f"--env: {error}; for frames of other environments: wmcache import frames") from error
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
        paths = {name: {"type": PATH} for name in kind.local}
        params: list[click.Parameter] = [
            click.Argument(["source"], metavar=kind.metavar, type=PATH if "source" in kind.local else str),
            *make_options(kind, without=("source",), **paths),
            click.Option(["--out"], type=ANY_PATH, required=True, help="Folder of the dataset."),
            *make_options(CollectOptions, only=("frames_per_shard",)),
        ]
        return Command(cmd_name, callback=partial(_import, kind), params=params, help=kind.__doc__)


def _import(kind: Any, source: str | Path, out: AnyPath, frames_per_shard: int, **settings: Any) -> None:
    from wmcache.pipeline.importers import write_dataset

    settings = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    importer = kind(str(source), **settings)
    _make_dataset(out, lambda: write_dataset(importer.open(), out, frames_per_shard=frames_per_shard))


@click.group("import", cls=_Imports)
def import_() -> None:
    """Make a dataset of other people's frames. Run again, it continues where it stopped."""


def _fits() -> Iterable[str]:
    from wmcache.pipeline.encoders import get_entry, specs

    return [spec.name for spec in specs() if get_entry(spec.name).fit is not None]


def _fit_options(name: str) -> type:
    from wmcache.pipeline.encoders import get_fit

    return get_fit(name)[0]


@click.command(cls=Command, by=ByName("encoder", "encoder", names=_fits, options=_fit_options))
@dataset_option
@click.option("--encoder", cls=Option, names=_fits, default="tcn", help="Encoder to fit: {names}.")
@click.option(
    "--cache", type=ANY_PATH, help="For an adapter: the store of its base's layers.  [default: made if it is missing]"
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
    encoder: str,
    cluster: str,
    device: str,
    max_frames: int,
    overwrite: bool,
    base_weights: Path | None,
    **settings: Any,
) -> None:
    """Fit an encoder on the dataset's own frames, or an adapter on a store, and measure its latent landscape."""
    from wmcache.pipeline.fit_job import prepare_fit

    given = take_chosen(settings, given=True)
    job = prepare_fit(encoder, given, device=device, cluster=cluster, base_weights=base_weights, **settings)
    already = job.out.exists() and not overwrite
    adapter = {} if job.store is None else {"base_weights": base_weights and base_weights.absolute()}
    result = job.run(cluster, max_frames=max_frames, device=device, overwrite=overwrite, **adapter)
    say(f"{result.weights}: fitted on {result.frames} frames{ALREADY if already else ''}")
    if (landscape := result.landscape) is None:
        click.echo(f"the landscape is not measured: {job.unmeasured}")
        return
    rank = "none, all distances are equal" if landscape.spearman is None else f"{landscape.spearman:.3f}"
    click.echo(f"Spearman correlation of squared token distance and geodesic distance, held-out episodes: {rank}")
    click.echo(f"held-out frames from which descending that distance gets stuck: {landscape.stuck:.1%}")


@click.command(cls=Command)
@dataset_option
@encoder_options
@click.option(
    "--out",
    type=ANY_PATH,
    help="The store, or the folder of several stores.  [default: $WMCACHE_HOME/stores/<dataset>/<encoder>-<image size>.zarr]",
)
@store_dtype_option
@click.option(
    "--shard-slice",
    "part",
    callback=_read_slice,
    default="0/1",
    metavar="I/N",
    help="Do the I-th (from 0) of N slices of the shards, for batch arrays; wmcache finalize, or the last slice, completes the store.",
)
@click.option(
    "--change-maps",
    type=click.IntRange(1),
    is_flag=False,
    flag_value=5,
    metavar="[FRAMESKIP]",
    help="Also make the change maps of pairs of frames so many env steps apart (5); or later, with: wmcache derive change-maps.",
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
    from wmcache.pipeline.fit_job import open_dataset
    from wmcache.pipeline.stores import create_encoders, default_store

    frames = open_dataset(dataset)
    networks = create_encoders(frames.card.name, **encoder)
    paths: list[AnyPath] = [default_store(frames.card.name, network, store_dtype) for network in networks]
    if out is not None:
        paths = [out] if len(networks) == 1 else [out / path.name for path in paths]
    stores = list(zip(networks, paths, strict=True))
    if change_maps:
        from wmcache.cache.change_maps import change_maps_path
        from wmcache.pipeline.encoders.changes import changes_for

        stores += [
            (changes_for(network.token_grid, change_maps, device="cpu"), change_maps_path(path, change_maps))
            for network, path in stores
        ]
    if dry_run:
        for network, path in stores:
            plan = forecast(frames, network, path, dtype=store_dtype, batch=batch, cluster=cluster, part=part)
            say(f"{plan.out}: {plan.shards} shards, {plan.frames} frames to do")
            free = "" if plan.bytes_free is None else f"{human_bytes(plan.bytes_free)} free, "
            workers = parse_cluster(cluster).workers
            whose = "" if workers == 1 else f" of {workers or 'a single'} workers like this process"
            click.echo(f"{human_bytes(plan.bytes_needed)} needed, {free}about {plan.seconds:.0f} s{whose}")
        return
    device = encoder["device"]
    done = extract_together(frames, stores, dtype=store_dtype, batch=batch, cluster=cluster, device=device, part=part)
    for (network, path), (worked, shards) in zip(stores, done, strict=True):
        rows, columns = network.token_grid
        if shards:
            count = -(-frames.card.frames // frames.card.frames_per_shard)
            say(
                f"{path}: slice {part[0]} of {part[1]} is done, {len(shards)} of {count} shards of other slices are not done yet; "
                f"the last slice completes the store, or: {command('wmcache', 'finalize', path)}"
            )
        else:
            state = "" if worked else ALREADY
            say(f"{path}: {frames.card.frames} frames, {rows} x {columns} tokens of {network.token_dim}{state}")


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
@store_argument
@click.option(
    "--frameskip",
    type=click.IntRange(1),
    default=5,
    help="Env steps between the frames that are compared; the same as wmtrain's --frameskip.",
)
@moved_dataset_option
@cluster_option()
def derive_change_maps(store: AnyPath, frameskip: int, dataset: AnyPath | None, cluster: str) -> None:
    """Make change maps: which of 2 x 2 cells of each patch have changed from frame to frame. Run again, it goes on."""
    from wmcache.cache.change_maps import change_maps_path
    from wmcache.cache.store import TokenStore
    from wmcache.pipeline.derive import derive_change_maps as run
    from wmcache.pipeline.stores import is_complete

    source = TokenStore.open(store)
    state = ALREADY if is_complete(change_maps_path(source.path, frameskip)) else ""
    out = run(source, frameskip, dataset=dataset, cluster=cluster)
    rows, columns = source.card.token_grid
    say(f"{out}: {len(source)} frames, {2 * rows} x {2 * columns} cells, since {frameskip} env steps before{state}")


@derive.command("tokens")
@store_argument
@click.option(
    "--encoder", "name", required=True, help="Encoder on the same backbone: dinov2-cls, dinov2-pooled, an adapter, …"
)
@click.option(
    "--weights", type=PATH, help="Weights of the encoder.  [default: the store's, or those fitted on its dataset]"
)
@base_weights_option
@click.option("--out", type=ANY_PATH, help="The new store.  [default: where extract would put it]")
@store_dtype_option
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
