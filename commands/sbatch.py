"""wmcache sbatch: the batch script of an extraction or a training, for a cluster without a running scheduler of Dask."""

from __future__ import annotations

from pathlib import Path

import click
from click.core import ParameterSource

from wmcache.commands.command import CONTEXT, Command
from wmcache.commands.data import extract
from wmcache.commands.output import say
from wmcache.commands.shared import count_option, file_option, program_path
from wmcache.commands.train import wmtrain
from wmcache.common.errors import UserError, command
from wmcache.common.folders import home
from wmcache.common.paths import exists, unreadable

WAIT = "let the job wait for that, as with sbatch --dependency"


@click.command(cls=Command, context_settings={**CONTEXT, "allow_interspersed_args": False})
@click.option(
    "--profile", default="slurm", help="Resources of each job: a name in $WMCACHE_HOME/profiles, or a .toml file."
)
@count_option("--jobs", help="Jobs that share an extraction.  [default: the profile's]")
@file_option(
    "--out",
    help="The script to write.  [default: $WMCACHE_HOME/jobs/<program>.sh, with a number where that is another script]",
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="extract|wmtrain [OPTIONS]...")
def sbatch(profile: str, jobs: int | None, out: Path | None, words: tuple[str, ...]) -> None:
    """Write the batch script of `wmcache extract` (an array that shares the shards) or of `wmtrain` (one job).

    The words after the options are those of the command itself. Jobs that reach their walltime are requeued and go on.
    """
    from wmcache.cluster.profiles import read_profile
    from wmcache.cluster.slurm import write_script

    resources = read_profile(profile)
    match words:
        case ("extract", *rest):
            jobs = jobs or resources.jobs
            program = [program_path("wmcache"), "extract", *_checked_extract(rest)]
        case ("wmtrain", *rest):
            if jobs is not None:
                raise UserError("--jobs is an option of extractions; a training is one job, on all GPUs of the profile")
            program = [program_path("wmtrain"), *_checked_wmtrain(rest, resources.gpus)]
        case _:
            raise click.UsageError("after the options comes extract or wmtrain, and then its own options")
    file = write_script(resources, program, name=words[0], jobs=jobs, out=out)
    size = "one job" if jobs is None else f"an array of {jobs}"
    say(f"{file}: {size}, logs in {home().absolute() / 'logs'}; submit it with:", err=True)
    say(command("sbatch", file))


def _checked_extract(words: list[str]) -> list[str]:
    # A mistake is reported now and not in the queue.
    from wmcache.pipeline.encoders import get_entry
    from wmcache.pipeline.frames import no_dataset

    context = extract.make_context("wmcache extract", list(words))
    refused = [
        flag
        for name, flag in (("part", "--shard-slice"), ("dry_run", "--dry-run"))
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    ]
    if not (cluster := context.params["cluster"]).startswith("local"):
        refused.append(f"--cluster {cluster}")
    if refused:
        raise UserError(f"{', '.join(refused)}: the script gives each job of the array its slice; leave it out")
    for name in context.params["encoder"].split(","):
        get_entry(name.strip())
    dataset = context.params["dataset"] or home() / "pointmaze-umaze"
    try:
        if exists(dataset / "unfinished.json"):
            say(f"{dataset} is not finished yet: {WAIT}", err=True)
        elif not exists(dataset / "dataset.json"):
            raise no_dataset(dataset)
    except OSError as error:
        raise unreadable(dataset, error) from error
    return words


def _checked_wmtrain(words: list[str], gpus: int) -> list[str]:
    context = wmtrain.make_context("wmtrain", list(words))
    _, rest, _ = wmtrain.make_parser(context).parse_args(list(words))
    if rest:
        wmtrain.resolve_command(context, rest)
        raise UserError(f"wmtrain {rest[0]} has no batch script; write one that runs: {command('wmtrain', *words)}")
    if not (stores := context.params["caches"]):
        raise click.MissingParameter(ctx=context, param_type="option", param_hint="'--cache'")
    from wmcache.cache.layout import read_attributes

    for store in stores:
        if not read_attributes(store)["complete"]:
            say(f"{store} is not complete yet: {WAIT}", err=True)
    devices = context.params["devices"]
    if devices is not None and devices > max(1, gpus) and context.params["device"] != "cpu":
        raise UserError(f"--devices {devices} is more than the {gpus} GPUs of the profile; leave it out, or raise gpus")
    if gpus > 1 and devices is None:
        from wmcache.trainer.train import check_slices

        check_slices(context.params["batch"], gpus)
        return [*words, "--devices", str(gpus)]
    return words
