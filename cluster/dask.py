"""Pools of Dask workers: processes of this machine, a running scheduler, or SLURM jobs."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import logging
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import CancelledError
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from typing import Any

from wmcache.cluster.tasks import AHEAD, Calls, Cluster, catch_user_error, log
from wmcache.common.allocator import MALLOC
from wmcache.common.cpus import SPINS, limit_threads
from wmcache.common.errors import UserError, command, reason

# Ctrl-C reaches all processes of a terminal; this one stops the workers. Warnings about cancelled tasks and a scheduler that ended first do
# not matter. The kernel kills a worker, which costs a few tasks, before the command.
LOCAL_WORKER = """
import logging, signal
from contextlib import suppress
from pathlib import Path
signal.signal(signal.SIGINT, signal.SIG_IGN)
logging.getLogger("distributed.worker.state_machine").setLevel(logging.ERROR)
logging.getLogger("distributed.worker").addFilter(lambda record: "heartbeat" not in record.getMessage())
with suppress(OSError):
    Path("/proc/self/oom_score_adj").write_text("500")
"""
OWN_GPU = """
def dask_setup(worker):
    import os
    gpus = {gpus}
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus[int(worker.name) % len(gpus)]
"""
WORKER_VARIABLES = " ".join(f"{name}={value}" for name, value in {**MALLOC, **SPINS}.items())
"""Environment variables of workers that this process does not start itself."""
SECONDS_TO_CONNECT = 10
SECONDS_BETWEEN_COUNTS = 5.0
QUEUE_AT_SCHEDULER = {"distributed.scheduler.worker-saturation": 1.0}
"""Assign a task only to a free thread: Dask counts the death of a worker against all tasks assigned to it."""
MUST_MATCH = ("python", "dask", "distributed", "wmcache")

_alone = threading.Lock()


@contextmanager
def open_dask_pool(where: Cluster, workers: int, threads: int, label: str, *, dashboard: bool) -> Iterator[_DaskPool]:
    """Open a pool of Dask workers; arguments and errors as in `open_pool`."""
    with ExitStack() as stack:
        with dask_errors(where.text):
            importlib.import_module("distributed")
        # What these log ends as one UserError, or costs only time.
        for name in ("distributed.client", "distributed.nanny", "distributed.scheduler", "tornado.application"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        keep_workers: Callable[[], None] = lambda: None  # noqa: E731
        if where.address is not None:
            client = stack.enter_context(_connect(where.address))
        elif where.profile is not None:
            from wmcache.cluster.slurm import submit_workers

            client, keep_workers = stack.enter_context(submit_workers(where, where.profile, workers, threads))
        else:
            client = stack.enter_context(_start_workers(workers, threads))
        if dashboard and importlib.util.find_spec("bokeh"):
            with suppress(KeyError):  # a scheduler without a dashboard
                log(f"dashboard: {client.dashboard_link}")
        if where.elsewhere:
            _wait_for_workers(client, where, keep_workers)
        yield stack.enter_context(closing(_DaskPool(client, where, label, threads, keep_workers)))


class _DaskPool:
    """A pool of the workers of a Dask client; it calls `keep_workers` repeatedly while it waits."""

    def __init__(self, client: Any, where: Cluster, label: str, threads: int, keep_workers: Callable[[], None]) -> None:
        from distributed import as_completed

        self._client, self._where, self._keep_workers = client, where, keep_workers
        self._alone = threads == 1
        # The scheduler queues tasks of one large group instead of assigning them before a thread is free.
        self._group, self._numbers = f"{label}-{uuid.uuid4().hex}", itertools.count()
        self._completed = as_completed(loop=client.loop)
        self._running: dict[Any, Hashable] = {}
        self._threads: dict[str, int] = {}
        self._counted = -SECONDS_BETWEEN_COUNTS

    @property
    def workers(self) -> int:
        return len(self._count_threads())

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def room(self) -> int:
        return max(0, AHEAD * max(1, sum(self._count_threads().values())) - self.running)

    def _count_threads(self) -> dict[str, int]:
        if time.monotonic() > self._counted + SECONDS_BETWEEN_COUNTS:
            with _connection_errors(self._where):
                self._threads = self._client.nthreads()
            self._counted = time.monotonic()
        return self._threads

    def submit(self, calls: Calls) -> None:
        from distributed.protocol.pickle import dumps

        # As bytes, so that the scheduler does not import what only workers need.
        if packed := [(key, dumps(call)) for key, call in calls]:
            keys, tasks = zip(*packed, strict=True)
            names = [(self._group, next(self._numbers)) for _ in packed]
            with _connection_errors(self._where):
                futures = self._client.map(_run_packed, tasks, key=names, pure=False, alone=self._alone)
            self._running |= dict(zip(futures, keys, strict=True))
            self._completed.update(futures)

    def finished(self) -> list[tuple[Any, Any]]:
        while not self._completed.has_ready():
            self._keep_workers()
            with self._completed.thread_condition:
                self._completed.thread_condition.wait(0.1)
        return [(self._running.pop(future), self._result(future)) for future in self._completed.next_batch(block=False)]

    def _result(self, future: Any) -> Any:
        from distributed import KilledWorker

        try:
            return future.result()
        except KilledWorker:  # on several workers, since Dask tries it again
            memory = "out of memory; lower --batch-size, start fewer workers, or give them more memory"
            return UserError(f"all workers that tried it were killed, probably {memory}")
        except CancelledError:
            raise _lost_scheduler(self._where) from None
        except OSError as error:
            if future.status == "error":  # raised by the task
                raise
            raise _lost_scheduler(self._where) from error

    def close(self) -> None:
        if self._running and self._client.status == "running":
            with suppress(Exception):  # the error that ended the block matters more
                self._client.cancel(list(self._running))


def _run_packed(packed: bytes, *, alone: bool) -> Any:
    """Run a task on a worker; `alone` waits for other tasks of the process, whose number of threads its user chose."""
    from distributed.protocol.pickle import loads

    call = loads(packed)
    with _alone if alone else nullcontext():
        return catch_user_error(call)


@contextmanager
def _start_workers(workers: int, threads: int) -> Iterator[Any]:
    """Start worker processes on this machine; yields a client."""
    import dask
    from distributed import Client, LocalCluster

    limit_threads(workers)
    settings: dict[str, Any] = {
        "distributed.nanny.pre-spawn-environ": MALLOC,  # Dask's own threshold halves the speed of an encoder
        "distributed.worker.multiprocessing-method": "spawn",
        "distributed.worker.preload": [LOCAL_WORKER, *_own_gpus()],
        # With a user's settings for other clusters, workers of this machine would not start, or would stop.
        "distributed.comm.require-encryption": False,
        "distributed.scheduler.idle-timeout": None,
        "distributed.worker.lifetime.duration": None,
        **QUEUE_AT_SCHEDULER,
    }
    with ExitStack() as stack:
        with dask_errors(f"local:{workers}"):
            stack.enter_context(dask.config.set(settings))
            cluster = LocalCluster(
                n_workers=workers, threads_per_worker=threads, protocol="tcp://", dashboard_address="127.0.0.1:0"
            )
            stack.enter_context(cluster)
            client = stack.enter_context(Client(cluster, set_as_default=False))
        yield client


def _own_gpus() -> list[str]:
    """Return a preload script that gives each worker one of several GPUs, before it imports torch."""
    if "torch" not in sys.modules:
        return []
    from wmcache.common.device import visible_gpus

    return [OWN_GPU.format(gpus=gpus)] if len(gpus := visible_gpus()) > 1 else []


@contextmanager
def _connect(address: str) -> Iterator[Any]:
    """Yield a client of a running scheduler."""
    import dask
    from distributed import Client
    from distributed.versions import VersionMismatchWarning

    with dask.config.set({"distributed.comm.timeouts.connect": f"{SECONDS_TO_CONNECT}s"}):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", VersionMismatchWarning)  # `_require_same_versions` compares them
                client = Client(address, timeout=SECONDS_TO_CONNECT, set_as_default=False)
        except (OSError, ValueError, ImportError) as error:
            raise UserError(f"no scheduler at {address} ({reason(error)}); start one with: dask scheduler") from error
        with client:
            yield client


@contextmanager
def dask_errors(text: str) -> Iterator[None]:
    """Raise errors of Dask's start, which the user's settings cause, as a UserError about `--cluster`."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError, TypeError, OSError, ImportError) as error:
        hint = "check your settings of Dask: $DASK_CONFIG, else ~/.config/dask, and DASK_* variables"
        raise UserError(f"--cluster {text}: Dask cannot start ({reason(error)}); {hint}") from error


def _wait_for_workers(client: Any, where: Cluster, keep_workers: Callable[[], None]) -> None:
    """Wait for the first worker, and compare versions."""
    with _connection_errors(where):
        if not client.nthreads():
            start = f"{WORKER_VARIABLES} {command('dask', 'worker', where.address, '--nthreads', 2)}"
            hint = f"start some with: {start}" if where.address else "its jobs are queued (see: squeue --me)"
            log(f"{where.text}: no workers yet; {hint}")
            while not client.nthreads():
                keep_workers()
                time.sleep(0.5)
        versions = client.get_versions(packages=["wmcache"])
    require_same_versions(versions, where)


def require_same_versions(versions: dict[str, Any], where: Cluster) -> None:
    """Raise a UserError if the scheduler or a worker has another version of `MUST_MATCH`; `versions` is `Client.get_versions()`."""
    wanted = _versions(versions["client"])
    for process, found in {"the scheduler": versions["scheduler"], **versions["workers"]}.items():
        for name, version in _versions(found).items():
            if version != wanted[name]:
                differing = f"{name} is {wanted[name]} here and {version} at {process}"
                raise UserError(f"{where.text}: {differing}; install the same version, and restart that process")


def _versions(found: Any) -> dict[str, str]:
    packages = found.get("packages", {}) if isinstance(found, dict) else {}
    versions = {name: str(packages.get(name) or "missing") for name in MUST_MATCH}
    return versions | {"python": ".".join(versions["python"].split(".")[:2])}


@contextmanager
def _connection_errors(where: Cluster) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _lost_scheduler(where) from error


def _lost_scheduler(where: Cluster) -> UserError:
    return UserError(f"the scheduler of {where.text} has gone; start one again, then run the same command again")
