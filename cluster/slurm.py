"""SLURM: Dask workers in jobs, through dask-jobqueue, and batch scripts that requeue themselves when their walltime ends."""

from __future__ import annotations

import importlib
import itertools
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from wmcache.cluster.dask import QUEUE_AT_SCHEDULER, WORKER_VARIABLES, dask_errors
from wmcache.cluster.profiles import Profile
from wmcache.cluster.tasks import Cluster
from wmcache.common.errors import UserError
from wmcache.common.files import write_whole
from wmcache.common.folders import home

SECONDS_BETWEEN_SUBMISSIONS = 30.0
MOST_CHECKS_WITHOUT_JOBS = 2
"""Abort after this many consecutive checks with neither a worker nor a queued or running job."""
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


@contextmanager
def submit_workers(
    where: Cluster, profile: Profile, jobs: int, threads: int
) -> Iterator[tuple[Any, Callable[[], None]]]:
    """Submit jobs with one worker each; yields a client, and what submits ended jobs again."""
    import dask
    from distributed import Client

    try:
        slurm = import_slurm()
    except ImportError:
        raise UserError(
            f"--cluster {where.text}: dask-jobqueue is not installed; pip install 'wmcache[cluster]'"
        ) from None
    if shutil.which("sbatch") is None:
        raise UserError(f"--cluster {where.text}: sbatch is not installed; run on a machine that submits to SLURM")
    (home() / "logs").mkdir(parents=True, exist_ok=True)  # SLURM does not make it
    with ExitStack() as stack:
        with dask_errors(where.text):
            stack.enter_context(dask.config.set(QUEUE_AT_SCHEDULER))
            cluster = stack.enter_context(slurm.SLURMCluster(**slurm_options(profile, threads)))
            client = stack.enter_context(Client(cluster, set_as_default=False))
        _try_submission(cluster.job_script(), where)
        submissions = _submissions(client, cluster, where, jobs)
        next(submissions)
        yield client, lambda: next(submissions)


def _submissions(client: Any, cluster: Any, where: Cluster, jobs: int) -> Iterator[None]:
    """Submit jobs, and later at each step those again that have ended, such as at their walltime."""
    checks_without_jobs = 0
    while True:
        cluster.scale(jobs=jobs)
        submitted = time.monotonic()
        while time.monotonic() <= submitted + SECONDS_BETWEEN_SUBMISSIONS:
            yield
        known = [str(job.job_id) for job in list(cluster.workers.values()) if getattr(job, "job_id", None)]
        found = client.nthreads() or _are_queued(known)
        checks_without_jobs = 0 if found else checks_without_jobs + 1
        if checks_without_jobs == MOST_CHECKS_WITHOUT_JOBS:
            logs = home().absolute() / "logs"
            raise UserError(
                f"the jobs of {where.text} end before their workers connect; see {logs}, correct the profile"
            )


def import_slurm() -> Any:
    """Import `dask_jobqueue.slurm`, and restore the handler of Ctrl-C, which it replaces."""
    before = signal.getsignal(signal.SIGINT)
    try:
        return importlib.import_module("dask_jobqueue.slurm")
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def slurm_options(profile: Profile, threads: int) -> dict[str, Any]:
    """Arguments of `SLURMCluster`: one worker per job, on at most one GPU, which stops before the walltime."""
    margin, stagger = min(300, profile.seconds // 4), min(240, profile.seconds // 10)
    computing = " ".join(f"{name}_NUM_THREADS={profile.cores}" for name in ("OMP", "MKL", "OPENBLAS"))
    return {
        "queue": profile.partition,
        "account": profile.account,
        "cores": profile.cores,
        "memory": profile.memory,
        "processes": 1,
        "walltime": profile.walltime,
        "interface": profile.interface,
        "job_name": "wmcache",
        "python": shlex.quote(sys.executable),
        "job_extra_directives": [
            # dask_jobqueue does not quote its own option for the folder.
            f"--output={log_pattern('%x-%j.log')}",
            *(["--gpus=1"] if profile.gpus else []),
            "--requeue",
            *profile.extra,
        ],
        "job_script_prologue": [*prologue(profile), f"export {computing} {WORKER_VARIABLES}"],
        "worker_extra_args": [
            *("--nthreads", str(threads)),
            *("--lifetime", f"{profile.seconds - margin - stagger}s", "--lifetime-stagger", f"{stagger}s"),
        ],
        "scheduler_options": {"dashboard_address": ":0"},
    }


def prologue(profile: Profile) -> list[str]:
    """Shell lines that prepare a job: the profile's modules and setup, and this user's home of wmcache."""
    modules = [f"module load {shlex.quote(module)} || exit" for module in profile.modules]
    return [*modules, *profile.setup, f"export WMCACHE_HOME={shlex.quote(str(home().absolute()))}"]


def log_pattern(pattern: str) -> str:
    """Quote a file in the folder of logs for `#SBATCH --output=`, which SLURM parses, not a shell."""
    folder = home().absolute() / "logs"
    if not str(folder).isprintable() or "\\" in str(folder):
        raise UserError(f"{folder}: SLURM cannot write its logs there; set WMCACHE_HOME to another folder")
    name = str(folder).replace("%", "%%").replace('"', '\\"')
    return f'"{name}/{pattern}"'


def _are_queued(jobs: Sequence[str]) -> bool:
    """Return whether any of these jobs is queued or runs; True if SLURM does not answer."""
    found = subprocess.run(
        ["squeue", "--noheader", "--format=%i", f"--jobs={','.join(jobs)}"], capture_output=True, text=True, check=False
    )
    known = found.returncode == 0 or "Invalid job id" in found.stderr
    return bool(found.stdout.strip()) if known and jobs else True


def _try_submission(script: str, where: Cluster) -> None:
    """Raise a UserError if SLURM does not accept such a job."""
    tried = subprocess.run(["sbatch", "--test-only"], input=script, capture_output=True, text=True, check=False)
    if tried.returncode:
        last = (tried.stderr.strip().splitlines() or [f"status {tried.returncode}"])[-1][:200]
        raise UserError(
            f"--cluster {where.text}: SLURM refuses such a job ({last}); correct the profile, or see: sinfo"
        )


def write_script(profile: Profile, program: list[str], *, name: str, jobs: int | None, out: Path | None) -> Path:
    """Write the batch script of a program, and make the folder of its logs; raises UserError if `out` is another script.

    Args:
        jobs: size of an array whose jobs each do one slice of the shards; None for one job.
        out: None for the first of `$WMCACHE_HOME/jobs/<name>.sh`, `<name>-2.sh`, ... that is free or is this script.
    """
    text = _script(profile, program, name, jobs).encode()
    numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    files = [out] if out else (home() / "jobs" / f"{name}{number}.sh" for number in numbers)
    chosen = next((file for file in files if not file.exists() or file.read_bytes() == text), None)
    if chosen is None:
        raise UserError(f"{out} exists and is another script; choose another --out")
    (home() / "logs").mkdir(parents=True, exist_ok=True)
    write_whole(chosen, text)
    return chosen


def _script(profile: Profile, program: list[str], name: str, jobs: int | None) -> str:
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
        "output": log_pattern("%x-%A_%a.log" if array else "%x-%j.log"),
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
