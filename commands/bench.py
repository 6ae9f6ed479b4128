"""wmcache bench: speed as a ratio to a limit or a peer that is measured in the same run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wmcache.commands.command import Group, take_chosen
from wmcache.commands.options import Preset, options_of
from wmcache.commands.output import print_columns, print_figures, print_rows
from wmcache.commands.shared import (
    ANY_PATH,
    NUMBER,
    PATH,
    dataset_option,
    encoder_options,
    json_option,
    moved_cache_option,
    moved_weights_option,
    source_options,
    store_argument,
)
from wmcache.commands.train import MODEL
from wmcache.common.errors import UserError
from wmcache.common.paths import AnyPath
from wmcache.planner.options import PlanOptions
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.presets import PRESETS

if TYPE_CHECKING:
    from wmcache.pipeline.encoders import Encoder
    from wmcache.pipeline.frames import FrameDataset

MEASURED = "dino-wm"
"""The world model that `bench.explicit` has in the reference's own code, to compare with."""


def _open(dataset: AnyPath | None, encoder: dict[str, Any]) -> tuple[FrameDataset, list[Encoder]]:
    from wmcache.pipeline.fit_job import open_dataset
    from wmcache.pipeline.stores import create_encoders

    frames = open_dataset(dataset)
    return frames, create_encoders(frames.card.name, **encoder)


@click.group(cls=Group)
def bench() -> None:
    """Measure speed as a ratio to a named limit."""


@bench.command("extract")
@dataset_option
@encoder_options
@json_option
def bench_extract(dataset: AnyPath | None, batch: int, cluster: str, as_json: bool, **encoder: Any) -> None:
    """Extraction against the bare encoder, on every frame of a dataset; of several encoders, one pass against one each."""
    from wmcache.bench.extract import bench_extract as run
    from wmcache.bench.extract import bench_together

    frames, networks = _open(dataset, encoder)
    if len(networks) > 1:
        figures = bench_together(frames, networks, batch=batch, cluster=cluster)
    else:
        figures = run(frames, networks[0], batch=batch, cluster=cluster)
    print_figures(figures, as_json=as_json)


@bench.command("cluster")
@dataset_option
@encoder_options
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=3,
    help="Rounds, in which the contenders take turns; the fastest of each counts.",
)
@json_option
def bench_cluster(
    dataset: AnyPath | None, batch: int, cluster: str, rounds: int, as_json: bool, **encoder: Any
) -> None:
    """Extraction by N Dask workers (--cluster local:N) against one, a plain loop, and N plain processes; a thread each."""
    from wmcache.bench.extract import bench_cluster as run

    frames, networks = _open(dataset, encoder)
    if len(networks) > 1:
        raise UserError("bench cluster measures one encoder; name one with --encoder")
    print_figures(run(frames, networks[0], batch=batch, cluster=cluster, rounds=rounds), as_json=as_json)


@bench.command("read")
@click.option(
    "--frames", type=click.IntRange(100), default=8192, help="Frames of the store that is made for the measurement."
)
@click.option("--tokens", type=click.IntRange(1), default=196, help="Tokens of each frame.")
@click.option("--dim", type=click.IntRange(1), default=384, help="Dimensions of each token.")
@click.option(
    "--batch-size",
    "batch",
    type=click.IntRange(1),
    default=64,
    help="Windows in each batch, each of 4 frames, 5 apart.",
)
@click.option(
    "--store-dtype",
    "dtype",
    type=click.Choice(["float16", "int8"]),
    default="float16",
    help="Type of the stored tokens.",
)
@click.option("--keep", type=PATH, help="Folder to leave the store and the plain file in.")
@json_option
def bench_read(as_json: bool, **settings: Any) -> None:
    """Windows from a store against a plain .npy file of the same bytes and against the zarr API, all in the page cache."""
    from wmcache.bench.read import bench_read as run

    print_figures(run(**settings), as_json=as_json)


@bench.command("codecs")
@store_argument
@click.option("--frames", type=click.IntRange(100), default=2000, help="Frames to measure, from the first.")
@json_option
def bench_codecs(store: AnyPath, frames: int, as_json: bool) -> None:
    """Size, speed and error of STORE's own tokens as int8 and compressed."""
    from wmcache.bench.read import bench_codecs as run

    print_rows(run(store, frames=frames), as_json=as_json)


@bench.command("shards")
@click.option(
    "--shards",
    multiple=True,
    type=NUMBER,
    default=(1000, 10_000, 100_000),
    help="Shards of a store, as 1e6; repeatable.",
)
@click.option("--frames-per-shard", type=click.IntRange(1), default=512, help="Frames in each shard.")
@click.option("--keep", type=PATH, help="Folder to make the stores in, and to leave them in.")
@json_option
def bench_shards(shards: tuple[int, ...], as_json: bool, **settings: Any) -> None:
    """Measure what planning, claiming, finishing and opening a store of so many shards cost, without any data in them."""
    from wmcache.bench.scale import measure_scale

    print_rows([measure_scale(count, **settings) for count in shards], as_json=as_json)


@bench.command("train", by=replace(MODEL, default=MEASURED))
@click.option(
    "--preset",
    cls=Preset,
    presets={name: preset for name, preset in PRESETS.items() if preset["model"] == MEASURED},
    help="A known model; options beside it win.",
)
@click.option("--cache", type=ANY_PATH, required=True, help="The token store; its frames and encoder are used as well.")
@click.option("--steps", type=click.IntRange(2), default=20, help="Training steps of each contender in each turn.")
@click.option("--batch-size", "batch", type=click.IntRange(1), default=64, help="Windows in each batch.")
@options_of(TrainOptions, only=("residence",), residence={"group": "Options"})
@source_options
@json_option
def bench_train(
    cache: AnyPath,
    preset: str | None,  # noqa: ARG001 (its values have become the defaults of other options)
    dataset: AnyPath | None,
    weights: Path | None,
    device: str,
    as_json: bool,
    **settings: Any,
) -> None:
    """Training steps fed by the store against steps on one batch in memory, encoding in the loop, and the reference's code."""
    from wmcache.bench.train import bench_train as run
    from wmcache.pipeline.repair import live_encoder

    encode = live_encoder(cache, dataset=dataset, weights=weights, device=device)
    model = take_chosen(settings)
    print_figures(run(cache, model, encode, device=device, **settings), as_json=as_json)


@bench.command("memory")
@click.option("--episodes", type=click.IntRange(1), default=10, help="Episodes of 100 frames in the smallest dataset.")
@json_option
def bench_memory(episodes: int, as_json: bool) -> None:
    """Peak memory of wmcache extract and wmtrain over datasets 1, 4 and 16 times as large."""
    from wmcache.bench.extract import bench_memory as run

    print_rows(run(episodes), as_json=as_json)


@bench.command("plan")
@click.option("--run", type=PATH, help="Run to compare with DINO-WM's own code; its encoder is used as well.")
@click.option("--model", "runs", type=PATH, multiple=True, help="Run to compare with others; repeatable.")
@click.option("--samples", type=click.IntRange(2), default=300, help="Candidates in each iteration; DINO-WM has 300.")
@click.option("--elites", type=click.IntRange(2), default=30, help="Best candidates of each iteration; DINO-WM has 30.")
@click.option(
    "--iterations",
    type=click.IntRange(1),
    default=1,
    help="Iterations of the search; DINO-WM has 10, and each costs the same.",
)
@click.option("--episodes", type=click.IntRange(0), default=200, help="Episodes of mpc-100 for each --model.")
@click.option(
    "--context",
    type=click.IntRange(1),
    help="Frames that an imagined step of each --model sees.  [default: as wmplan's]",
)
@click.option("--landscape", type=PATH, help="PNG of the cost of each --model around its plan.")
@moved_weights_option
@moved_cache_option
@options_of(PlanOptions, only=("dtype", "device"), device={"group": "Options"}, dtype={"group": "Options"})
@json_option
def bench_plan(
    run: Path | None,
    runs: tuple[Path, ...],
    episodes: int,
    context: int | None,
    landscape: Path | None,
    weights: Path | None,
    cache: AnyPath | None,
    dtype: Any,
    device: str,
    as_json: bool,
    **search: int,
) -> None:
    """One plan of DINO-WM's code against this implementation, or several --model against each other: speed, success, landscape."""
    from wmcache.bench.plan import bench_run
    from wmcache.planner.context import EvalContext

    if (run is None) == (not runs):
        raise click.UsageError("give one --run, to measure it against DINO-WM's own code, or one --model or more")
    if run is not None:
        setting = EvalContext(run, PlanOptions(device=device), weights=weights, cache=cache)
        print_figures(bench_run(setting, dtype=dtype, **search), as_json=as_json)
        return
    from wmcache.bench.compare import compare_runs

    options = PlanOptions(search=dict(search), context=context, dtype=dtype, device=device)
    rows = compare_runs(runs, options, episodes, landscape, weights=weights, cache=cache)
    print_columns(rows, as_json=as_json)
