"""wmcache plan-job: the cost of a large extraction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from wmcache.commands.command import Command
from wmcache.commands.output import print_json
from wmcache.commands.shared import NUMBER, PATH, device_option, json_option
from wmcache.common.errors import UserError
from wmcache.common.space import human_bytes


@click.command("plan-job", cls=Command)
@click.option("--frames", type=NUMBER, required=True, help="Frames to encode, such as 1e9.")
@click.option("--encoder", default="dinov2", help="Encoder; see: wmcache encoders.")
@click.option("--workers", type=NUMBER, default=1, help="Processes that run at the same time, each with a device.")
@click.option(
    "--frames-per-second",
    type=click.FloatRange(0, min_open=True),
    help="Frames that a worker encodes per second.  [default: measured here]",
)
@click.option(
    "--frames-per-shard",
    type=NUMBER,
    help="Frames in each shard of the dataset.  [default: 512, or more for a huge dataset]",
)
@click.option("--frame-size", "image_size", type=click.IntRange(1), default=224, help="Side of the dataset's frames.")
@click.option(
    "--store-dtype",
    "dtype",
    type=click.Choice(["float16", "int8"]),
    default="float16",
    help="Type of the stored tokens.",
)
@click.option("--weights", type=PATH, help="Weights of the encoder, to measure it.")
@device_option
@json_option
def plan_job(
    encoder: str,
    frames_per_second: float | None,
    weights: Path | None,
    device: str,
    as_json: bool,
    **settings: Any,
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
    plan = run(token_grid=spec.token_grid, token_dim=spec.token_dim, frames_per_second=frames_per_second, **settings)
    if as_json:
        print_json(plan)
        return
    load = plan["tasks_per_second"] / plan["scheduler_tasks_per_second"]
    for name, value in {
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
    }.items():
        click.echo(f"{name:20} {value}")
    for note in plan["notes"]:
        click.echo(f"note: {note}")
