"""wmcache bench, plan-job: speed as a ratio to a limit or a peer that is measured in the same run, and the cost of a large extraction."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from wmcache.commands import shared
from wmcache.commands.command import Command, Group, take_chosen
from wmcache.commands.options import Preset, options_of
from wmcache.commands.output import show, show_columns, show_figures, show_rows
from wmcache.commands.train import MODEL
from wmcache.common.errors import UserError
from wmcache.common.paths import AnyPath
from wmcache.common.space import human_bytes
from wmcache.planner.options import PlanOptions
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.presets import PRESETS

MEASURED = "dino-wm"
"""The world model that `bench.reference` has in the reference's own code, to compare with."""
number_option = partial(click.option, type=shared.NUMBER)


@click.group(cls=Group)
def bench() -> None:
    """Measure speed as a ratio to a named limit."""


@bench.command("extract")
@shared.dataset_option
@shared.encoder_options
@click.option("--compile", "compiled", is_flag=True, help="Also measure the bare encoder with torch.compile.")
@shared.json_option
def bench_extract(dataset: AnyPath | None, batch: int, cluster: str, compiled: bool, **encoder: Any) -> None:
    """Extraction against the bare encoder, on every frame of a dataset; of several encoders, one pass against one each."""
    from wmcache.bench.extract import bench_extract as run
    from wmcache.bench.extract import bench_together
    from wmcache.pipeline.fit import open_inputs

    frames, networks = open_inputs(dataset, encoder)
    if len(networks) > 1:
        if compiled:
            raise UserError("--compile measures one encoder; name one with --encoder")
        figures = bench_together(frames, networks, batch=batch, cluster=cluster)
    else:
        figures = run(frames, networks[0], batch=batch, cluster=cluster, compiled=compiled)
    show_figures(figures)


@bench.command("cluster")
@shared.dataset_option
@shared.encoder_options
@shared.count_option(
    "--rounds", default=3, help="Rounds, in which the contenders take turns; the fastest of each counts."
)
@shared.json_option
def bench_cluster(dataset: AnyPath | None, batch: int, cluster: str, rounds: int, **encoder: Any) -> None:
    """Extraction by N Dask workers (--cluster local:N) against one, a plain loop, and N plain processes; a thread each."""
    from wmcache.bench.extract import bench_cluster as run
    from wmcache.pipeline.fit import open_inputs

    frames, networks = open_inputs(dataset, encoder)
    if len(networks) > 1:
        raise UserError("bench cluster measures one encoder; name one with --encoder")
    show_figures(run(frames, networks[0], batch=batch, cluster=cluster, rounds=rounds))


@bench.command("read")
@shared.count_option("--frames", default=8192, least=100, help="Frames of the store that is made for the measurement.")
@shared.count_option("--tokens", default=196, help="Tokens of each frame.")
@shared.count_option("--dim", default=384, help="Dimensions of each token.")
@shared.count_option("--batch-size", "batch", default=64, help="Windows in each batch, each of 4 frames, 5 apart.")
@shared.store_dtype_option
@shared.file_option("--keep", help="Folder to leave the store and the plain file in.")
@shared.json_option
def bench_read(store_dtype: str, **settings: Any) -> None:
    """Windows from a store against a plain .npy file of the same bytes and against the zarr API, all in the page cache."""
    from wmcache.bench.read import bench_read as run

    show_figures(run(dtype=store_dtype, **settings))


@bench.command("codecs")
@shared.store_argument
@shared.count_option("--frames", default=2000, least=100, help="Frames to measure, from the first.")
@shared.json_option
def bench_codecs(store: AnyPath, frames: int) -> None:
    """Size, speed and error of STORE's own tokens as int8 and compressed."""
    from wmcache.bench.read import bench_codecs as run

    show_rows(run(store, frames=frames))


@bench.command("shards")
@number_option("--shards", multiple=True, default=(1000, 10_000, 100_000), help="Shards, as 1e6; repeatable.")
@shared.count_option("--frames-per-shard", default=512, help="Frames in each shard.")
@shared.file_option("--keep", help="Folder to make the stores in, and to leave them in.")
@shared.json_option
def bench_shards(shards: tuple[int, ...], **settings: Any) -> None:
    """Measure what planning, claiming, finishing and opening a store of so many shards cost, without any data in them."""
    from wmcache.bench.plan_job import measure_scale

    show_rows([measure_scale(count, **settings) for count in shards])


@bench.command("train", by=replace(MODEL, default=MEASURED))
@click.option(
    "--preset",
    cls=Preset,
    presets={name: preset for name, preset in PRESETS.items() if preset["model"] == MEASURED},
    expose_value=False,
    help="A known model; options beside it win.",
)
@shared.path_option("--cache", required=True, help="The token store; its frames and encoder are used as well.")
@shared.count_option("--steps", default=20, least=2, help="Training steps of each contender in each turn.")
@shared.count_option("--batch-size", "batch", default=64, help="Windows in each batch.")
@options_of(TrainOptions, only=("residence",), residence={"group": "Options"})
@shared.source_options
@shared.json_option
def bench_train(cache: AnyPath, dataset: AnyPath | None, weights: Path | None, device: str, **settings: Any) -> None:
    """Training steps fed by the store against steps on one batch in memory, encoding in the loop, and the reference's code."""
    from wmcache.bench.reference import bench_train as run
    from wmcache.pipeline.repair import live_encoder

    encode = live_encoder(cache, dataset=dataset, weights=weights, device=device)
    model = take_chosen(settings)
    show_figures(run(cache, model, encode, device=device, **settings))


@bench.command("memory")
@shared.count_option("--episodes", default=10, help="Episodes of 100 frames in the smallest dataset.")
@shared.json_option
def bench_memory(episodes: int) -> None:
    """Peak memory of wmcache extract and wmtrain over datasets 1, 4 and 16 times as large."""
    from wmcache.bench.extract import bench_memory as run

    show_rows(run(episodes))


@bench.command("plan")
@shared.file_option("--run", help="Run to compare with DINO-WM's own code; its encoder is used as well.")
@shared.file_option("--model", "runs", multiple=True, help="Run to compare with others; repeatable.")
@shared.count_option("--samples", default=300, least=2, help="Candidates in each iteration; DINO-WM has 300.")
@shared.count_option("--elites", default=30, least=2, help="Best candidates of each iteration; DINO-WM has 30.")
@shared.count_option(
    "--iterations", default=1, help="Iterations of the search; DINO-WM has 10, and each costs the same."
)
@shared.count_option("--episodes", default=200, least=0, help="Episodes of mpc-100 for each --model.")
@shared.count_option("--context", help="Frames that an imagined step of each --model sees.  [default: as wmplan's]")
@click.option(
    "--keep",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    multiple=True,
    help="Share of the tokens: a further column of each --model, see: wmplan --keep; repeatable.",
)
@click.option("--reference", is_flag=True, help="Compare with DINO-WM's code on the first --model.")
@shared.file_option("--landscape", help="PNG of the cost of each --model around its plan.")
@shared.moved_weights_option
@shared.moved_caches_option
@options_of(PlanOptions, only=("dtype", "device"), device={"group": "Options"}, dtype={"group": "Options"})
@shared.json_option
def bench_plan(
    run: Path | None,
    runs: tuple[Path, ...],
    episodes: int,
    landscape: Path | None,
    keep: tuple[float, ...],
    reference: bool,
    **settings: Any,
) -> None:
    """One plan of DINO-WM's code against this implementation, or several --model against each other: speed, success, landscape."""
    from wmcache.bench.compare import compare_runs
    from wmcache.bench.reference import bench_run
    from wmcache.planner.context import EvalContext

    if (run is None) == (not runs):
        raise click.UsageError("give one --run, to measure it against DINO-WM's own code, or one --model or more")
    given = click.get_current_context().get_parameter_source("episodes") is not ParameterSource.DEFAULT
    if run is not None and (keep or reference or landscape or settings["context"] or given):
        raise click.UsageError(
            "--keep, --reference, --landscape, --context and --episodes are for --model; give that instead of --run"
        )
    moved = {name: settings.pop(name) for name in ("weights", "cache")}
    chosen = {name: settings.pop(name) for name in ("context", "dtype", "device")}
    if run is not None:
        setting = EvalContext(run, PlanOptions(device=chosen["device"]), **moved)
        show_figures(bench_run(setting, dtype=chosen["dtype"], **settings))
    else:
        options = PlanOptions(search=settings, **chosen)
        show_columns(compare_runs(runs, options, episodes, landscape, keep=keep, reference=reference, **moved))


@bench.command("rollout")
@shared.file_option(
    "--run",
    "runs",
    multiple=True,
    required=True,
    help="Run of a world model; repeatable. Gains are those of the first.",
)
@shared.count_option("--steps", default=20, help="Model steps that are imagined.")
@shared.count_option("--observed", default=1, help="Frames that are observed before them.")
@shared.count_option("--windows", default=512, help="Held-out windows.")
@click.option(
    "--part",
    type=click.Choice(["latents", "proprio"]),
    default="latents",
    help="What is compared: latents, or standardised proprio.",
)
@shared.moved_caches_option
@options_of(PlanOptions, only=("dtype", "device"), device={"group": "Options"}, dtype={"group": "Options"})
@shared.json_option
def bench_rollout(runs: tuple[Path, ...], **settings: Any) -> None:
    """Error of what world models imagine, by model step on the same held-out windows, as a share of that of copying a frame.

    A gain is the share of another run's error that the first run saves, with its 95 % interval over held-out episodes.
    """
    from wmcache.bench.rollout import compare_rollouts

    rows = compare_rollouts(runs, **settings)
    shown = [
        {
            **{name: row[name] for name in ("step", "copying")},
            **row["runs"],
            **{f"gain on {name}": "{:.3f} ({:.3f} to {:.3f})".format(*gain) for name, gain in row["gains"].items()},
        }
        for row in rows
    ]
    show_rows(shown, rows)


@click.command("plan-job", cls=Command)
@number_option("--frames", required=True, help="Frames to encode, such as 1e9.")
@click.option("--encoder", default="dinov2", help="Encoder; see: wmcache encoders.")
@number_option("--workers", default=1, help="Processes that run at the same time, each with a device.")
@click.option(
    "--frames-per-second",
    type=click.FloatRange(0, min_open=True),
    help="Frames that a worker encodes per second.  [default: measured here]",
)
@number_option("--frames-per-shard", help="Frames in each shard of the dataset.  [default: 512, or more if it is huge]")
@shared.count_option("--frame-size", "image_size", default=224, help="Side of the dataset's frames.")
@shared.store_dtype_option
@shared.file_option("--weights", help="Weights of the encoder, to measure it.")
@shared.device_option
@shared.json_option
def plan_job(
    encoder: str, frames_per_second: float | None, weights: Path | None, device: str, store_dtype: str, **settings: Any
) -> None:
    """Estimate bytes, objects, hours, and the cost of records and scheduler for a large extraction."""
    from wmcache.bench.plan_job import measure_encoder
    from wmcache.bench.plan_job import plan_job as run
    from wmcache.pipeline import encoders

    spec = encoders.get_spec(encoder)
    if frames_per_second is None:
        try:
            frames_per_second = measure_encoder(encoders.create(encoder, weights=weights, device=device))
        except UserError as error:
            raise UserError(f"{error}; or pass --frames-per-second") from error
    settings |= {"token_grid": spec.token_grid, "token_dim": spec.token_dim, "frames_per_second": frames_per_second}
    plan = run(dtype=store_dtype, **settings)
    load = plan["tasks_per_second"] / plan["scheduler_tasks_per_second"]
    rows = {
        "shards": f"{plan['shards']} of {plan['frames_per_shard']} frames, {human_bytes(plan['shard_bytes'])} each",
        "tokens": human_bytes(plan["token_bytes"]),
        "objects": f"{plan['objects']}, {plan['shards']} of them shards",
        "records": human_bytes(plan["record_bytes"]),
        "workers": f"{plan['worker_hours']:.1f} hours at {plan['frames_per_second']:.0f} frames/s; {plan['hours']:.2f} hours with "
        f"{settings['workers']} at once",
        "memory of a worker": f"{human_bytes(plan['worker_memory'])}, with {human_bytes(plan['step_bytes'])} of step table",
        "claim and record": f"{plan['commit_share']:.2%} of a shard's time",
        "create, plan": f"{plan['create']:.1f} s, {plan['plan']:.1f} s",
        "finalize, open": f"{plan['finish']:.1f} s, {plan['open']:.1f} s",
        "scheduler": f"{plan['tasks_per_second']:.1f} of {plan['scheduler_tasks_per_second']:.0f} tasks/s, {load:.1%}",
    }
    lines = [f"{name:20} {value}" for name, value in rows.items()]
    show(plan, [*lines, *(f"note: {note}" for note in plan["notes"])])
