"""Where tasks run: in this process, in others of this machine, at a Dask scheduler that is running, or in jobs of a batch system.

Tasks are idempotent and results come as they finish, so a worker that is lost costs no more than what it was at. The scheduler is told of
a few tasks for each of its threads at a time, and of more as these finish, so it holds no more of a million than of a hundred.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import logging
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import psutil
from tqdm import tqdm

from wmcache.cluster.profiles import Profile, log_pattern, read_profile
from wmcache.common.cpus import SPINS, available_cpus, limit_threads
from wmcache.common.errors import UserError, command, one_line
from wmcache.common.folders import home
from wmcache.common.memory import available_ram
from wmcache.common.progress import seconds_between_updates

Item = TypeVar("Item")
T = TypeVar("T")
Calls = Iterable[tuple[Hashable, Callable[[], Any]]]
"""Tasks, each with what is to come back beside its result."""

# Ctrl-C goes to all processes of a terminal, and this one tells the others; of tasks that are cancelled then nobody need read, nor of a
# scheduler that has gone a moment before its workers.
SILENT = """
import logging, signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
logging.getLogger("distributed.worker.state_machine").setLevel(logging.ERROR)
logging.getLogger("distributed.worker").addFilter(lambda record: "heartbeat" not in record.getMessage())
"""
FIRST_TO_GO = """
from contextlib import suppress
from pathlib import Path
with suppress(OSError):
    Path("/proc/self/oom_score_adj").write_text("500")
"""
"""Where memory runs out the kernel then kills a worker, which costs a few tasks, and not the command."""
OWN_GPU = """
def dask_setup(worker):
    import os
    gpus = {gpus}
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus[int(worker.name) % len(gpus)]
"""
KEEP_MEMORY = "MALLOC_TRIM_THRESHOLD_=268435456 MALLOC_MMAP_THRESHOLD_=33554432"
"""What the allocator comes to by itself; a Dask nanny would have it give freed memory back at once, which halves an encoder's speed."""
WORKER_VARIABLES = " ".join([KEEP_MEMORY, *(f"{name}={value}" for name, value in SPINS.items())])
"""What a worker that is not a child of ours gets."""
GIVE_UP = 8
"""Failures one after another that are enough, where there are no more than half as many threads."""
AHEAD = 3
"""Tasks in the scheduler's hands for each thread: more than 2, so that it keeps those that no thread is free for to itself."""
SECONDS_TO_CONNECT = 10
SECONDS_BETWEEN_COUNTS = 5.0
SECONDS_BETWEEN_SUBMISSIONS = 30.0
LOCAL_SETTINGS = {
    "distributed.comm.require-encryption": False,
    "distributed.scheduler.idle-timeout": None,
    "distributed.worker.lifetime.duration": None,
}
"""A user's own settings of Dask are for other clusters; with these a pool of this machine would not start, or would end by itself."""
KEEP_BACK = {"distributed.scheduler.worker-saturation": 1.0}
"""A scheduler of ours hands out no task that no thread is free for: it would be blamed for that worker's death."""
BARREN = 2
"""Looks, so long apart, at which there is neither a worker nor a job that could become one."""
MUST_MATCH = ("python", "dask", "distributed", "wmcache")

_alone = threading.Lock()
_counting = threading.Lock()
_reported = threading.local()
_bar: Any = None
"""The progress bar of the tasks that run in this process."""


@dataclass(frozen=True)
class Cluster:
    """What `--cluster` says.

    Attributes:
        text: as it was written.
        workers: processes of this machine, or jobs; 0 where only the scheduler knows.
        address: of a scheduler that is running. profile: of a batch system's jobs.
    """

    text: str
    workers: int
    address: str | None = None
    profile: Profile | None = None

    @property
    def elsewhere(self) -> bool:
        """Whether tasks may run on other machines."""
        return self.address is not None or self.profile is not None


def parse_cluster(text: str) -> Cluster:
    """Read `local[:N]`, `tcp://HOST:PORT` or `slurm[:PROFILE]`.

    `local:N` is N processes of this machine, `local` one for each available CPU, and `local:1` this process.

    Raises:
        UserError: it is none of these, or the profile cannot be used.
    """
    kind, colon, rest = text.partition(":")
    if kind == "local" and (not colon or re.fullmatch("[1-9][0-9]{0,3}", rest)):
        return Cluster(text, int(rest) if colon else available_cpus())
    if re.fullmatch(r"tcp://(\[[0-9a-fA-F:.]+\]|[^\s/:\[\]]+):[0-9]{1,5}", text):
        return Cluster(text, 0, address=text)
    if kind == "slurm" and (rest or not colon):
        profile = read_profile(rest or "slurm")
        return Cluster(text, profile.jobs, profile=profile)
    raise UserError(f"no cluster {text!r}; write local, local:N, tcp://HOST:PORT, slurm or slurm:PROFILE")


def report(units: int) -> None:
    """Count units of a task that runs before it ends, on the bar of this process if the task runs here."""
    if _bar is not None:
        with _counting:
            _reported.units = getattr(_reported, "units", 0) + units
            _bar.update(units)


def _reporting(task: Callable[[Item], int], item: Item) -> tuple[int, int]:
    """The units that a task did, and how many of them it has reported on this process's bar."""
    _reported.units = 0
    return task(item), _reported.units


class Pool(Protocol):
    """Takes tasks, and gives results as they finish. A task that raises a `UserError` has it as its result; others stop all."""

    @property
    def workers(self) -> int:
        """Processes that there are now."""

    @property
    def running(self) -> int:
        """Tasks of which the result has not been given yet."""

    @property
    def room(self) -> int:
        """Tasks that it takes now, so that nobody is idle."""

    def submit(self, calls: Calls) -> None:
        """Take tasks, which have to be picklable."""

    def finished(self) -> list[tuple[Any, Any]]:
        """Wait for some that are running: what was submitted with each, and its result.

        Raises:
            UserError: the scheduler has gone.
        """


def run_tasks(
    task: Callable[[Item], int],
    items: Sequence[Item],
    *,
    cluster: str | Pool = "local:1",
    threads: int = 1,
    total: int,
    label: str,
    unit: str = "frames",
    what: str = "shards",
    more: str = "",
    leave: bool = True,
) -> None:
    """Run `task` on every item, showing a rate and an ETA.

    Args:
        task: picklable; returns how many units it did, and may `report` them as it does them. A `UserError` in it fails that item only.
        items: one for each task.
        cluster: where, see `parse_cluster`; or a pool that is open.
        threads: tasks in flight in each process, so that one reads or writes while another computes; in 1, a task has the process to
            itself.
        total: units in all items together.
        label: what the progress bar says.
        unit: of the rate. what: items are called.
        more: what makes more items of the same work, for the line that says that there are fewer than workers.
        leave: the bar stays when it is full.

    Raises:
        UserError: the cluster cannot be had, or has gone; or some items failed, and the others were done, unless so many failed one
            after another that a disk must be full, or a server gone.
    """
    failures: list[str] = []
    in_a_row = done = 0
    if not items:
        return
    with (
        nullcontext(cluster)
        if not isinstance(cluster, str)
        else open_pool(cluster, threads=threads, most=len(items), label=label) as pool,
        tqdm(total=total, desc=label, unit=f" {unit}", mininterval=seconds_between_updates(), leave=leave) as bar,
        _showing(bar),
        closing(_outcomes(partial(_reporting, task), items, pool)) as outcomes,
    ):
        wanted = parse_cluster(cluster).workers if isinstance(cluster, str) else 0
        if more and len(items) < max(wanted, pool.workers):
            _say(f"{label}: {len(items)} {what} for {max(wanted, pool.workers)} workers; {more}")
        for outcome in outcomes:
            done += 1
            if isinstance(outcome, UserError):
                failures.append(str(outcome))
                in_a_row += 1
                if in_a_row >= max(GIVE_UP, 2 * threads * pool.workers):
                    break
            else:
                with _counting:
                    bar.update(outcome[0] - outcome[1])
                in_a_row = 0
    if done < len(items):
        raise UserError(
            f"{in_a_row} {what} failed one after another, so {len(items) - done} of {len(items)} were not tried; the first: {failures[0]}"
        )
    if failures:
        raise UserError(f"{len(failures)} of {len(items)} {what} failed, the others are done; the first: {failures[0]}")


@contextmanager
def _showing(bar: Any) -> Iterator[None]:
    """Let tasks in this process report on this bar."""
    global _bar
    before, _bar = _bar, bar
    try:
        yield
    finally:
        _bar = before


def _outcomes(task: Callable[[Item], T], items: Sequence[Item], pool: Pool) -> Generator[T | UserError]:
    waiting = iter(items)
    while True:
        pool.submit((None, partial(task, item)) for item in itertools.islice(waiting, pool.room))
        if not pool.running:
            return
        for _, outcome in pool.finished():
            yield outcome


def run_alone(call: Callable[[], T], *, cluster: str, label: str) -> T:
    """Run a single task: on a worker of a cluster of other machines, else here.

    Raises:
        UserError: the task's; or the cluster cannot be had, or has gone.
    """
    if not parse_cluster(cluster).elsewhere:
        return call()
    with open_pool(cluster, most=1, label=label) as pool:
        pool.submit([(None, call)])
        ((_, outcome),) = pool.finished()
    if isinstance(outcome, UserError):
        raise outcome
    result: T = outcome
    return result


@contextmanager
def open_pool(
    cluster: str, *, threads: int = 1, most: int | None = None, label: str, always_dask: bool = False
) -> Iterator[Pool]:
    """What takes tasks; its processes of this machine, or its jobs, end with the block, and what is queued is cancelled.

    Args:
        cluster: where, see `parse_cluster`.
        threads: tasks in flight in each process.
        most: tasks that there are, so that no more processes are started.
        label: of the tasks, on the dashboard.
        always_dask: Dask's processes even for `local:1`, to measure them.

    Raises:
        UserError: the cluster cannot be had.
    """
    where = parse_cluster(cluster)
    workers = where.workers if most is None else min(where.workers, most)
    if not where.elsewhere:
        workers = _fitting(workers, label)
    if workers == 1 and not where.elsewhere and not always_dask:
        with _Here(threads) as here:
            yield here
        return
    with ExitStack() as stack:
        with _dask_errors(where.text):
            # Imported here: it costs half a second that a run in this process need not pay.
            importlib.import_module("distributed")
        stack.enter_context(_quiet())
        if where.address is not None:
            client = stack.enter_context(_running_scheduler(where.address))
            tend: Callable[[], None] = _nothing
        elif where.profile is not None:
            client, tend = stack.enter_context(_slurm(where, workers, threads))
        else:
            client, tend = stack.enter_context(_local(workers, threads)), _nothing
        if importlib.util.find_spec("bokeh") and not always_dask:
            with suppress(KeyError):  # a scheduler may have none
                _say(f"dashboard: {client.dashboard_link}")
        if where.elsewhere:
            _wait_for_workers(client, where, tend)
        yield stack.enter_context(_Dask(client, where, label, threads, tend))


def _fitting(workers: int, label: str) -> int:
    """As many workers of those asked for as memory has room for, with a line where it is fewer; at least 1.

    A worker loads what this process has loaded, so it takes about as much.
    """
    if workers == 1:
        return 1
    free, each = available_ram(), psutil.Process().memory_info().rss
    fitting = max(1, min(workers, free // each))
    if fitting < workers:
        _say(
            f"{label}: {fitting} of {workers} workers; {free / 1e9:.1f} GB of memory are available, "
            f"and each takes about {each / 1e9:.1f} GB"
        )
    return fitting


class _Here:
    """A pool of this process; without threads, a task is run when its result is asked for."""

    workers = 1

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._executor = ThreadPoolExecutor(threads)
        self._futures: dict[Future[Any], Hashable] = {}
        self._calls: list[tuple[Hashable, Callable[[], Any]]] = []

    @property
    def running(self) -> int:
        return len(self._futures) + len(self._calls)

    @property
    def room(self) -> int:
        return max(0, AHEAD * self._threads - self.running)

    def submit(self, calls: Calls) -> None:
        if self._threads == 1:
            self._calls += calls
        else:
            self._futures |= {self._executor.submit(_guarded, call): known for known, call in calls}

    def finished(self) -> list[tuple[Any, Any]]:
        if self._threads == 1:
            known, call = self._calls.pop(0)
            return [(known, _guarded(call))]
        done = wait(self._futures, return_when=FIRST_COMPLETED).done
        return [(self._futures.pop(future), future.result()) for future in done]

    def __enter__(self) -> _Here:
        return self

    def __exit__(self, *raised: object) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)


class _Dask:
    """A pool of a Dask cluster's workers."""

    def __init__(self, client: Any, where: Cluster, label: str, threads: int, tend: Callable[[], None]) -> None:
        from distributed import as_completed

        self._client, self._where, self._tend = client, where, tend
        self._alone = threads == 1
        # One group for all, by whose size the scheduler knows that these need not be handed out before a thread is free.
        self._group, self._numbers = f"{label}-{uuid.uuid4().hex}", itertools.count()
        self._completed = as_completed(loop=client.loop)
        self._running: dict[Any, Hashable] = {}
        self._threads: dict[str, int] = {}
        self._counted = -SECONDS_BETWEEN_COUNTS

    @property
    def workers(self) -> int:
        return len(self._count())

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def room(self) -> int:
        return max(0, AHEAD * max(1, sum(self._count().values())) - self.running)

    def _count(self) -> dict[str, int]:
        if time.monotonic() > self._counted + SECONDS_BETWEEN_COUNTS:
            with _talking_to(self._where):
                self._threads = self._client.nthreads()
            self._counted = time.monotonic()
        return self._threads

    def submit(self, calls: Calls) -> None:
        # As bytes, so that the scheduler need not import what only workers use.
        from distributed.protocol.pickle import dumps

        known, packed = [], []
        for item, call in calls:
            known.append(item)
            packed.append(dumps(call))
        if packed:
            keys = [(self._group, next(self._numbers)) for _ in packed]
            with _talking_to(self._where):
                futures = self._client.map(_unpacked, packed, key=keys, pure=False, alone=self._alone)
            self._running |= dict(zip(futures, known, strict=True))
            self._completed.update(futures)

    def finished(self) -> list[tuple[Any, Any]]:
        while not self._completed.has_ready():
            self._tend()
            with self._completed.thread_condition:
                self._completed.thread_condition.wait(0.1)
        return [(self._running.pop(future), self._result(future)) for future in self._completed.next_batch(block=False)]

    def _result(self, future: Any) -> Any:
        from distributed import KilledWorker

        try:
            return future.result()
        except KilledWorker:  # Dask has tried it on several
            if self._where.profile is not None:
                more = "raise memory in the profile"
            elif self._where.elsewhere:
                more = "give workers more memory"
            else:
                more = f"the N of --cluster local:N ({available_ram() / 1e9:.1f} GB of memory are available)"
            return UserError(
                "every worker process that tried it was killed, most likely because memory ran out; "
                f"lower --batch-size, or {more}"
            )
        except CancelledError:
            raise _gone(self._where) from None
        except OSError as error:
            if future.status == "error":  # the task's own
                raise
            raise _gone(self._where) from error

    def __enter__(self) -> _Dask:
        return self

    def __exit__(self, *raised: object) -> None:
        if self._running and self._client.status == "running":
            with suppress(Exception):  # whatever it is, there is more to say of what has led here
                self._client.cancel(list(self._running))


def _guarded(call: Callable[[], T]) -> T | UserError:
    """Returns a `UserError` instead of raising it, so that one bad shard does not stop the others."""
    try:
        return call()
    except UserError as error:
        return error


def _unpacked(packed: bytes, *, alone: bool) -> Any:
    """Run a task on a worker."""
    from distributed.protocol.pickle import loads

    call = loads(packed)
    # Whoever starts a worker says how many threads it has.
    with _alone if alone else nullcontext():
        return _guarded(call)


@contextmanager
def _local(workers: int, threads: int) -> Iterator[Any]:
    """A client of so many processes of this machine, with so many tasks in flight in each."""
    import dask
    from distributed import Client, LocalCluster

    limit_threads(workers)
    settings: dict[str, Any] = {
        "distributed.nanny.pre-spawn-environ": {},  # without Dask's MALLOC_TRIM_THRESHOLD_, see KEEP_MEMORY
        "distributed.worker.multiprocessing-method": "spawn",
        "distributed.worker.preload": [SILENT, FIRST_TO_GO, *_own_gpus()],
        **LOCAL_SETTINGS,
        **KEEP_BACK,
    }
    with ExitStack() as stack:
        with _dask_errors(f"local:{workers}"):
            stack.enter_context(dask.config.set(settings))
            cluster = LocalCluster(
                n_workers=workers, threads_per_worker=threads, protocol="tcp://", dashboard_address="127.0.0.1:0"
            )
            stack.enter_context(cluster)
            client = stack.enter_context(Client(cluster, set_as_default=False))
        try:
            yield client
        except KeyboardInterrupt:
            # All processes of a terminal are told: those that end sooner leave callbacks that miss them.
            logging.getLogger("tornado.application").setLevel(logging.CRITICAL)
            raise


@contextmanager
def _dask_errors(text: str) -> Iterator[None]:
    """Errors of Dask while it starts as one line; a user's own settings cause them."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError, TypeError, OSError, ImportError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"--cluster {text}: Dask cannot start ({reason}); check your settings of Dask: "
            "the folder $DASK_CONFIG, else ~/.config/dask, and DASK_* variables"
        ) from error


def _own_gpus() -> list[str]:
    """What gives each process its own of several GPUs, before it loads torch."""
    if "torch" not in sys.modules:
        return []  # whoever has not loaded it does not compute with it
    from wmcache.common.device import visible_gpus

    return [OWN_GPU.format(gpus=gpus)] if len(gpus := visible_gpus()) > 1 else []


@contextmanager
def _running_scheduler(address: str) -> Iterator[Any]:
    """A client of a scheduler that somebody else has started."""
    import dask
    from distributed import Client
    from distributed.versions import VersionMismatchWarning

    with dask.config.set({"distributed.comm.timeouts.connect": f"{SECONDS_TO_CONNECT}s"}):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", VersionMismatchWarning)  # what has to match is compared below
                client = Client(address, timeout=SECONDS_TO_CONNECT, set_as_default=False)
        except (OSError, ValueError, ImportError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(
                f"no scheduler answers at {address} ({reason}); start one with: dask scheduler, and say --cluster with its address"
            ) from error
        with client:
            yield client


def import_slurm() -> Any:
    """The module `dask_jobqueue.slurm`, which leaves Ctrl-C to something that ends with status 0 as soon as it is imported."""
    before = signal.getsignal(signal.SIGINT)
    try:
        return importlib.import_module("dask_jobqueue.slurm")
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


@contextmanager
def _slurm(where: Cluster, jobs: int, threads: int) -> Iterator[tuple[Any, Callable[[], None]]]:
    """A client of workers in SLURM jobs, one in each, and what sees to it that jobs which have ended are submitted again."""
    import dask
    from distributed import Client

    try:
        slurm = import_slurm()
    except ImportError:
        raise UserError(
            f"--cluster {where.text} needs dask-jobqueue; install it with: pip install 'wmcache[cluster]'"
        ) from None
    if shutil.which("sbatch") is None:
        raise UserError(
            f"--cluster {where.text}: there is no sbatch on this machine; run on one that submits to SLURM, or choose --cluster local"
        )
    assert where.profile is not None
    options = slurm_options(where.profile, threads)
    (home() / "logs").mkdir(parents=True, exist_ok=True)  # SLURM makes none
    with ExitStack() as stack:
        with _dask_errors(where.text):
            stack.enter_context(dask.config.set(KEEP_BACK))
            cluster = stack.enter_context(slurm.SLURMCluster(**options))
            client = stack.enter_context(Client(cluster, set_as_default=False))
        _try_submission(cluster.job_script(), where)
        submitted, barren = time.monotonic(), 0
        cluster.scale(jobs=jobs)

        def tend() -> None:
            nonlocal submitted, barren
            if time.monotonic() > submitted + SECONDS_BETWEEN_SUBMISSIONS:
                submitted = time.monotonic()
                known = [str(job.job_id) for job in list(cluster.workers.values()) if getattr(job, "job_id", None)]
                barren = 0 if client.nthreads() or _queued(known) else barren + 1
                if barren == BARREN:
                    raise UserError(
                        f"the jobs of {where.text} end before their workers are there; see their logs in {home().absolute() / 'logs'}, "
                        "hint the profile, and run the same command again"
                    )
                cluster.scale(jobs=jobs)

        yield client, tend


def _queued(jobs: Sequence[str]) -> bool:
    """Whether any of these jobs waits or runs; True where SLURM does not say."""
    found = subprocess.run(
        ["squeue", "--noheader", "--format=%i", f"--jobs={','.join(jobs)}"], capture_output=True, text=True, check=False
    )
    known = found.returncode == 0 or "Invalid job id" in found.stderr
    return bool(found.stdout.strip()) if known and jobs else True


def slurm_options(profile: Profile, threads: int) -> dict[str, Any]:
    """What dask_jobqueue's SLURMCluster is told: a worker in each job, which ends before the walltime does.

    Args:
        profile: of the jobs; a worker uses one GPU, however many other programs are given.
        threads: tasks in flight in each.
    """
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
            # dask_jobqueue's own option for the folder is not quoted.
            f"--output={log_pattern(home().absolute() / 'logs', '%x-%j.log')}",
            *(["--gpus=1"] if profile.gpus else []),
            "--requeue",
            *profile.extra,
        ],
        "job_script_prologue": [
            *(f"module load {shlex.quote(module)} || exit" for module in profile.modules),
            *profile.setup,
            f"export WMCACHE_HOME={shlex.quote(str(home().absolute()))} {computing} {WORKER_VARIABLES}",
        ],
        "worker_extra_args": [
            *("--nthreads", str(threads)),
            *("--lifetime", f"{profile.seconds - margin - stagger}s", "--lifetime-stagger", f"{stagger}s"),
        ],
        "scheduler_options": {"dashboard_address": ":0"},
    }


def _try_submission(script: str, where: Cluster) -> None:
    """Raise UserError where SLURM would not take such a job."""
    import subprocess

    tried = subprocess.run(["sbatch", "--test-only"], input=script, capture_output=True, text=True, check=False)
    if tried.returncode:
        reason = (tried.stderr.strip().splitlines() or [f"status {tried.returncode}"])[-1][:200]
        raise UserError(f"--cluster {where.text}: SLURM takes no such job ({reason}); hint the profile, or see: sinfo")


def _wait_for_workers(client: Any, where: Cluster, tend: Callable[[], None]) -> None:
    """Wait for the first, and compare versions.

    Raises:
        UserError: the scheduler has gone, or others have other versions of what has to match.
    """
    with _talking_to(where):
        if not client.nthreads():
            hint = f"{WORKER_VARIABLES} {command('dask', 'worker', where.address, '--nthreads', 2)}"
            what = f"start some with: {hint}" if where.address else "its jobs are queued (see: squeue --me)"
            _say(f"{where.text}: no workers yet; {what}")
            while not client.nthreads():
                tend()
                time.sleep(0.5)
        found = client.get_versions(packages=["wmcache"])
    _require_same(found, where)


def _require_same(found: dict[str, Any], where: Cluster) -> None:
    """Raise UserError where the scheduler or a worker has other versions of what has to match than this process."""
    here = {name: _version(found["client"], name) for name in MUST_MATCH}
    others = {
        "the scheduler": found["scheduler"],
        **{f"worker {name}": told for name, told in found["workers"].items()},
    }
    for who, told in others.items():
        for name, wanted in here.items():
            if (there := _version(told, name)) != wanted:
                raise UserError(
                    f"{where.text}: {name} is {wanted} here and {there} at {who}; install the same on both, and start that again"
                )


def _version(told: Any, name: str) -> str:
    packages = told.get("packages", {}) if isinstance(told, dict) else {}
    version = str(packages.get(name) or "missing")
    return ".".join(version.split(".")[:2]) if name == "python" else version


@contextmanager
def _talking_to(where: Cluster) -> Iterator[None]:
    """Errors of the connection as one line about the scheduler."""
    try:
        yield
    except OSError as error:
        if where.elsewhere:
            raise _gone(where) from error
        raise


def _gone(where: Cluster) -> UserError:
    hint = "start it again, or another one" if where.address else "see its log"
    return UserError(f"the scheduler of {where.text} has gone; {hint}, then run the same command again, which goes on")


@contextmanager
def _quiet() -> Iterator[None]:
    """Dask's own words about a connection that is lost go nowhere: ours is one line."""
    client, nanny, scheduler = (logging.getLogger(f"distributed.{name}") for name in ("client", "nanny", "scheduler"))
    before = client.level
    client.setLevel(logging.CRITICAL)
    nanny.addFilter(_matters)
    scheduler.addFilter(_matters)
    try:
        yield
    finally:
        client.setLevel(before)
        nanny.removeFilter(_matters)
        scheduler.removeFilter(_matters)


def _matters(record: logging.LogRecord) -> bool:
    """Whether Dask's message is shown. Where a worker is killed, a line about memory replaces it."""
    message = record.getMessage()
    if message.startswith("Restarting worker"):
        _say(
            "a worker process was killed and is started again, most likely because memory ran out "
            f"({available_ram() / 1e9:.1f} GB are available); if it happens often, lower the N of --cluster local:N"
        )
        return False
    # A process that takes its time to end is ended. A task that is given up is reported by this program.
    return not any(words in message for words in ("still alive after", "marked as failed because"))


def _say(line: str) -> None:
    tqdm.write(one_line(line), file=sys.stderr)


def _nothing() -> None:
    pass
