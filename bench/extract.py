"""Extraction as a share of the bare encoder's speed and of what the machine can do; and what memory it and training take."""

from __future__ import annotations

import functools
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from wmcache.cache.writer import StoreWriter
from wmcache.cluster.tasks import open_pool, parse_cluster, run_tasks
from wmcache.common.device import CPU, autocast
from wmcache.common.errors import UserError
from wmcache.pipeline.encoders import Encoder, tcn
from wmcache.pipeline.extract import ExtractShard, extract, extract_together, extraction_task, slice_of
from wmcache.pipeline.frames import FrameDataset
from wmcache.pipeline.stores import store_card


def bench_extract(dataset: FrameDataset, encoder: Encoder, *, batch: int, cluster: str = "local:1") -> dict[str, float]:
    """Extraction against the bare model.

    Args:
        dataset: real frames; all of them are extracted, into a temporary store.
        encoder: what encodes them. batch, cluster: as in `extract`.

    Returns:
        Frames a second of the network alone on images that are already decoded, resized and normalised (before and after the
        extraction, so that a drift of the machine shows), of the encoder on frames that are already decoded, and of the extraction;
        `ratio_to_network` and `ratio_to_encoder`, the extraction's share of each.
    """
    frames, layers = dataset.read_shard(0), encoder.head.layers
    parts = [frames[start : start + batch] for start in range(0, len(frames), batch)]
    with torch.inference_mode():
        images = [encoder.preprocess(torch.from_numpy(part).to(encoder.device)) for part in parts]

    @torch.inference_mode()
    def network_rate() -> float:
        start = time.perf_counter()
        for image in images:
            with autocast(encoder.device, encoder.dtype):
                encoder.backbone(image, layers)[layers[-1]].to(torch.float16).cpu()
        return len(frames) / (time.perf_counter() - start)

    def encoder_rate() -> float:
        start = time.perf_counter()
        for part in parts:
            encoder(part).cpu()
        return len(frames) / (time.perf_counter() - start)

    encoder(parts[0])
    before, whole = network_rate(), encoder_rate()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        extract(dataset, encoder, Path(folder) / "bench.zarr", batch=batch, cluster=cluster)
        extraction = dataset.card.frames / (time.perf_counter() - start)
    after = network_rate()
    network = (before + after) / 2
    return {
        "frames": dataset.card.frames,
        "network_frames_per_second": network,
        "network_before": before,
        "network_after": after,
        "encoder_frames_per_second": whole,
        "extract_frames_per_second": extraction,
        "ratio_to_network": extraction / network,
        "ratio_to_encoder": extraction / whole,
    }


ROUNDS = 3


def bench_together(
    dataset: FrameDataset, encoders: Sequence[Encoder], *, batch: int, cluster: str = "local:1"
) -> dict[str, float]:
    """Several encoders in one pass against the first alone and against one pass each, by turns.

    Args:
        dataset: real frames; all of them are extracted again and again, into temporary stores.
        encoders: of which some share a backbone. batch, cluster: as in `extract`.

    Returns:
        Frames a second of the first alone, of all together and of all one after the other, each in its fastest round;
        `more_than_first`, what the others cost on top of the first, as a share of its time; `one_after_the_other`, how many times as
        long as together that takes.
    """
    seconds: dict[str, list[float]] = {"first": [], "together": [], "apart": []}
    passes: dict[str, list[Sequence[Encoder]]] = {
        "first": [encoders[:1]],
        "together": [encoders],
        "apart": [[encoder] for encoder in encoders],
    }
    with tempfile.TemporaryDirectory(prefix="wmcache-bench-") as folder, tqdm(total=3 * ROUNDS, desc="bench") as bar:
        for number in range(ROUNDS):
            for name, groups in passes.items():
                start = time.perf_counter()
                for index, group in enumerate(groups):
                    stores = [
                        (encoder, Path(folder) / f"{number}-{name}-{index}-{encoder.spec.name}.zarr")
                        for encoder in group
                    ]
                    extract_together(dataset, stores, batch=batch, cluster=cluster)
                seconds[name].append(time.perf_counter() - start)
                for store in Path(folder).iterdir():
                    shutil.rmtree(store)
                bar.update()
    first, together, apart = (min(seconds[name]) for name in ("first", "together", "apart"))
    return {
        "frames": dataset.card.frames,
        "first_frames_per_second": dataset.card.frames / first,
        "together_frames_per_second": dataset.card.frames / together,
        "apart_frames_per_second": dataset.card.frames / apart,
        "more_than_first": together / first - 1,
        "one_after_the_other": apart / together,
    }


SCALES = (1, 4, 16)
POLL_SECONDS = 0.005


def bench_memory(episodes: int) -> list[dict[str, Any]]:
    """Peak memory of the commands over growing datasets, each in a process of its own.

    Extraction is by `tcn` on 224 px (49 tokens of 32); training keeps the tokens on disk.

    Args:
        episodes: of 100 frames, in the smallest dataset; the others have 4 and 16 times as many.

    Returns:
        For each size: frames, bytes of tokens, and the peak of each command's own (anonymous) memory, without the pages of files
        that the operating system may drop at any time.
    """
    rows = []
    with tempfile.TemporaryDirectory(prefix="wmcache-bench-") as folder:
        weights = None
        for scale in tqdm(SCALES, desc="bench memory", unit=" sizes"):
            data, store = Path(folder) / f"data-{scale}", Path(folder) / f"store-{scale}.zarr"
            collect = ["collect", "--episodes", str(scale * episodes), "--image-size", "64", "--out", str(data)]
            _peak("wmcache", [*collect, "--frames-per-shard", "100"])
            if weights is None:
                weights = Path(folder) / "tcn.safetensors"
                _save_tcn(weights)
            encoder = ["--encoder", "tcn", "--image-size", "224", "--weights", str(weights), "--device", str(CPU)]
            extracting = _peak("wmcache", ["extract", "--dataset", str(data), *encoder, "--out", str(store)])
            size = ["--width", "64", "--depth", "1", "--heads", "1", "--steps", "60", "--batch-size", "16"]
            run = ["--cache", str(store), "--out", str(Path(folder) / f"run-{scale}"), "--residence", "disk"]
            training = _peak("wmtrain", [*run, *size, "--device", str(CPU)])
            frames = 100 * scale * episodes
            rows.append(
                {
                    "frames": frames,
                    "token_bytes": frames * 49 * 32 * 2,
                    "extract_peak_bytes": extracting,
                    "train_peak_bytes": training,
                }
            )
    return rows


def _save_tcn(path: Path) -> None:
    """Weights of a network that has learnt nothing: its memory does not care."""
    grid, _ = tcn.SPEC.patch_grid(224)
    network = tcn.TcnNetwork(grid, tcn.SPEC.patch, tcn.SPEC.token_dim)
    save_file(network.state_dict(), path)


def _peak(command: str, arguments: list[str]) -> int:
    """Run a command of ours; the most anonymous memory that it had, in bytes, looked at every few milliseconds.

    Raises:
        UserError: it failed.
    """
    program = str(Path(sys.executable).with_name(command))
    most = 0
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen([program, *arguments], stdout=subprocess.DEVNULL, stderr=errors)
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            try:
                line = next(row for row in status.read_text().splitlines() if row.startswith("RssAnon"))
                most = max(most, 1024 * int(line.split()[1]))
            except (OSError, StopIteration):  # it has just ended
                break
            time.sleep(POLL_SECONDS)
        if process.wait():
            errors.seek(0)
            raise UserError(f"{command} {arguments[0]} failed: {errors.read().decode().strip().splitlines()[-1]}")
    return most


def bench_cluster(
    dataset: FrameDataset, encoder: Encoder, *, batch: int, cluster: str, rounds: int = ROUNDS
) -> dict[str, float]:
    """Extraction on Dask's processes against plain ones, each of which has one thread and one task at a time.

    Args:
        dataset: real frames; all of them are extracted again and again, into temporary stores.
        encoder: what encodes them; its recipe is taken, each process makes its own. batch: as in `extract`.
        cluster: `local:N`.
        rounds: by turns; each contender counts with its fastest.

    Returns:
        Frames a second, without the start of processes, of a plain loop in one process (`loop`), of one Dask worker, of N Dask workers,
        and of N plain processes that know nothing of each other (`loops`), which is what the machine can do;
        `dask_overhead`, how much longer one worker takes than the loop; `scaling` N workers / (N x one worker);
        `machine_scaling`, N processes / (N x one); `ratio_to_machine`, N workers / N processes.

    Raises:
        UserError: the cluster is not on this machine, or has no more than one worker.
    """
    where = parse_cluster(cluster)
    if where.elsewhere or where.workers < 2:
        raise UserError(f"--cluster {cluster}: this measures processes of this machine; choose local:N with N above 1")
    seconds: dict[str, list[float]] = {"loop": [], "worker": [], "workers": [], "loops": []}
    counts = {"loop": 1, "worker": 1, "workers": where.workers, "loops": where.workers}
    with (
        tempfile.TemporaryDirectory(prefix="wmcache-bench-") as folder,
        _environment(OMP_NUM_THREADS="1"),
        tqdm(total=rounds * len(seconds), desc="bench cluster", mininterval=0) as bar,
    ):
        for number in range(rounds):
            for name, count in counts.items():
                task = functools.partial(_start, dataset, encoder, batch, Path(folder) / f"{number}-{name}.zarr")
                measure = _in_workers if name.startswith("worker") else _in_processes
                seconds[name].append(measure(task, dataset, count))
                for store in Path(folder).iterdir():
                    shutil.rmtree(store)
                bar.update()
    rate = {name: dataset.card.frames / min(found) for name, found in seconds.items()}
    return {
        "frames": dataset.card.frames,
        "processes": where.workers,
        "loop_frames_per_second": rate["loop"],
        "one_worker_frames_per_second": rate["worker"],
        "workers_frames_per_second": rate["workers"],
        "loops_frames_per_second": rate["loops"],
        "dask_overhead": rate["loop"] / rate["worker"] - 1,
        "scaling": rate["workers"] / (where.workers * rate["worker"]),
        "machine_scaling": rate["loops"] / (where.workers * rate["loop"]),
        "ratio_to_machine": rate["workers"] / rate["loops"],
    }


Start = Callable[[], tuple[ExtractShard, StoreWriter]]


def _start(dataset: FrameDataset, encoder: Encoder, batch: int, out: Path) -> tuple[ExtractShard, StoreWriter]:
    """Create a store; returns the task that writes one of its shards."""
    identity = encoder.identity(dataset.card.fingerprint)
    writer = StoreWriter.create(out, store_card(dataset, encoder, "float16"), identity, dataset.steps.columns())
    return extraction_task(dataset, [(encoder, writer)], device=str(encoder.device), batch=batch), writer


def _in_workers(start: Start, dataset: FrameDataset, count: int) -> float:
    """Seconds of so many Dask workers for all shards, after they have done them once."""
    shards = range(len(dataset.card.shards))
    task, writer = start()
    with open_pool(f"local:{count}", label="bench", always_dask=True) as pool:
        for label in ("first", "timed"):
            writer.reopen(list(shards))
            began = time.perf_counter()
            run_tasks(task, shards, cluster=pool, total=dataset.card.frames, label=label, leave=False)
            seconds = time.perf_counter() - began
    return seconds


def _in_processes(start: Start, dataset: FrameDataset, count: int) -> float:
    """Seconds of so many processes, each for its slice of the shards in a loop, after each has done it once.

    Raises:
        UserError: one of them failed.
    """
    context = multiprocessing.get_context("spawn")
    shards, ready = len(dataset.card.shards), context.Barrier(count + 1)
    parts = [slice_of(shards, (number, count)) for number in range(count)]
    task, writer = start()
    processes = [context.Process(target=_loop, args=(task, part, ready)) for part in parts]
    for process in processes:
        process.start()
    try:
        ready.wait()
        writer.reopen(list(range(shards)))
        ready.wait()
        began = time.perf_counter()
        ready.wait()
        seconds = time.perf_counter() - began
    except threading.BrokenBarrierError:
        raise UserError("a process of the benchmark failed; see above") from None
    finally:
        for process in processes:
            process.kill()
            process.join()
    return seconds


def _loop(task: ExtractShard, shards: Sequence[int], ready: Barrier) -> None:
    try:
        for shard in shards:
            task(shard)
        ready.wait()
        ready.wait()  # until the store is empty again
        for shard in shards:
            task(shard)
        ready.wait()
    except BaseException:
        ready.abort()
        raise


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Variables for the processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
