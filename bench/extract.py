"""The speed of extraction as a share of the bare encoder's and of the machine's limit, and the memory of extraction and training."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from wmcache.bench.limit import MatmulLimit, count_flops
from wmcache.bench.timing import seconds
from wmcache.cache.layout import StoreCard
from wmcache.cluster.tasks import open_pool, parse_cluster, run_tasks
from wmcache.common.device import CPU, autocast, compile_errors
from wmcache.common.errors import UserError
from wmcache.pipeline.encoders import Encoder, tcn
from wmcache.pipeline.extract import ExtractShard, extract, extract_together, extraction_task, slice_of
from wmcache.pipeline.frames import FrameDataset
from wmcache.pipeline.stores import create_store

ROUNDS = 3
SCALES = (1, 4, 16)
POLL_SECONDS = 0.005
TEMPORARY = "wmcache-bench-"
COLLECT = ["collect", "--image-size", "64", "--frames-per-shard", "100"]
EXTRACT = f"extract --encoder tcn --image-size 224 --device {CPU}".split()
TRAIN = f"--width 64 --depth 1 --heads 1 --steps 60 --batch-size 16 --residence disk --device {CPU}".split()


def bench_extract(
    dataset: FrameDataset, encoder: Encoder, *, batch: int, cluster: str = "local:1", compiled: bool = False
) -> dict[str, float]:
    """Compare the rate of extraction, into a temporary store, with those of the bare model.

    `network` runs on images that are decoded, resized and normalised, before and after the extraction, so that a drift of the machine
    shows; `encoder` on decoded frames. Ratios are the extraction's share of each; `share_of_limit` is its share of the rate of a large
    matrix product in the encoder's precision (`limit_gflops`).

    Args:
        compiled: also measure the network with torch.compile, on whole batches; `compiled_gain` is its ratio to `network`.
    """
    frames, layers = dataset.read_shard(0), encoder.head.layers
    parts = [frames[start : start + batch] for start in range(0, len(frames), batch)]
    with torch.inference_mode():
        images = [encoder.preprocess(torch.from_numpy(part).to(encoder.device)) for part in parts]

    def network(image: Tensor, backbone: Callable[..., Any] = encoder.backbone) -> Tensor:
        with torch.inference_mode(), autocast(encoder.device, encoder.dtype):
            tokens: Tensor = backbone(image, layers)[layers[-1]].to(torch.float16)
        return tokens

    def rate(encode: Callable[[Any], Tensor], inputs: Sequence[Any]) -> float:
        return sum(map(len, inputs)) / seconds(lambda: [encode(part).cpu() for part in inputs])

    gflop = count_flops(encoder, parts[0]) / len(parts[0]) / 1e9  # the first call includes set-up
    limit = MatmulLimit(encoder.device, encoder.dtype)
    before, whole, limit_before = rate(network, images), rate(encoder, parts), limit.gflops()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bench.zarr"
        spent = seconds(lambda: extract(dataset, encoder, out, batch=batch, cluster=cluster))
    after, limit_gflops = rate(network, images), (limit_before + limit.gflops()) / 2
    mean, extraction = (before + after) / 2, dataset.card.frames / spent
    figures = {
        "frames": dataset.card.frames,
        "network_frames_per_second": mean,
        "network_before": before,
        "network_after": after,
        "encoder_frames_per_second": whole,
        "extract_frames_per_second": extraction,
        "ratio_to_network": extraction / mean,
        "ratio_to_encoder": extraction / whole,
        "gflop_per_frame": gflop,
        "limit_gflops": limit_gflops,
        "share_of_limit": gflop * extraction / limit_gflops,
    }
    if compiled:
        same = [image for image in images if len(image) == len(images[0])]  # each other size is compiled again
        fast = partial(network, backbone=torch.compile(encoder.backbone))
        with compile_errors():
            fast(same[0])
        rates = [rate(fast, same), rate(network, same)]
        figures |= {"compiled_frames_per_second": rates[0], "compiled_gain": rates[0] / rates[1]}
    return figures


def bench_together(
    dataset: FrameDataset, encoders: Sequence[Encoder], *, batch: int, cluster: str = "local:1"
) -> dict[str, float]:
    """Compare several encoders in one pass with the first alone and with one pass each (`apart`); see `_fastest`.

    `more_than_first` is the time of the others on top of the first, as a share of its time; `one_after_the_other` the time of one pass
    each over that of one pass.
    """
    apart = [[encoder] for encoder in encoders]
    passes: dict[str, Sequence[Sequence[Encoder]]] = {"first": apart[:1], "together": [encoders], "apart": apart}

    def measure(name: str, folder: Path) -> float:
        stores = {encoder: folder / f"{index}.zarr" for index, encoder in enumerate(encoders)}
        groups = [[(encoder, stores[encoder]) for encoder in group] for group in passes[name]]
        return seconds(lambda: [extract_together(dataset, group, batch=batch, cluster=cluster) for group in groups])

    spent, frames = _fastest(passes, measure, ROUNDS, "bench"), dataset.card.frames
    return {
        "frames": frames,
        **{f"{name}_frames_per_second": frames / value for name, value in spent.items()},
        "more_than_first": spent["together"] / spent["first"] - 1,
        "one_after_the_other": spent["apart"] / spent["together"],
    }


def _fastest(names: Iterable[str], measure: Callable[[str, Path], float], rounds: int, label: str) -> dict[str, float]:
    """Measure contenders in turns, with stores in an empty temporary folder; returns the seconds of their fastest rounds."""
    fastest = dict.fromkeys(names, float("inf"))
    with tqdm(total=rounds * len(fastest), desc=label, mininterval=0) as bar:
        for _ in range(rounds):
            for name in fastest:
                with tempfile.TemporaryDirectory(prefix=TEMPORARY) as folder:
                    fastest[name] = min(fastest[name], measure(name, Path(folder)))
                bar.update()
    return fastest


def bench_memory(episodes: int) -> list[dict[str, Any]]:
    """Measure the peak memory of `wmcache extract` and `wmtrain` over datasets of 1, 4 and 16 times so many episodes of 100 frames.

    Extraction is by `tcn` on 224 px (49 tokens of 32); training keeps the tokens on disk. Peaks are without the pages of mapped files.
    """
    rows = []
    with tempfile.TemporaryDirectory(prefix=TEMPORARY) as folder:
        weights = f"{folder}/tcn.safetensors"
        save_tcn(Path(weights))
        for scale in tqdm(SCALES, desc="bench memory", unit=" sizes"):
            data, store, run = (f"{folder}/{name}-{scale}" for name in ("data", "store.zarr", "run"))
            frames = 100 * scale * episodes
            peak_memory("wmcache", [*COLLECT, "--episodes", str(scale * episodes), "--out", data])
            extracted = peak_memory("wmcache", [*EXTRACT, "--dataset", data, "--weights", weights, "--out", store])
            trained = peak_memory("wmtrain", [*TRAIN, "--cache", store, "--out", run])
            row = {"frames": frames, "token_bytes": frames * 49 * 32 * 2}
            rows.append({**row, "extract_peak_bytes": extracted, "train_peak_bytes": trained})
    return rows


def save_tcn(path: Path) -> None:
    """Save random weights of the encoder `tcn`; its memory does not depend on them."""
    save_file(tcn.TcnNetwork(tcn.SPEC.patch_grid(224)[0]).state_dict(), path)


def peak_memory(command: str, arguments: list[str]) -> int:
    """Run a command of this environment, which must succeed; returns the most anonymous memory that it had, in bytes, by sampling."""
    program = str(Path(sys.executable).with_name(command))
    most = 0
    with tempfile.TemporaryFile() as errors:
        process = psutil.Popen([program, *arguments], stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None:
            with suppress(psutil.Error):  # it has just ended
                memory = process.memory_info()
                most = max(most, memory.rss - getattr(memory, "shared", 0))
            time.sleep(POLL_SECONDS)
        if process.returncode:
            errors.seek(0)
            raise UserError(f"{command} {arguments[0]} failed: {errors.read().decode().strip().splitlines()[-1]}")
    return most


def bench_cluster(
    dataset: FrameDataset, encoder: Encoder, *, batch: int, cluster: str, rounds: int = ROUNDS
) -> dict[str, float]:
    """Compare extraction by Dask workers with plain processes, each with one thread and one task at a time; see `_fastest`.

    Args:
        cluster: `local:N`, N above 1.

    Returns:
        Frames per second, without the start of processes, of a plain loop in one process (`loop`), of one Dask worker, of N Dask workers,
        and of N independent processes (`loops`), which are the machine's limit; `dask_overhead`, the share by which one worker takes
        longer than the loop; and N workers or processes over N times one (`scaling`, `machine_scaling`), or over each other.
    """
    where = parse_cluster(cluster)
    if where.elsewhere or where.workers < 2:
        raise UserError(f"--cluster {cluster} is not local:N with N above 1; this measures processes of this machine")
    counts = {"loop": 1, "one_worker": 1, "workers": where.workers, "loops": where.workers}

    def measure(name: str, folder: Path) -> float:
        writer = create_store(dataset, encoder, folder / f"{name}.zarr")
        task = extraction_task(dataset, [(encoder, writer)], device=str(encoder.device), batch=batch)
        start = _start_workers if "worker" in name else _start_processes
        with ExitStack() as stack:
            extract_all = start(stack, task, writer.card, counts[name])
            extract_all()  # the first time includes set-up
            writer.reopen(list(range(writer.card.num_shards)))
            return seconds(extract_all)

    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started here
    try:
        spent = _fastest(counts, measure, rounds, "bench cluster")
    finally:
        del os.environ["OMP_NUM_THREADS"]
        os.environ |= {} if threads is None else {"OMP_NUM_THREADS": threads}
    rate = {name: dataset.card.frames / value for name, value in spent.items()}
    return {
        "frames": dataset.card.frames,
        "processes": where.workers,
        **{f"{name}_frames_per_second": value for name, value in rate.items()},
        "dask_overhead": rate["loop"] / rate["one_worker"] - 1,
        "scaling": rate["workers"] / (where.workers * rate["one_worker"]),
        "machine_scaling": rate["loops"] / (where.workers * rate["loop"]),
        "ratio_to_machine": rate["workers"] / rate["loops"],
    }


def _start_workers(stack: ExitStack, task: ExtractShard, card: StoreCard, count: int) -> Callable[[], None]:
    pool = stack.enter_context(open_pool(f"local:{count}", label="bench", always_dask=True))
    shards = range(card.num_shards)
    return lambda: run_tasks(task, shards, cluster=pool, total=card.frames, label="extract", leave=False)


def _start_processes(stack: ExitStack, task: ExtractShard, card: StoreCard, count: int) -> Callable[[], None]:
    context = multiprocessing.get_context("spawn")
    pools = [stack.enter_context(ProcessPoolExecutor(1, mp_context=context)) for _ in range(count)]
    parts = [slice_of(card.num_shards, (number, count)) for number in range(count)]

    def loop_in_each() -> None:
        running = [pool.map(task, part, chunksize=card.num_shards) for pool, part in zip(pools, parts, strict=True)]
        for results in running:
            list(results)

    return loop_in_each
