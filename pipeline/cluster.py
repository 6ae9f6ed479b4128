"""Where tasks run: in this process, or in local processes under Dask. Tasks are idempotent; results come as they finish."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from tqdm import tqdm
from wmcache.cache.errors import UserError
from wmcache.cache.files import seconds_between_updates

Item = TypeVar("Item")


def run_tasks(
    task: Callable[[Item], int],
    items: Sequence[Item],
    *,
    workers: int,
    threads: int = 1,
    total: int,
    label: str,
    unit: str = "frames",
) -> None:
    """Run `task` on every item, showing a rate and an ETA.

    Args:
        task: picklable; returns how many units it did. A `UserError` in it fails that item only.
        items: one for each task.
        workers: processes; 1 means this one.
        threads: tasks in flight in each process, so that one reads or writes while another computes.
        total: units in all items together.
        label: what the progress bar says.
        unit: of the rate.

    Raises:
        UserError: some items failed; the others were done.
    """
    failures: list[str] = []
    with tqdm(total=total, desc=label, unit=f" {unit}", mininterval=seconds_between_updates()) as bar:
        for outcome in _outcomes(task, items, min(workers, len(items)), threads):
            if isinstance(outcome, UserError):
                failures.append(str(outcome))
            else:
                bar.update(outcome)
    if failures:
        raise UserError(f"{len(failures)} of {len(items)} shards failed, the others are done; the first: {failures[0]}")


def _outcomes(
    task: Callable[[Item], int], items: Sequence[Item], workers: int, threads: int
) -> Iterable[int | UserError]:
    guarded = _Guarded(task)
    if workers > 1:
        from distributed import KilledWorker
        from distributed import as_completed as dask_as_completed

        with local_client(workers, threads) as client:
            futures = client.map(guarded, items, pure=False)
            for future in dask_as_completed(futures):
                try:
                    yield future.result()
                except KilledWorker:  # Dask has tried it on several, for a worker that dies is replaced
                    yield UserError("its worker process was killed again and again; lower --workers or --batch-size")
    elif threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            futures = [pool.submit(guarded, item) for item in items]
            try:
                for future in as_completed(futures):
                    yield future.result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
    else:
        yield from map(guarded, items)


@contextmanager
def local_client(workers: int, threads: int = 1) -> Iterator[Any]:
    """A Dask client of so many processes of this machine, with so many tasks in flight in each; they end with the block."""
    # Imported here: it costs half a second that a run in this process need not pay.
    import dask
    from distributed import Client, LocalCluster

    threads_per_process = max(1, (os.cpu_count() or 1) // workers)
    settings = {
        "distributed.nanny.pre-spawn-environ": {
            "OMP_NUM_THREADS": threads_per_process,
            "MALLOC_TRIM_THRESHOLD_": 65536,
        },
        "distributed.worker.multiprocessing-method": "spawn",
        # Ctrl-C goes to all processes of a terminal; this one tells the others.
        "distributed.worker.preload": ["import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"],
        # No task waits at a worker: it would be blamed, with the one that runs, for a death of that worker.
        "distributed.scheduler.worker-saturation": 1.0,
    }
    with (
        dask.config.set(settings),
        LocalCluster(
            n_workers=workers,
            threads_per_worker=threads,
            dashboard_address=None,
            # Even without a dashboard it serves metrics, and warns where another program has its usual port.
            scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


class _Guarded(Generic[Item]):
    """Returns a `UserError` instead of raising it, so that one bad shard does not stop the others."""

    def __init__(self, task: Callable[[Item], int]) -> None:
        self._task = task

    def __call__(self, item: Item) -> int | UserError:
        try:
            return self._task(item)
        except UserError as error:
            return error
