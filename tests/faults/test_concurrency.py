"""Several processes work on one store or run at once: nothing is done twice, nothing is damaged, and the dead block no one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path

import fault_workers as workers
import pytest
from damage_tools import flip, is_refusal
from fault_workers import Child, Sample, content

from wmcache.cache import TokenStore
from wmcache.cache.layout import read_attributes, write_attributes
from wmcache.cache.verify import verify
from wmcache.engine.checkpoint import last_checkpoint
from wmcache.pipeline.repair import repair
from wmcache.trainer.options import TrainOptions

Start = Callable[..., Child]
BOTH = pytest.mark.parametrize("dtype", ["float16", pytest.param("int8", marks=pytest.mark.sweep)])


def wait_for(condition: Callable[[], object], patience: float = 60.0) -> None:
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


@BOTH
def test_two_extractions_at_once_encode_each_shard_once(
    start: Start, processes: ForkServerContext, few: Sample, tmp_path: Path, dtype: str
) -> None:
    for number in range(2):
        together, out, log = processes.Barrier(2), tmp_path / f"{number}.zarr", tmp_path / f"{number}.log"
        arguments = (out, few.dataset, few.weights, together, log, {"store_dtype": dtype})
        for child in [start(workers.extract_beside, *arguments) for _ in range(2)]:
            child.returned()
        encoded = log.read_text().splitlines()
        assert len(encoded) == len(set(encoded)) == 3
        assert content(out) == content(few.stores[dtype])
        assert not list(tmp_path.rglob("*.lock"))


def test_the_claims_of_a_killed_extraction_are_taken_over(
    start: Start,
    processes: ForkServerContext,
    dataset_path: Path,
    store_path: Path,
    tcn_weights: Path,
    tmp_path: Path,
) -> None:
    together, out, log = processes.Barrier(3), tmp_path / "some.zarr", tmp_path / "log"
    arguments = (out, dataset_path, tcn_weights, together, log, {})
    killed = start(workers.extract_beside, *arguments, 2)
    others = [start(workers.extract_beside, *arguments) for _ in range(2)]
    assert killed.outcome() == ("died", -signal.SIGKILL)
    for child in others:
        child.returned(20)
    encoded = log.read_text().splitlines()
    # At most the killed process's last shard is encoded twice.
    assert len(set(encoded)) == 6
    assert len(encoded) <= 7
    assert content(out) == content(store_path)


def test_jobs_of_an_array_that_start_together_make_one_store(start: Start, few: Sample, tmp_path: Path) -> None:
    out = tmp_path / "store.zarr"
    # More slices than shards, and one slice twice.
    jobs = [start(workers.extract_slice, out, few.dataset, few.weights, (number, 5)) for number in (4, 0, 3, 1, 1, 2)]
    for job in jobs:
        job.returned()
    assert TokenStore.open(out).complete
    assert content(out / "tokens") == content(few.store / "tokens")


@pytest.mark.parametrize(
    ("field", "one", "other"),
    [("normalisation", "half", "imagenet"), pytest.param("store_dtype", "float16", "int8", marks=pytest.mark.sweep)],
)
def test_of_two_extractions_with_different_settings_one_is_refused(
    start: Start, processes: ForkServerContext, few: Sample, tmp_path: Path, field: str, one: str, other: str
) -> None:
    for number in range(3):
        together, out, log = processes.Barrier(2), tmp_path / f"{number}.zarr", tmp_path / f"{number}.log"
        arguments = (out, few.dataset, few.weights, together, log)
        children = [start(workers.extract_beside, *arguments, {field: value}) for value in (one, other)]
        outcomes = dict([child.outcome() for child in children])
        assert set(outcomes) == {"returned", "refused"}
        assert is_refusal(outcomes["refused"], out, field)
        assert len(log.read_text().splitlines()) == 3
        assert verify(out).sound


def test_an_int8_store_can_be_finished_by_two_at_once(
    start: Start, processes: ForkServerContext, few: Sample, tmp_path: Path
) -> None:
    stores = [Path(shutil.copytree(few.stores["int8"], tmp_path / f"{number}.zarr")) for number in range(10)]
    for path in stores:
        write_attributes(path, {**read_attributes(path), "complete": False})
    together = processes.Barrier(2)
    for child in [start(workers.finish_beside, stores, together) for _ in range(2)]:
        child.returned()
    for path in stores:
        assert content(path) == content(few.stores["int8"])


@BOTH
def test_two_repairs_at_once_both_end_with_a_whole_store(
    start: Start, processes: ForkServerContext, few: Sample, tmp_path: Path, dtype: str
) -> None:
    # The second starts at a later moment of the first each time.
    for number in range(4):
        path = Path(shutil.copytree(few.stores[dtype], tmp_path / f"{number}.zarr"))
        flip(path / "tokens" / "c.0.0.0", 500)
        (path / "tokens" / "commits" / "000001.json").unlink()
        together = processes.Barrier(2)
        for child in [start(workers.repair_beside, path, together, later) for later in (0.0, 0.02 * number)]:
            child.returned()
        assert content(path) == content(few.stores[dtype])


def test_a_training_notices_that_its_store_is_repaired(
    start: Start, store_path: Path, tiny: TrainOptions, tmp_path: Path
) -> None:
    path, run = Path(shutil.copytree(store_path, tmp_path / "some.zarr")), tmp_path / "run"
    child = start(workers.train_run, run, path, replace(tiny, steps=100_000, checkpoint_every=1000, residence="disk"))
    wait_for(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size)
    (path / "tokens" / "commits" / "000005.json").unlink()
    repair(path)
    assert is_refusal(child.refused(), path)


def test_a_second_wmtrain_on_a_run_is_refused_until_the_first_is_dead(
    start: Start, store_path: Path, tiny: TrainOptions, tmp_path: Path
) -> None:
    options = replace(tiny, steps=200, validate_every=100, checkpoint_every=20)
    run, straight = tmp_path / "run", tmp_path / "straight"
    first = start(workers.train_run, run, store_path, options)
    wait_for(lambda: list((run / "checkpoints").glob("step-*")))
    os.kill(first.pid, signal.SIGSTOP)
    before = content(run)
    assert is_refusal(start(workers.train_run, run, store_path, options).refused(), run)
    assert content(run) == before
    first.kill()
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] < 200
    for out in (run, straight):
        start(workers.train_run, out, store_path, options).returned()
    assert content(last_checkpoint(run)) == content(last_checkpoint(straight))


def test_forked_workers_of_a_data_loader_read_the_same(start: Start, store_path: Path) -> None:
    assert start(workers.load_in_forks, store_path).returned() == 12
