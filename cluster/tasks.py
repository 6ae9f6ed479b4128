"""Run idempotent tasks in this process, in worker processes of this machine, at a Dask scheduler, or in SLURM jobs."""

from __future__ import annotations

import itertools
import re
import sys
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, Self, TypeVar, cast

import psutil
from tqdm import tqdm

from wmcache.cluster.profiles import Profile, read_profile
from wmcache.common.cpus import available_cpus
from wmcache.common.errors import UserError, one_line
from wmcache.common.memory import available_ram
from wmcache.common.progress import seconds_between_updates

Item = TypeVar("Item")
State = TypeVar("State")
T = TypeVar("T")
Calls = Iterable[tuple[Hashable, Callable[[], Any]]]
"""Tasks, each with a key that is returned with its result."""

MOST_FAILURES = 8
"""Abort after this many consecutive failures, or after two for each thread of the pool if that is more."""
AHEAD = 3
"""Tasks submitted per thread. The scheduler keeps a queue only if there are more than two; its size does not grow with all tasks."""

_state_lock = threading.RLock()
_states: deque[tuple[WorkerTask[Any, Any], Any]] = deque(maxlen=2)
_bar_lock = threading.Lock()
_reported = threading.local()
_bar: Any = None
"""The progress bar of the tasks that run in this process."""


@dataclass(frozen=True)
class Cluster:
    """The value of `--cluster`: processes of this machine, the address of a running scheduler, or the profile of SLURM jobs."""

    text: str
    workers: int
    """Processes or jobs; 0 if only the scheduler knows."""
    address: str | None = None
    profile: Profile | None = None

    @property
    def elsewhere(self) -> bool:
        """Whether tasks may run on other machines."""
        return self.address is not None or self.profile is not None


def parse_cluster(text: str) -> Cluster:
    """Parse `local[:N]` (one process per CPU; `local:1` is this process), `tcp://HOST:PORT` or `slurm[:PROFILE]`."""
    kind, colon, rest = text.partition(":")
    if kind == "local" and (not colon or re.fullmatch("[1-9][0-9]{0,3}", rest)):
        return Cluster(text, int(rest) if colon else available_cpus())
    if re.fullmatch(r"tcp://(\[[0-9a-fA-F:.]+\]|[^\s/:\[\]]+):[0-9]{1,5}", text):
        return Cluster(text, 0, address=text)
    if kind == "slurm" and (rest or not colon):
        profile = read_profile(rest or "slurm")
        return Cluster(text, profile.jobs, profile=profile)
    raise UserError(f"no cluster {text!r}; write local, local:N, tcp://HOST:PORT, slurm or slurm:PROFILE")


class WorkerTask(ABC, Generic[Item, State]):
    """A picklable task whose state, such as a loaded network, is set up once per process.

    A subclass is a frozen dataclass of plain values, which identify the state: where files may change under the same path, one of them is
    a checksum.
    """

    @abstractmethod
    def setup(self) -> State:
        """Load what `run` needs; a UserError fails the item."""

    @abstractmethod
    def run(self, state: State, item: Item) -> int:
        """Do one item, in any thread of the process; returns its units."""

    def with_state(self, state: State) -> Self:
        """Use a loaded state, in this process only."""
        vars(self)["_state"] = state
        return self

    def __call__(self, item: Item) -> int:
        """Do one item."""
        return self.run(vars(self)["_state"] if "_state" in vars(self) else _kept_state(self), item)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the state."""
        return {name: value for name, value in vars(self).items() if name != "_state"}


def _kept_state(task: WorkerTask[Any, State]) -> State:
    """Return the state of a task; the latest two are kept, since two commands may share a worker."""
    with _state_lock:
        for known, state in _states:
            if known == task:
                return cast(State, state)
        loaded = task.setup()
        _states.append((task, loaded))
        return loaded


class Pool(Protocol):
    """Takes tasks and returns results as they finish. A `UserError` of a task is its result; other exceptions stop all tasks."""

    @property
    def workers(self) -> int:
        """Number of processes now."""

    @property
    def running(self) -> int:
        """Number of tasks whose result has not been returned yet."""

    @property
    def room(self) -> int:
        """Number of tasks to submit now, so that no thread is idle."""

    def submit(self, calls: Calls) -> None:
        """Take picklable tasks."""

    def finished(self) -> list[tuple[Any, Any]]:
        """Wait for some running tasks; returns their keys and results, or raises UserError if the scheduler has gone."""


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
    """Run a picklable task on every item, with a progress bar. A task returns its units, and may `report` some of them earlier.

    Args:
        threads: tasks in flight per process, so that one reads or writes while another computes. With 1, a task has the process to itself.
        total: units of all items.
        what: name of the items in messages.
        more: hint, logged where there are fewer items than workers.

    Raises:
        UserError: the cluster is not available or was lost, or items failed. All others are done, except after many consecutive failures.
    """
    if not items:
        return
    failures: list[str] = []
    in_a_row = done = 0
    with ExitStack() as stack:
        if isinstance(cluster, str):
            pool = stack.enter_context(open_pool(cluster, threads=threads, most=len(items), label=label))
            workers = max(parse_cluster(cluster).workers, pool.workers)
        else:
            pool, workers = cluster, cluster.workers
        if more and len(items) < workers:
            log(f"{label}: {len(items)} {what} for {workers} workers; {more}")
        updates = seconds_between_updates()
        bar = stack.enter_context(tqdm(total=total, desc=label, unit=f" {unit}", mininterval=updates, leave=leave))
        stack.callback(_report_to, _report_to(bar))
        for outcome in _outcomes(partial(_run_reporting, task), items, pool):
            done += 1
            if isinstance(outcome, UserError):
                failures.append(str(outcome))
                in_a_row += 1
                if in_a_row >= max(MOST_FAILURES, 2 * threads * pool.workers):
                    break
            else:
                with _bar_lock:
                    bar.update(outcome[0] - outcome[1])
                in_a_row = 0
    if failures:
        rest = f"{len(items) - done} were not tried" if done < len(items) else "the others are done"
        raise UserError(f"{len(failures)} of {len(items)} {what} failed, {rest}; the first: {failures[0]}")


def report(units: int) -> None:
    """Count units of the running task on the progress bar of this process, if it has one."""
    if _bar is not None:
        with _bar_lock:
            _reported.units = getattr(_reported, "units", 0) + units
            _bar.update(units)


def log(line: str) -> None:
    """Print a line on stderr, above the progress bars."""
    tqdm.write(one_line(line), file=sys.stderr)


def _run_reporting(task: Callable[[Item], int], item: Item) -> tuple[int, int]:
    """Run a task; returns its units, and how many of them are on the progress bar already."""
    _reported.units = 0
    return task(item), _reported.units


def _report_to(bar: Any) -> Any:
    """Set the progress bar of `report`; returns the one before."""
    global _bar
    before, _bar = _bar, bar
    return before


def _outcomes(task: Callable[[Item], T], items: Iterable[Item], pool: Pool) -> Iterator[T | UserError]:
    waiting = iter(items)
    while True:
        pool.submit((None, partial(task, item)) for item in itertools.islice(waiting, pool.room))
        if not pool.running:
            return
        for _, outcome in pool.finished():
            yield outcome


def run_alone(call: Callable[[], T], *, cluster: str, label: str) -> T:
    """Run a single task: on a worker if the cluster has other machines, else in this process."""
    if not parse_cluster(cluster).elsewhere:
        return call()
    with open_pool(cluster, most=1, label=label) as pool:
        pool.submit([(None, call)])
        ((_, outcome),) = pool.finished()
    if isinstance(outcome, UserError):
        raise outcome
    return cast(T, outcome)


@contextmanager
def open_pool(
    cluster: str, *, threads: int = 1, most: int | None = None, label: str, always_dask: bool = False
) -> Iterator[Pool]:
    """Open a pool for `most` tasks. Its processes or jobs end with the block, and queued tasks are cancelled.

    With `always_dask`, Dask's processes are started even for `local:1`, to measure them.
    """
    where = parse_cluster(cluster)
    workers = where.workers if most is None else min(where.workers, most)
    if not where.elsewhere:
        workers = _workers_in_memory(workers, label)
        if workers == 1 and not always_dask:
            with closing(_ThisProcess(threads)) as pool:
                yield pool
            return
    from wmcache.cluster.dask import open_dask_pool  # half a second that a run in this process does not need

    with open_dask_pool(where, workers, threads, label, dashboard=not always_dask) as dask_pool:
        yield dask_pool


def _workers_in_memory(workers: int, label: str) -> int:
    """Reduce the number of workers, each about as large as this process, to what memory has room for, at least 1."""
    free, each = available_ram(), psutil.Process().memory_info().rss
    fitting = max(1, min(workers, free // each))
    if fitting < workers:
        memory = f"{free / 1e9:.1f} GB of memory are available, each takes about {each / 1e9:.1f} GB"
        log(f"{label}: {fitting} of {workers} workers; {memory}")
    return fitting


class _ThisProcess:
    """A pool of this process. With one thread, a task runs when its result is asked for."""

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
            self._futures |= {self._executor.submit(catch_user_error, call): key for key, call in calls}

    def finished(self) -> list[tuple[Any, Any]]:
        if self._threads == 1:
            key, call = self._calls.pop(0)
            return [(key, catch_user_error(call))]
        done = wait(self._futures, return_when=FIRST_COMPLETED).done
        return [(self._futures.pop(future), future.result()) for future in done]

    def close(self) -> None:
        self._executor.shutdown(cancel_futures=True)


def catch_user_error(call: Callable[[], T]) -> T | UserError:
    """Return a `UserError` instead of raising it."""
    try:
        return call()
    except UserError as error:
        return error
