"""Several processes at once in one place: nothing is done twice, nothing is spoilt, nobody waits for the dead."""

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

import numpy as np
import pytest
from fault_workers import (
    Child,
    count_up,
    extract_beside,
    finish_beside,
    gather_after_fork,
    load_in_forks,
    repair_beside,
    train_run,
)

from wmcache.cache.layout import read_attributes, write_attributes
from wmcache.cache.verify import verify
from wmcache.engine.checkpoint import last_checkpoint
from wmcache.pipeline.repair import repair
from wmcache.trainer.options import TrainOptions

Content = Callable[[Path], dict[str, bytes]]
Start = Callable[..., Child]


def wait_for(condition: Callable[[], object], patience: float = 60.0) -> None:
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def spoil(store: Path, shard: int) -> None:
    file = store / "tokens" / f"c.{shard}.0.0"
    values = bytearray(file.read_bytes())
    values[500] ^= 1
    file.write_bytes(values)


@pytest.mark.parametrize("dtype", ["float16", pytest.param("int8", marks=pytest.mark.sweep)])
def test_two_extractions_at_once_encode_each_shard_once(
    start: Start,
    processes: ForkServerContext,
    content: Content,
    few_path: Path,
    few_stores: dict[str, Path],
    tcn_weights: Path,
    tmp_path: Path,
    dtype: str,
) -> None:
    for number in range(2):
        together, out, log = processes.Barrier(2), tmp_path / f"{number}.zarr", tmp_path / f"{number}.log"
        arguments = (out, few_path, tcn_weights, together, log, {"store_dtype": dtype})
        for child in [start(extract_beside, *arguments) for _ in range(2)]:
            child.returned()
        encoded = log.read_text().splitlines()
        assert len(encoded) == len(set(encoded)) == 3
        assert content(out) == content(few_stores[dtype])
        # Nobody has anything left to hold.
        assert not list(tmp_path.rglob("*.lock"))


def test_the_claims_of_a_killed_extraction_are_taken_over_by_those_that_wait_for_it(
    start: Start,
    processes: ForkServerContext,
    content: Content,
    dataset_path: Path,
    store_path: Path,
    tcn_weights: Path,
    tmp_path: Path,
) -> None:
    together, out, log = processes.Barrier(3), tmp_path / "some.zarr", tmp_path / "log"
    arguments = (out, dataset_path, tcn_weights, together, log, {})
    killed = start(extract_beside, *arguments, 2)
    others = [start(extract_beside, *arguments) for _ in range(2)]
    assert killed.outcome() == ("died", -signal.SIGKILL)
    for child in others:
        child.returned(20)
    encoded = log.read_text().splitlines()
    # What the killed one had encoded may have been lost with it, and nothing else.
    assert len(set(encoded)) == 6
    assert len(encoded) <= 7
    assert content(out) == content(store_path)


@pytest.mark.parametrize(
    ("field", "ours", "theirs"),
    [("normalisation", "half", "imagenet"), pytest.param("store_dtype", "float16", "int8", marks=pytest.mark.sweep)],
)
def test_of_two_extractions_with_different_settings_one_wins_and_the_other_is_refused(
    start: Start,
    processes: ForkServerContext,
    few_path: Path,
    tcn_weights: Path,
    tmp_path: Path,
    field: str,
    ours: str,
    theirs: str,
) -> None:
    for number in range(3):
        together, out, log = processes.Barrier(2), tmp_path / f"{number}.zarr", tmp_path / f"{number}.log"
        children = [
            start(extract_beside, out, few_path, tcn_weights, together, log, {field: value}) for value in (ours, theirs)
        ]
        outcomes = dict([child.outcome() for child in children])
        assert set(outcomes) == {"returned", "refused"}
        assert f"{out} was extracted with other settings ({field}: " in outcomes["refused"]
        assert len(log.read_text().splitlines()) == 3
        assert verify(out).sound


def test_an_int8_store_can_be_finished_by_two_at_once(
    start: Start, processes: ForkServerContext, content: Content, few_stores: dict[str, Path], tmp_path: Path
) -> None:
    stores = [Path(shutil.copytree(few_stores["int8"], tmp_path / f"{number}.zarr")) for number in range(10)]
    for path in stores:
        # As a kill leaves it that comes between the last shard and the end.
        write_attributes(path, {**read_attributes(path), "complete": False})
    together = processes.Barrier(2)
    for child in [start(finish_beside, stores, together) for _ in range(2)]:
        child.returned()
    for path in stores:
        assert content(path) == content(few_stores["int8"])


@pytest.mark.parametrize("dtype", ["float16", pytest.param("int8", marks=pytest.mark.sweep)])
def test_two_repairs_at_once_both_end_with_a_whole_store(
    start: Start,
    processes: ForkServerContext,
    content: Content,
    few_stores: dict[str, Path],
    tmp_path: Path,
    dtype: str,
) -> None:
    # Each a little later than the one before, so that the second comes at another moment of the first.
    for number in range(4):
        path = Path(shutil.copytree(few_stores[dtype], tmp_path / f"{number}.zarr"))
        spoil(path, 0)
        (path / "tokens" / "commits" / "000001.json").unlink()
        together = processes.Barrier(2)
        for child in [start(repair_beside, path, together, later) for later in (0.0, 0.02 * number)]:
            child.returned()
        assert content(path) == content(few_stores[dtype])


def test_a_store_that_is_repaired_while_it_is_trained_on_says_so(
    start: Start, store_path: Path, tiny: TrainOptions, tmp_path: Path
) -> None:
    path, run = Path(shutil.copytree(store_path, tmp_path / "some.zarr")), tmp_path / "run"
    child = start(train_run, run, path, replace(tiny, steps=100_000, checkpoint_every=1000, residence="disk"))
    wait_for(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size)
    (path / "tokens" / "commits" / "000005.json").unlink()
    repair(path)
    assert child.refused() == f"{path} was replaced or changed while it was being read; start again"


def test_a_second_wmtrain_on_a_run_is_refused_until_the_first_is_dead(
    start: Start, content: Content, store_path: Path, tiny: TrainOptions, tmp_path: Path
) -> None:
    options = replace(tiny, steps=200, validate_every=100, checkpoint_every=20)
    run, straight = tmp_path / "run", tmp_path / "straight"
    first = start(train_run, run, store_path, options)
    wait_for(lambda: list((run / "checkpoints").glob("step-*")))
    os.kill(first.pid, signal.SIGSTOP)
    before = content(run)
    assert f"another wmtrain is at work on {run}; " in start(train_run, run, store_path, options).refused()
    assert content(run) == before
    first.kill()
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] < 200
    start(train_run, run, store_path, options).returned()
    start(train_run, straight, store_path, options).returned()
    assert content(last_checkpoint(run)) == content(last_checkpoint(straight))


def test_a_lock_is_held_by_one_at_a_time(start: Start, processes: ForkServerContext, tmp_path: Path) -> None:
    number, lock, together = tmp_path / "number", tmp_path / "number.lock", processes.Barrier(3)
    number.write_text("0")
    for child in [start(count_up, number, lock, 30, together) for _ in range(3)]:
        child.returned()
    assert number.read_text() == "90"
    assert not lock.exists()


def test_a_fork_of_a_process_that_has_read_reads_the_same(start: Start, big_store: Path) -> None:
    # 10 MB and more, so that it is threads that copy.
    frames = np.random.default_rng(0).permutation(5600)[:150]
    assert start(gather_after_fork, big_store, frames).returned() == [0, 0]


def test_forked_workers_of_a_data_loader_read_the_same(start: Start, store_path: Path) -> None:
    assert start(load_in_forks, store_path).returned() == 12
