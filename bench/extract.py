"""The speed of extraction as a share of the bare encoder's and of the machine's limit, and the memory of extraction and training."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from wmcache.cache.writer import StoreWriter
from wmcache.cluster.tasks import open_pool, parse_cluster, run_tasks
from wmcache.common.device import CPU, autocast
from wmcache.common.errors import UserError
from wmcache.pipeline.encoders import Encoder, tcn
from wmcache.pipeline.extract import ExtractShard, extract, extract_together, extraction_task, slice_of
from wmcache.pipeline.frames import FrameDataset
from wmcache.pipeline.stores import create_store

ROUNDS = 3
SCALES = (1, 4, 16)
POLL_SECONDS = 0.005
TEMPORARY = "wmcache-bench-"


def bench_extract(dataset: FrameDataset, encoder: Encoder, *, batch: int, cluster: str = "local:1") -> dict[str, float]:
    """Compare extraction of a dataset, into a temporary store, with the bare model.

    Returns:
        Frames per second of the network alone on images that are decoded, resized and normalised (before and after the extraction, so
        that a drift of the machine shows), of the encoder on decoded frames, and of the extraction; `ratio_to_network` and
        `ratio_to_encoder`, the extraction's share of each.
    """
    frames, layers = dataset.read_shard(0), encoder.head.layers
    parts = [frames[start : start + batch] for start in range(0, len(frames), batch)]
    with torch.inference_mode():
        images = [encoder.preprocess(torch.from_numpy(part).to(encoder.device)) for part in parts]

    def network(image: Tensor) -> Tensor:
        with torch.inference_mode(), autocast(encoder.device, encoder.dtype):
            tokens: Tensor = encoder.backbone(image, layers)[layers[-1]].to(torch.float16)
        return tokens

    def rate(encode: Callable[[Any], Tensor], inputs: Sequence[Any]) -> float:
        start = time.perf_counter()
        for part in inputs:
            encode(part).cpu()
        return len(frames) / (time.perf_counter() - start)

    encoder(parts[0])  # the first call includes set-up
    before, whole = rate(network, images), rate(encoder, parts)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        extract(dataset, encoder, Path(folder) / "bench.zarr", batch=batch, cluster=cluster)
        extraction = dataset.card.frames / (time.perf_counter() - start)
    after = rate(network, images)
    mean = (before + after) / 2
    return {
        "frames": dataset.card.frames,
        "network_frames_per_second": mean,
        "network_before": before,
        "network_after": after,
        "encoder_frames_per_second": whole,
        "extract_frames_per_second": extraction,
        "ratio_to_network": extraction / mean,
        "ratio_to_encoder": extraction / whole,
    }


def bench_together(
    dataset: FrameDataset, encoders: Sequence[Encoder], *, batch: int, cluster: str = "local:1"
) -> dict[str, float]:
    """Compare several encoders in one pass with the first alone and with one pass each, in turns, into temporary stores.

    Returns:
        Frames per second of the first alone, of all together and of all one after the other, each in its fastest round;
        `more_than_first`, the time of the others on top of the first, as a share of its time; `one_after_the_other`, the time of one pass
        each over that of one pass.
    """
    passes: dict[str, list[Sequence[Encoder]]] = {
        "first": [encoders[:1]],
        "together": [encoders],
        "apart": [[encoder] for encoder in encoders],
    }

    def measure(name: str, folder: Path) -> float:
        start = time.perf_counter()
        for index, group in enumerate(passes[name]):
            stores = [(encoder, folder / f"{index}-{encoder.spec.name}.zarr") for encoder in group]
            extract_together(dataset, stores, batch=batch, cluster=cluster)
        return time.perf_counter() - start

    seconds = _fastest(passes, measure, ROUNDS, "bench")
    frames = dataset.card.frames
    return {
        "frames": frames,
        **{f"{name}_frames_per_second": frames / spent for name, spent in seconds.items()},
        "more_than_first": seconds["together"] / seconds["first"] - 1,
        "one_after_the_other": seconds["apart"] / seconds["together"],
    }


def _fastest(names: Iterable[str], measure: Callable[[str, Path], float], rounds: int, label: str) -> dict[str, float]:
    """Measure contenders in turns, each in an empty temporary folder; returns the seconds of their fastest rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with tqdm(total=rounds * len(seconds), desc=label, mininterval=0) as bar:
        for _ in range(rounds):
            for name, spent in seconds.items():
                with tempfile.TemporaryDirectory(prefix=TEMPORARY) as folder:
                    spent.append(measure(name, Path(folder)))
                bar.update()
    return {name: min(spent) for name, spent in seconds.items()}


def bench_memory(episodes: int) -> list[dict[str, Any]]:
    """Measure the peak memory of commands over growing datasets, each in a process of its own.

    Extraction is by `tcn` on 224 px (49 tokens of 32); training keeps the tokens on disk.

    Args:
        episodes: of 100 frames, in the smallest dataset; the others have 4 and 16 times as many.

    Returns:
        For each size: frames, bytes of tokens, and the peak of each command's anonymous memory, without the pages of mapped files.
    """
    rows = []
    with tempfile.TemporaryDirectory(prefix=TEMPORARY) as folder:
        weights = Path(folder) / "tcn.safetensors"
        save_tcn(weights)
        for scale in tqdm(SCALES, desc="bench memory", unit=" sizes"):
            data, store, run = (f"{folder}/{name}-{scale}" for name in ("data", "store.zarr", "run"))
            collect = [
                "collect",
                "--episodes",
                str(scale * episodes),
                "--image-size",
                "64",
                "--frames-per-shard",
                "100",
            ]
            peak_memory("wmcache", [*collect, "--out", data])
            encoder = ["--encoder", "tcn", "--image-size", "224", "--weights", str(weights), "--device", str(CPU)]
            extracting = peak_memory("wmcache", ["extract", "--dataset", data, *encoder, "--out", store])
            size = [
                "--width",
                "64",
                "--depth",
                "1",
                "--heads",
                "1",
                "--steps",
                "60",
                "--batch-size",
                "16",
                "--residence",
                "disk",
            ]
            training = peak_memory("wmtrain", ["--cache", store, "--out", run, *size, "--device", str(CPU)])
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


def save_tcn(path: Path) -> None:
    """Save random weights of the encoder `tcn`; its memory does not depend on them."""
    grid, _ = tcn.SPEC.patch_grid(224)
    save_file(tcn.TcnNetwork(grid).state_dict(), path)


def peak_memory(command: str, arguments: list[str]) -> int:
    """Run a command of this environment; returns the most anonymous memory that it had, in bytes, sampled every few milliseconds.

    Raises:
        UserError: it failed.
    """
    program = str(Path(sys.executable).with_name(command))
    most = 0
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen([program, *arguments], stdout=subprocess.DEVNULL, stderr=errors)
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            with suppress(OSError, StopIteration):  # it has just ended
                line = next(row for row in status.read_text().splitlines() if row.startswith("RssAnon"))
                most = max(most, 1024 * int(line.split()[1]))
            time.sleep(POLL_SECONDS)
        if process.returncode:
            errors.seek(0)
            raise UserError(f"{command} {arguments[0]} failed: {errors.read().decode().strip().splitlines()[-1]}")
    return most


def bench_cluster(
    dataset: FrameDataset, encoder: Encoder, *, batch: int, cluster: str, rounds: int = ROUNDS
) -> dict[str, float]:
    """Compare extraction on Dask's processes with plain ones, each of which has one thread and one task at a time.

    Args:
        dataset: real frames; all of them are extracted in every round, into temporary stores.
        encoder: each process creates its own from the recipe.
        batch: frames at once.
        cluster: `local:N`.
        rounds: in turns; each contender counts with its fastest.

    Returns:
        Frames per second, without the start of processes, of a plain loop in one process (`loop`), of one Dask worker, of N Dask workers,
        and of N independent processes (`loops`), which are the machine's limit; `dask_overhead`, the share by which one worker takes
        longer than the loop; `scaling`, N workers / (N x one worker); `machine_scaling`, N processes / (N x one); `ratio_to_machine`,
        N workers / N processes.

    Raises:
        UserError: the cluster is not on this machine, or has a single worker.
    """
    where = parse_cluster(cluster)
    if where.elsewhere or where.workers < 2:
        raise UserError(f"--cluster {cluster} is not local:N with N above 1; this measures processes of this machine")
    counts = {"loop": 1, "worker": 1, "workers": where.workers, "loops": where.workers}

    def measure(name: str, folder: Path) -> float:
        task, writer = _create_store(dataset, encoder, batch, folder / f"{name}.zarr")
        return (_in_workers if name.startswith("worker") else _in_processes)(task, writer, counts[name])

    with _one_thread():
        seconds = _fastest(counts, measure, rounds, "bench cluster")
    rate = {name: dataset.card.frames / spent for name, spent in seconds.items()}
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


def _create_store(dataset: FrameDataset, encoder: Encoder, batch: int, out: Path) -> tuple[ExtractShard, StoreWriter]:
    """Create a store; returns the task that writes one of its shards."""
    writer = create_store(dataset, encoder, out)
    return extraction_task(dataset, [(encoder, writer)], device=str(encoder.device), batch=batch), writer


def _in_workers(task: ExtractShard, writer: StoreWriter, count: int) -> float:
    """Return the seconds of Dask workers for all shards, after they have done them once."""
    shards, frames = range(writer.card.num_shards), writer.card.frames
    with open_pool(f"local:{count}", label="bench", always_dask=True) as pool:
        run_tasks(task, shards, cluster=pool, total=frames, label="first", leave=False)
        writer.reopen(list(shards))
        start = time.perf_counter()
        run_tasks(task, shards, cluster=pool, total=frames, label="timed", leave=False)
        return time.perf_counter() - start


def _in_processes(task: ExtractShard, writer: StoreWriter, count: int) -> float:
    """Return the seconds of processes, each of which loops over its slice of the shards, after each has done it once.

    Raises:
        UserError: one of them failed.
    """
    context = multiprocessing.get_context("spawn")
    shards, ready = writer.card.num_shards, context.Barrier(count + 1)
    processes = [
        context.Process(target=_loop, args=(task, slice_of(shards, (number, count)), ready)) for number in range(count)
    ]
    for process in processes:
        process.start()
    try:
        ready.wait()
        writer.reopen(list(range(shards)))
        ready.wait()
        start = time.perf_counter()
        ready.wait()
        return time.perf_counter() - start
    except threading.BrokenBarrierError:
        raise UserError("a process of the benchmark failed; see above") from None
    finally:
        for process in processes:
            process.kill()
            process.join()


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
def _one_thread() -> Iterator[None]:
    """Give processes that are started meanwhile one thread each."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
