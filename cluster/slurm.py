"""Dask workers in SLURM jobs, through dask-jobqueue, and the parts of a batch script."""

from __future__ import annotations

import importlib
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
from wmcache.common.folders import home

SECONDS_BETWEEN_SUBMISSIONS = 30.0
MOST_CHECKS_WITHOUT_JOBS = 2
"""Abort after this many consecutive checks with neither a worker nor a queued or running job."""


@contextmanager
def submit_workers(
    where: Cluster, profile: Profile, jobs: int, threads: int
) -> Iterator[tuple[Any, Callable[[], None]]]:
    """Submit jobs with one worker each; yields a client, and what submits ended jobs again.

    Raises:
        UserError: dask-jobqueue or sbatch is missing, or SLURM does not accept such a job.
    """
    import dask
    from distributed import Client

    try:
        slurm = import_slurm()
    except ImportError:
        raise UserError(
            f"--cluster {where.text}: dask-jobqueue is not installed; pip install 'wmcache[cluster]'"
        ) from None
    if shutil.which("sbatch") is None:
        raise UserError(
            f"--cluster {where.text}: sbatch is not installed; run on a machine that submits to SLURM, or choose local"
        )
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
            raise UserError(
                f"the jobs of {where.text} end before their workers connect; see their logs in {home().absolute() / 'logs'}, "
                "correct the profile, and run the same command again"
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
            f"--output={log_pattern(home().absolute() / 'logs', '%x-%j.log')}",
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


def log_pattern(folder: Path, pattern: str) -> str:
    """Quote a folder for `#SBATCH --output=`, which SLURM parses, not a shell; raises UserError if SLURM cannot write there."""
    text = str(folder)
    if not text.isprintable() or "\\" in text:
        raise UserError(f"{text}: SLURM cannot write its logs there; set WMCACHE_HOME to another folder")
    name = text.replace("%", "%%").replace('"', '\\"')
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
        last = (tried.stderr.strip().splitlines() or [f"status {tried.returncode}"])[-1]
        raise UserError(
            f"--cluster {where.text}: SLURM does not accept such a job ({last[:200]}); correct the profile, or see: sinfo"
        )
