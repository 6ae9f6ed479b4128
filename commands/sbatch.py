"""wmcache sbatch: the batch script of an extraction or a training, for a cluster where nothing of ours stays resident."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from wmcache.commands.command import CONTEXT, Command
from wmcache.commands.data import extract
from wmcache.commands.output import say
from wmcache.commands.shared import PATH, program_path
from wmcache.commands.train import wmtrain
from wmcache.common.errors import UserError, command
from wmcache.common.files import atomic_write, home
from wmcache.common.paths import exists, unreadable

if TYPE_CHECKING:
    from wmcache.cluster.profiles import Profile

WARNING = 180
"""Seconds before the walltime: SLURM may be a minute late, and a shard or a checkpoint has to end."""

NOT_IN_AN_ARRAY = {"--shard-slice": "the script gives each job its own", "--dry-run": "it needs no cluster"}

SCRIPT = """\
#!/bin/bash
{directives}

{prepare}
set -uo pipefail

child='' told='' signals=0
tell() {{
    told=$1 signals=$((signals + 1))
    [[ -z $child ]] || kill -s TERM "$child" 2>/dev/null
}}
trap 'tell USR1' USR1
trap 'tell TERM' TERM

{program} &
child=$!
# Told before there was anybody to tell.
[[ -z $told ]] || tell "$told"
while :; do
    before=$signals
    wait "$child"
    status=$?
    # A signal ends the waiting, not the program.
    [[ $before -ne $signals ]] || break
done
# Stopped before it could say so.
[[ -z $told || $status -ne 143 ]] || status=75
# Whoever sends TERM has decided about the job: a cancelled one stays so, a preempted one is requeued by SLURM.
if [[ $status -eq 75 && $told != TERM ]]; then
    scontrol requeue {job}
fi
exit "$status"
"""


@click.command(cls=Command, context_settings={**CONTEXT, "allow_interspersed_args": False})
@click.option(
    "--profile", default="slurm", help="Resources of each job: a name in $WMCACHE_HOME/profiles, or a .toml file."
)
@click.option("--jobs", type=click.IntRange(1), help="Jobs that share an extraction.  [default: the profile's]")
@click.option(
    "--out",
    type=PATH,
    help="The script to write.  [default: $WMCACHE_HOME/jobs/<program>.sh, with a number where that is another script]",
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="extract|wmtrain [OPTIONS]...")
def sbatch(profile: str, jobs: int | None, out: Path | None, words: tuple[str, ...]) -> None:
    """Write the batch script of `wmcache extract` (an array that shares the shards) or of `wmtrain` (one job).

    What follows is as it would be typed here. Jobs that reach their walltime go back into the queue and go on from there.
    """
    from wmcache.cluster.profiles import read_profile

    asked = read_profile(profile)
    match words:
        case ("extract", *rest):
            jobs = jobs or asked.jobs
            program = [program_path("wmcache"), "extract", *_checked_extract(rest)]
        case ("wmtrain", *rest):
            if jobs is not None:
                raise UserError("--jobs is of an extraction; a training is one job, on as many GPUs as its profile has")
            program = [program_path("wmtrain"), *_checked_wmtrain(rest, asked.gpus)]
        case _:
            raise click.UsageError("after the options comes extract or wmtrain, and what is typed after it")
    logs = home().absolute() / "logs"
    text = script(asked, program, jobs=jobs, name=f"wmcache-{words[0]}", logs=logs).encode()
    if out is None:
        out = next(file for file in _names(home() / "jobs", words[0]) if not _is_other(file, text))
    elif _is_other(out, text):
        raise UserError(f"{out} exists and is another script; choose another --out")
    logs.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as file:
        file.write(text)
    say(f"{out}: {'one job' if jobs is None else f'an array of {jobs}'}, logs in {logs}; submit it with:", err=True)
    say(command("sbatch", out))


def _names(folder: Path, program: str) -> Iterator[Path]:
    """`extract.sh`, `extract-2.sh`, ..."""
    yield folder / f"{program}.sh"
    for number in itertools.count(2):
        yield folder / f"{program}-{number}.sh"


def _is_other(file: Path, text: bytes) -> bool:
    """Whether a file is there that does not hold this text."""
    return file.exists() and file.read_bytes() != text


def script(profile: Profile, program: list[str], *, jobs: int | None, name: str, logs: Path) -> str:
    """A batch script.

    Args:
        program: the words of the command.
        jobs: of an array that shares the work, each told its slice; None is one job.
        name: of the job.
        logs: an absolute folder.

    Raises:
        UserError: SLURM cannot be told of that folder.
    """
    from wmcache.cluster.profiles import log_pattern

    array = jobs is not None
    gpus = min(profile.gpus, 1) if array else profile.gpus  # an encoder is on one
    line, job = shlex.join(program), '"$SLURM_JOB_ID"'
    if array:
        # The number of slices and not of tasks, so that a part can be submitted again: sbatch --array=3 FILE
        line += f' --shard-slice "$SLURM_ARRAY_TASK_ID/{jobs}"'
        # The id of an array's last task is the whole array's too, and would requeue that.
        job = '"${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"'
    directives = {
        "job-name": name,
        "output": log_pattern(logs, "%x-%A_%a.log" if array else "%x-%j.log"),
        "open-mode": "append",
        "partition": profile.partition,
        "account": profile.account,
        "nodes": 1,
        "ntasks": 1,
        "gpus": gpus or None,
        "cpus-per-task": profile.cores,
        "mem": profile.memory.removesuffix("B"),
        "time": profile.walltime,
        "array": f"0-{jobs - 1}" if jobs is not None else None,
        "signal": f"B:USR1@{min(WARNING, profile.seconds // 2)}",
    }
    chosen = [f"--{option}={value}" for option, value in directives.items() if value is not None]
    prepare = [
        *(f"module load {shlex.quote(module)} || exit" for module in profile.modules),
        *profile.setup,
        f"export WMCACHE_HOME={shlex.quote(str(home().absolute()))}",
        f"export OMP_NUM_THREADS={max(1, profile.cores // max(1, gpus))}",
        f"cd -- {shlex.quote(str(Path.cwd()))} || exit",
    ]
    return SCRIPT.format(
        directives="\n".join(f"#SBATCH {option}" for option in [*chosen, "--requeue", *profile.extra]),
        prepare="\n".join(prepare),
        program=line,
        job=job,
    )


def _checked_extract(words: list[str]) -> list[str]:
    """The words of an extraction that works on a slice; a typo is said here and not in the queue."""
    from wmcache.pipeline.encoders import get_entry
    from wmcache.pipeline.frames import no_dataset

    context = extract.make_context("wmcache extract", list(words))
    for option in extract.params:
        why = next((NOT_IN_AN_ARRAY[flag] for flag in option.opts if flag in NOT_IN_AN_ARRAY), None)
        if why and context.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE:
            raise UserError(f"{option.opts[0]}: {why}; leave it out")
    if not (cluster := context.params["cluster"]).startswith("local"):
        raise UserError(f"--cluster {cluster}: each job of the array works alone; leave it out")
    for name in context.params["names"].split(","):
        get_entry(name.strip())
    dataset = context.params["dataset"] or home() / "pointmaze-umaze"
    try:
        unfinished = exists(dataset / "unfinished.json")
        if not unfinished and not exists(dataset / "dataset.json"):
            raise no_dataset(dataset)
    except OSError as error:
        raise unreadable(dataset, error) from error
    if unfinished:
        click.echo(f"{dataset} is not finished yet: let the jobs wait for that, as with sbatch --dependency", err=True)
    return words


def _checked_wmtrain(words: list[str], gpus: int) -> list[str]:
    context = wmtrain.make_context("wmtrain", list(words))
    _, rest, _ = wmtrain.make_parser(context).parse_args(list(words))
    if rest:
        wmtrain.resolve_command(context, rest)
        raise UserError(f"wmtrain {rest[0]} has no batch script; write one that runs: {command('wmtrain', *words)}")
    if context.params["cache"] is None:
        raise click.MissingParameter(ctx=context, param_type="option", param_hint="'--cache'")
    from wmcache.cache.layout import read_attributes

    attributes = read_attributes(context.params["cache"])
    if not attributes["complete"]:
        click.echo(
            f"{context.params['cache']} is not complete yet: let the job wait for that, as with sbatch --dependency",
            err=True,
        )
    devices = context.params["devices"]
    if devices is not None and devices > max(1, gpus) and context.params["device"] != "cpu":
        raise UserError(f"--devices {devices} is more than the {gpus} GPUs of the profile; leave it out, or raise gpus")
    if gpus > 1 and devices is None:
        from wmcache.trainer.loop import check_slices

        check_slices(context.params["batch"], gpus)
        return [*words, "--devices", str(gpus)]
    return words
