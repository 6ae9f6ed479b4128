"""wmcache collect, import, fit, extract, derive, encoders, weights: from the world, or from others, to tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

import click

from wmcache.commands import shared
from wmcache.commands.command import Command, Group, take_chosen
from wmcache.commands.options import ByName, make_options, options_of
from wmcache.commands.output import say, show
from wmcache.common.errors import UserError, command
from wmcache.common.folders import home
from wmcache.common.paths import AnyPath
from wmcache.common.space import human_bytes
from wmcache.pipeline.options import CollectOptions, DistractOptions, FitJobOptions

if TYPE_CHECKING:
    from wmcache.pipeline.encoders import Encoder
    from wmcache.pipeline.frames import FrameDataset

ALREADY = " (already complete)"


def _read_slice(ctx: click.Context, parameter: click.Parameter, value: str) -> tuple[int, int]:  # noqa: ARG001 (click's signature)
    """`I/N` -> (I, N), the I-th (from 0) of N slices."""
    found = re.fullmatch("([0-9]{1,9})/([1-9][0-9]{0,8})", value)
    if found is None or int(found[1]) >= int(found[2]):
        raise UserError(f"--shard-slice {value!r} is not a slice; write I/N, 0/8 to 7/8 for the 8 jobs of --array=0-7")
    return int(found[1]), int(found[2])


@click.command(cls=Command)
@options_of(CollectOptions)
@options_of(DistractOptions)
@shared.cluster_option("local")
@shared.path_option("--out", help="Folder of the dataset.  [default: $WMCACHE_HOME/<environment>]")
def collect(env: str, out: AnyPath | None, distract: str | None, distract_seed: int, **settings: Any) -> None:
    """Collect a dataset of frames. Run again, it goes on where it stopped."""
    from wmcache.planner.collect import choose_env
    from wmcache.planner.collect import collect as run

    env, name = choose_env(env, distract, distract_seed)
    out = out or home() / name
    _make_dataset(out, partial(run, env, out, **settings))


def _make_dataset(out: AnyPath, make: Callable[[], Any]) -> None:
    from wmcache.pipeline.frames import is_complete

    already = is_complete(out)
    card = make()
    size = sum(shard["bytes"] for shard in card.shards)
    counts = f"{card.episodes} episodes, {card.frames} frames, {len(card.shards)} shards, {human_bytes(size)}"
    say(f"{out}: {counts}{ALREADY if already else ''}")
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
        options = make_options(kind, **{name: {"type": shared.PATH} for name in kind.local})
        params: list[click.Parameter] = [
            click.Argument(["source"], metavar=kind.metavar, type=shared.PATH if "source" in kind.local else str),
            *(option for option in options if option.field != "source"),
            click.Option(["--out"], type=shared.ANY_PATH, required=True, help="Folder of the dataset."),
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
    """Import frames from files, or from a dataset of another project. Run again, it continues where it stopped."""


_fits = partial(resolve_name, "wmcache.pipeline.encoders.registry:FITS")
FIT = ByName("encoder", "encoder", _fits, lambda name: resolve_name("wmcache.pipeline.encoders:get_fit")(name)[0])


@click.command(cls=Command, by=FIT)
@shared.path_option(
    "--dataset",
    "datasets",
    multiple=True,
    help="Frame dataset; repeat it to fit on several, of which the first is measured.  [default: $WMCACHE_HOME/pointmaze-umaze]",
)
@options_of(FitJobOptions, encoder={"names": _fits})
@shared.path_option(
    "--cache", help="For an adapter: a store of its base, see: wmcache encoders.  [default: made if it is missing]"
)
@shared.file_option("--base-weights", help="For an adapter: the base's weights.  [default: as extract finds them]")
@shared.cluster_option()
@shared.file_option("--out", help="File to write.  [default: $WMCACHE_HOME/encoders/<dataset>-<encoder>.safetensors]")
def fit(
    encoder: str, datasets: tuple[AnyPath, ...], cluster: str, max_frames: int, overwrite: bool, **settings: Any
) -> None:
    """Fit an encoder on frames, or an adapter on a store, and measure whether descending the latent distance reaches goals."""
    from wmcache.pipeline.fit import prepare_fit

    given = take_chosen(settings, given=True)
    dataset = datasets[0] if datasets else None
    job = prepare_fit(encoder, given, dataset=dataset, more=datasets[1:], cluster=cluster, **settings)
    already = job.out.exists() and not overwrite
    where = {name: settings[name] for name in ("device", "base_weights")}
    result = job.run(cluster, max_frames=max_frames, overwrite=overwrite, **where)
    say(f"{job.out}: fitted on {result.frames} frames{ALREADY if already else ''}")
    if (landscape := result.landscape) is None:
        click.echo(f"the landscape is not measured: {job.unmeasured}")
        return
    rank = "none" if landscape.spearman is None else f"{landscape.spearman:.3f}"
    click.echo(f"Spearman correlation of squared token distance and geodesic distance, held-out episodes: {rank}")
    click.echo(f"held-out frames from which descending that distance gets stuck: {landscape.stuck:.1%}")


@click.command(cls=Command)
@shared.dataset_option
@shared.encoder_options
@shared.path_option(
    "--out",
    help="The store, or the folder of several stores.  [default: $WMCACHE_HOME/stores/<dataset>/<encoder>-<image size>.zarr]",
)
@shared.store_dtype_option
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
    "frameskip",
    type=click.IntRange(1),
    is_flag=False,
    flag_value=5,
    metavar="[FRAMESKIP]",
    help="Also make the change maps of pairs of frames so many env steps apart (5); or later, with: wmcache derive change-maps.",
)
@click.option("--dry-run", is_flag=True, help="Print what would be done, and stop.")
def extract(
    dataset: AnyPath | None, out: AnyPath | None, frameskip: int | None, dry_run: bool, part: Any, **encoder: Any
) -> None:
    """Encode every frame of a dataset once, several encoders in one pass. Run again, or beside itself, it does what is missing."""
    from wmcache.pipeline.extract import choose_stores, extract_together
    from wmcache.pipeline.fit import open_inputs

    settings: dict[str, Any] = {name: encoder.pop(name) for name in ("batch", "cluster")}
    settings |= {"dtype": encoder.pop("store_dtype"), "part": part}
    frames, networks = open_inputs(dataset, encoder)
    stores = choose_stores(frames, networks, out, dtype=settings["dtype"], change_maps=frameskip)
    if dry_run:
        _forecast(frames, stores, settings)
        return
    done = extract_together(frames, stores, device=encoder["device"], **settings)
    for (network, path), (worked, missing) in zip(stores, done, strict=True):
        if missing:
            slices = f"slice {part[0]} of {part[1]} is done, {len(missing)} shards of other slices are not"
            say(f"{path}: {slices}; the last slice completes the store, or: {command('wmcache', 'finalize', path)}")
        else:
            say(f"{path}: {_size(frames.card.frames, network)}{'' if worked else ALREADY}")


def _forecast(frames: FrameDataset, stores: list[tuple[Encoder, AnyPath]], settings: dict[str, Any]) -> None:
    from wmcache.cluster.tasks import parse_cluster
    from wmcache.pipeline.extract import forecast

    workers = parse_cluster(settings["cluster"]).workers
    for network, path in stores:
        plan = forecast(frames, network, path, **settings)
        say(f"{plan.out}: {plan.shards} shards, {plan.frames} frames to do")
        free = "" if plan.bytes_free is None else f"{human_bytes(plan.bytes_free)} free, "
        click.echo(
            f"{human_bytes(plan.bytes_needed)} needed, {free}about {plan.seconds:.0f} s of {workers or 1} workers"
        )


def _size(frames: int, network: Encoder) -> str:
    rows, columns = network.token_grid
    return f"{frames} frames, {rows} x {columns} tokens of {network.token_dim}"


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
@shared.store_argument
@shared.count_option(
    "--frameskip", default=5, help="Env steps between the compared frames; the same as wmtrain's --frameskip."
)
@shared.moved_dataset_option
@shared.cluster_option()
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
@shared.store_argument
@click.option(
    "--encoder", "name", required=True, help="Encoder on the same backbone: dinov2-cls, dinov2-pooled, an adapter, …"
)
@shared.file_option("--weights", help="Weights of the encoder.  [default: the store's, or those fitted on its dataset]")
@shared.base_weights_option
@shared.path_option("--out", help="The new store.  [default: where extract would put it]")
@shared.store_dtype_option
@shared.device_option
@shared.cluster_option()
def derive_tokens(
    store: AnyPath, name: str, out: AnyPath | None, store_dtype: str, device: str, cluster: str, **weights: Path | None
) -> None:
    """Make other tokens of those in STORE, without an image: the class token, means, adapters. Run again, it goes on."""
    from wmcache.cache.store import TokenStore
    from wmcache.pipeline.derive import create_for
    from wmcache.pipeline.derive import derive as run
    from wmcache.pipeline.stores import default_store

    source = TokenStore.open(store)
    encoder = create_for(source, name, device=device, **weights)
    out = out or default_store(str(source.card.dataset["name"]), encoder, store_dtype)
    state = "" if run(source, encoder, out, dtype=store_dtype, cluster=cluster, device=device) else ALREADY
    say(f"{out}: {_size(len(source), encoder)}, derived from {store}{state}")


@click.command(cls=Command)
@shared.json_option
def encoders() -> None:
    """List the known encoders."""
    from wmcache.pipeline.encoders import get_entry, specs

    known = [(spec, get_entry(spec.name).fit is not None) for spec in specs()]
    lines = [f"{'name':22} {'tokens':>8} {'dim':>5} {'input':>7}  summary; source; licence"]
    for spec, _ in known:
        grid = "{} x {}".format(*spec.token_grid)
        about = "; ".join(filter(None, (spec.summary, spec.source, spec.licence)))
        lines.append(f"{spec.name:22} {grid:>8} {spec.token_dim:>5} {spec.image_size:>4} px  {about}")
    rows = [{**asdict(spec), "token_grid": spec.token_grid, "fitted": fitted} for spec, fitted in known]
    show(rows, lines)


@click.command(cls=Command)
@shared.json_option
def weights() -> None:
    """List the sources of encoders' weights, and the weights that were fitted here ($WMCACHE_HOME/encoders)."""
    from wmcache.pipeline.encoders.weights import list_fitted

    sources = _sources()
    fitted = [{**asdict(file), "path": str(file.path)} for file in list_fitted(home() / "encoders")]
    show({"sources": sources, "fitted": fitted}, _weight_lines(sources, fitted))


def _weight_lines(sources: list[dict[str, Any]], fitted: list[dict[str, Any]]) -> Iterator[str]:
    yield f"{'state':>8} {'size':>9} {'revision':12}  source"
    for row in sources:
        size = human_bytes(row["bytes"]) if row["bytes"] else "-"
        yield f"{row['state']:>8} {size:>9} {row['revision'][:12] or '-':12}  {row['source']}"
        yield f"{'':33}{', '.join(row['encoders'])}"
        if row["path"]:
            yield f"{'':33}{row['path']}{row['fault'] and ': '}{row['fault']}"
    yield ""
    yield f"{'encoder':>20} {'size':>9} {'dataset':12}  fitted here"
    for row in fitted:
        size = human_bytes(row["bytes"])
        yield f"{row['encoder'] or 'unknown':>20} {size:>9} {row['dataset'][:12] or '-':12}  {row['path']}"
        if row["base"] or row["fault"]:
            where = f" ({row['base_weights']})" if row["base_weights"] else ""
            yield f"{'':45}{row['fault'] or 'on ' + row['base'] + where}"


def _sources() -> list[dict[str, Any]]:
    from wmcache.pipeline.encoders import get_entry, specs
    from wmcache.pipeline.encoders.hub import REPOSITORY, look_up
    from wmcache.pipeline.encoders.packaged import PACKAGED

    groups: dict[tuple[str, str], list[str]] = {}
    for spec in specs():
        known_source = spec.source in PACKAGED or REPOSITORY.fullmatch(spec.source)
        if get_entry(spec.name).load and known_source:
            groups.setdefault((spec.source, spec.revision), []).append(spec.name)
    rows = []
    for (source, revision), names in sorted(groups.items()):
        found = PACKAGED[source].look_up() if source in PACKAGED else look_up(source, revision)
        state = "absent" if found is None else "damaged" if found.fault else "present"
        known: dict[str, Any] = {"path": "", "revision": revision, "bytes": 0, "fault": ""}
        if found:
            known = {**asdict(found), "path": str(found.path)}
        rows.append({"source": source, "encoders": names, "state": state, **known})
    return rows
