"""Batch scripts of SLURM: a job, or an array of jobs, that requeues itself when its walltime ends."""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path

from wmcache.cluster.profiles import Profile
from wmcache.cluster.slurm import log_pattern, prologue
from wmcache.common.errors import UserError
from wmcache.common.files import write_whole
from wmcache.common.folders import home

SECONDS_OF_WARNING = 180
"""Seconds from SLURM's signal to the walltime: SLURM may be a minute late, and a shard or a checkpoint has to end."""

SCRIPT = """\
#!/bin/bash
{directives}

{prepare}
set -uo pipefail

child='' received='' signals=0
forward() {{
    received=$1 signals=$((signals + 1))
    [[ -z $child ]] || kill -s TERM "$child" 2>/dev/null
}}
trap 'forward USR1' USR1
trap 'forward TERM' TERM

{program} &
child=$!
# A signal that came before the program was started.
[[ -z $received ]] || forward "$received"
while :; do
    before=$signals
    wait "$child"
    status=$?
    # A signal ends the waiting, not the program.
    [[ $before -ne $signals ]] || break
done
# Killed before it handled the signal.
[[ -z $received || $status -ne 143 ]] || status=75
# TERM is a decision about the job: a cancelled one stays cancelled, and SLURM requeues a preempted one.
if [[ $status -eq 75 && $received != TERM ]]; then
    scontrol requeue {job}
fi
exit "$status"
"""


def write_script(profile: Profile, program: list[str], *, name: str, jobs: int | None, out: Path | None) -> Path:
    """Write the batch script of a program, and make the folder of its logs.

    Args:
        name: of the job and the file.
        jobs: size of an array whose jobs each do one slice of the shards; None for one job.
        out: the script; None for the first of `$WMCACHE_HOME/jobs/<name>.sh`, `<name>-2.sh`, ... that is free or is this script.

    Raises UserError if `out` is another script.
    """
    logs = home().absolute() / "logs"
    text = _script(profile, program, name, jobs, logs).encode()
    numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    files = [out] if out else (home() / "jobs" / f"{name}{number}.sh" for number in numbers)
    chosen = next((file for file in files if not file.exists() or file.read_bytes() == text), None)
    if chosen is None:
        raise UserError(f"{out} exists and is another script; choose another --out")
    logs.mkdir(parents=True, exist_ok=True)
    write_whole(chosen, text)
    return chosen


def _script(profile: Profile, program: list[str], name: str, jobs: int | None, logs: Path) -> str:
    array = jobs is not None
    gpus = min(profile.gpus, 1) if array else profile.gpus  # an encoder uses one
    line, job = shlex.join(program), '"$SLURM_JOB_ID"'
    if array:
        # The number of slices, not of tasks, so that a part can be submitted again: sbatch --array=3 FILE
        line += f' --shard-slice "$SLURM_ARRAY_TASK_ID/{jobs}"'
        # SLURM_JOB_ID of an array's last task is also the id of the array, so all tasks would be requeued.
        job = '"${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"'
    directives = {
        "job-name": f"wmcache-{name}",
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
        "signal": f"B:USR1@{min(SECONDS_OF_WARNING, profile.seconds // 2)}",
    }
    chosen = [f"--{option}={value}" for option, value in directives.items() if value is not None]
    prepare = [
        *prologue(profile),
        f"export OMP_NUM_THREADS={max(1, profile.cores // max(1, gpus))}",
        f"cd -- {shlex.quote(str(Path.cwd()))} || exit",
    ]
    return SCRIPT.format(
        directives="\n".join(f"#SBATCH {option}" for option in [*chosen, "--requeue", *profile.extra]),
        prepare="\n".join(prepare),
        program=line,
        job=job,
    )
