"""A job that is killed at any moment continues when it is run again, and ends with the bytes of an undisturbed run."""

from __future__ import annotations

import itertools
import json
import os
import platform
import random
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import fault_workers as workers
import numpy as np
import pytest
from damage_tools import flip, stamps
from fault_workers import Child, Sample, content

from wmcache.cache import TokenStore
from wmcache.cache.layout import read_attributes, write_attributes
from wmcache.cache.verify import verify
from wmcache.common.errors import UserError
from wmcache.engine.checkpoint import checkpoints, last_checkpoint, load_training_state
from wmcache.pipeline.frames import FrameDataset
from wmcache.pipeline.repair import repair
from wmcache.pipeline.stores import finalize
from wmcache.trainer.options import TrainOptions

Start = Callable[..., Child]
Deaths = Iterator[tuple[int, Path]]
DieEverywhere = Callable[..., Deaths]

KILLED = ("died", -signal.SIGKILL)
SEED = 7
SOME_OR_MORE = pytest.mark.parametrize("every", [20, pytest.param(5, marks=pytest.mark.sweep)])
"""One in `every` changes of a file is a moment to die at."""


@pytest.fixture
def die_everywhere(start: Start, tmp_path: Path) -> DieEverywhere:
    """(function, *arguments) -> (moment, folder) of each process that died while it worked on that folder."""

    def sweep(
        function: Callable[..., object],
        *arguments: object,
        every: int,
        prepare: Callable[[Path], object] = lambda path: None,
    ) -> Deaths:
        def begin(moment: int) -> tuple[int, Path, Child]:
            path = tmp_path / str(moment) / "few"
            prepare(path)
            return moment, path, start(workers.die_changing, moment, path.parent, function, path, *arguments)

        changes = begin(0)[2].returned()
        assert changes > 5
        moments = iter(range(1 + SEED % every, changes + 1, every))
        # The next two run while the test inspects the files of this one.
        ahead = deque(begin(moment) for moment in itertools.islice(moments, 2))
        while ahead:
            moment, path, child = ahead.popleft()
            assert child.outcome() == KILLED, f"change {moment} of {changes}"
            ahead.extend(begin(moment) for moment in itertools.islice(moments, 1))
            yield moment, path

    return sweep


def finished_shards(store: Path) -> dict[Path, tuple[int, int]]:
    done = {int(file.stem) for file in (store / "tokens" / "commits").glob("[0-9]*.json")}
    names = {f"{shard:06d}.json" for shard in done} | {f"c.{shard}.0.0" for shard in done}
    return {file: stamp for file, stamp in stamps(store / "tokens").items() if file.name in names}


def seconds_of(child: Child) -> float:
    begin = time.monotonic()
    child.returned()
    return time.monotonic() - begin


def check_readable_or_refused(path: Path, undisturbed: Path) -> None:
    every = np.arange(24)
    try:
        found = TokenStore.open(path).gather(every)
    except UserError:
        return
    np.testing.assert_array_equal(found, TokenStore.open(undisturbed).gather(every))


@SOME_OR_MORE
def test_an_extraction_killed_at_any_change_of_a_file_does_only_what_is_missing(
    die_everywhere: DieEverywhere, few: Sample, every: int
) -> None:
    counts = set()
    for moment, path in die_everywhere(few.extract, every=every):
        before = finished_shards(path)
        counts.add(len(before))
        check_readable_or_refused(path, few.store)
        few.extract(path)
        assert content(path) == content(few.store), f"change {moment}"
        assert {**finished_shards(path), **before} == finished_shards(path), f"change {moment}"
        assert verify(path).sound, f"change {moment}"
    # The moments are spread over the whole run.
    assert len(counts) > 2


@pytest.mark.parametrize("every", [6, pytest.param(2, marks=pytest.mark.sweep)])
def test_an_int8_store_killed_while_it_is_finished_is_finished_again(
    die_everywhere: DieEverywhere, few: Sample, every: int
) -> None:
    def unfinish(path: Path) -> None:
        shutil.copytree(few.stores["int8"], path)
        attributes = read_attributes(path)
        del attributes["mean"], attributes["std"], attributes["columns"]["scale"]
        write_attributes(path, {**attributes, "complete": False})

    for moment, path in die_everywhere(few.extract, "int8", every=every, prepare=unfinish):
        before = finished_shards(path)
        few.extract(path, "int8")
        assert content(path) == content(few.stores["int8"]), f"change {moment}"
        assert finished_shards(path) == before


@pytest.mark.parametrize(
    "size", [1000, 2700, *(pytest.param(size, marks=pytest.mark.sweep) for size in (300, 1500, 2000, 3500))]
)
def test_a_torn_file_is_never_used(start: Start, few: Sample, tmp_path: Path, size: int) -> None:
    # The sizes are below those of metadata, records, shards and the finished description, so each is torn first once.
    path = tmp_path / "few.zarr"
    assert start(workers.die_writing, size, few.extract, path).outcome() == ("died", -signal.SIGXFSZ)
    torn = [file for file in tmp_path.rglob("*") if file.is_file() and file.stat().st_size == size]
    assert torn
    inside = {str(file.relative_to(path)) for file in torn if path in file.parents}
    assert inside.isdisjoint(content(few.store))
    few.extract(path)
    assert content(path) == content(few.store)


@pytest.mark.parametrize("enough", [6, pytest.param(30, marks=pytest.mark.sweep)])
def test_an_extraction_killed_at_random_moments_ends_like_an_undisturbed_one(
    start: Start, few: Sample, tmp_path: Path, enough: int
) -> None:
    rng = random.Random(SEED)
    seconds = seconds_of(start(few.extract, tmp_path / "whole.zarr"))
    kills = 0
    for number in range(100):
        path = tmp_path / f"{number}.zarr"
        for _ in range(5):
            before = finished_shards(path)
            child = start(few.extract, path)
            time.sleep(rng.uniform(0, seconds))
            child.kill()
            assert {**finished_shards(path), **before} == finished_shards(path), f"seed {SEED}, kill {kills}"
            if child.process.exitcode == 0:
                break
            kills += 1
        few.extract(path)
        assert content(path) == content(few.store), f"seed {SEED}, kill {kills}"
        if kills >= enough:
            return
    raise AssertionError(f"only {kills} kills")


@SOME_OR_MORE
@pytest.mark.parametrize("damage", ["shards", "columns", "description"])
def test_a_repair_killed_at_any_change_of_a_file_is_done_by_the_next(
    die_everywhere: DieEverywhere, few: Sample, damage: str, every: int
) -> None:
    def spoil(path: Path) -> None:
        shutil.copytree(few.store, path)
        if damage == "columns":
            shutil.rmtree(path / "action")
            (path / "state" / "zarr.json").write_text("{")
        elif damage == "description":
            (path / "tokens" / "zarr.json").write_text("{}")
        else:
            flip(path / "tokens" / "c.0.0.0", 500)
            (path / "tokens" / "commits" / "000001.json").unlink()

    sound = "tokens/c.2.0.0"
    for moment, path in die_everywhere(workers.repair_store, prepare=spoil, every=every):
        check_readable_or_refused(path, few.store)
        repair(path, device="cpu")
        assert content(path) == content(few.store), f"change {moment}"
        assert verify(path).sound, f"change {moment}"
        assert (path / sound).stat().st_mtime_ns == (few.store / sound).stat().st_mtime_ns, f"change {moment}"


@pytest.mark.parametrize("every", [7, pytest.param(2, marks=pytest.mark.sweep)])
def test_a_collection_killed_at_any_change_of_a_file_continues(
    die_everywhere: DieEverywhere, few: Sample, every: int
) -> None:
    for moment, path in die_everywhere(workers.collect_few, every=every):
        done = {file: file.stat().st_mtime_ns for file in path.glob("*.tar")} if path.exists() else {}
        with pytest.raises(UserError):
            FrameDataset.open(path)
        workers.collect_few(path)
        assert content(path) == content(few.dataset), f"change {moment}"
        assert all(file.stat().st_mtime_ns == stamp for file, stamp in done.items()), f"change {moment}"


@pytest.mark.parametrize(
    ("saved", "step"),
    [([1], 2), ([1, 2], 3), ([1, 2, 1], 2)],
    ids=["the second", "one that drops the oldest", "one over a later one that `last` does not name"],
)
def test_a_checkpoint_killed_at_any_change_of_a_file_leaves_a_whole_one(
    die_everywhere: DieEverywhere, tmp_path: Path, saved: list[int], step: int
) -> None:
    expected = {}
    for number in (1, 2, 3):
        workers.save_step(tmp_path / f"undisturbed-{number}", number)
        expected[number] = content(last_checkpoint(tmp_path / f"undisturbed-{number}"))

    def save_before(run: Path) -> None:
        for number in saved:
            workers.save_step(run, number)
        last = run / "checkpoints" / "last"
        last.unlink()
        last.symlink_to(f"step-{saved[-1]:08d}")

    for moment, run in die_everywhere(workers.save_step, step, prepare=save_before, every=1):
        found = load_training_state(run, *workers.small_model())
        assert found in (saved[-1], step), f"change {moment}"
        assert last_checkpoint(run).name == f"step-{found:08d}"
        assert content(last_checkpoint(run)) == expected[found], f"change {moment}"
        workers.save_step(run, 3)
        assert content(last_checkpoint(run)) == expected[3], f"change {moment}"
        assert (run / "checkpoints" / "last").readlink().name == "step-00000003"
        names = [folder.name for folder in checkpoints(run)]
        assert len(names) == 2, f"change {moment}"
        # Nothing of the killed process stays.
        assert {file.name for file in (run / "checkpoints").iterdir()} == {"last", *names}


def metrics(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def test_a_training_run_killed_at_random_moments_ends_with_the_same_weights(
    start: Start, store_path: Path, tiny: TrainOptions, tmp_path: Path
) -> None:
    options, undisturbed = replace(tiny, steps=24, checkpoint_every=4, validate_every=12), tmp_path / "undisturbed"
    rng, seconds = random.Random(SEED), seconds_of(start(workers.train_run, undisturbed, store_path, options))
    kills, after_a_checkpoint = 0, 0
    for number in range(50):
        run = tmp_path / str(number)
        for _ in range(4):
            child = start(workers.train_run, run, store_path, options)
            time.sleep(rng.uniform(0, seconds))
            child.kill()
            if child.process.exitcode == 0:
                break
            kills += 1
            after_a_checkpoint += bool(checkpoints(run))
        workers.train_run(run, store_path, options)
        assert content(last_checkpoint(run)) == content(last_checkpoint(undisturbed)), f"seed {SEED}, kill {kills}"
        assert metrics(run) == metrics(undisturbed), f"seed {SEED}, kill {kills}"
        if kills >= 8 and after_a_checkpoint >= 2:
            return
    raise AssertionError(f"only {kills} kills, {after_a_checkpoint} of them after a checkpoint")


def test_a_killed_job_of_an_array_is_done_by_its_second_try(start: Start, few: Sample, tmp_path: Path) -> None:
    out, sample = tmp_path / "store.zarr", (few.dataset, few.weights)
    start(workers.extract_slice, out, *sample, (0, 2)).returned()
    with pytest.raises(UserError, match=r"2 of 3 shards \(1, 2\).*wmcache repair"):
        finalize(out)
    assert start(workers.extract_slice, out, *sample, (1, 2), True).outcome() == KILLED
    with pytest.raises(UserError):
        TokenStore.open(out)
    start(workers.extract_slice, out, *sample, (1, 2)).returned()
    finalize(out)  # already complete
    assert content(out / "tokens") == content(few.store / "tokens")


# What dead processes leave behind.


@pytest.fixture
def dead(start: Start) -> int:
    """The id of a process that has ended."""
    child = start(os.getpid)
    child.returned()
    return child.pid


HOST = platform.node()


def test_leftovers_are_swept_by_the_next_writer_or_do_no_harm(few: Sample, dead: int, tmp_path: Path) -> None:
    path = Path(shutil.copytree(few.store, tmp_path / "few.zarr"))
    (path / "tokens" / "commits" / "000001.json").unlink()
    write_attributes(path, {**read_attributes(path), "complete": False})
    commits, tokens = path / "tokens" / "commits", path / "tokens"
    swept = [
        commits / f".000001.json.{HOST}.{dead}.tmp",
        tokens / f".c.0.0.0.{HOST}.{dead}.tmp",
        commits / "000001.lock",
        commits / "000002.lock",  # of a shard that is done
    ]
    staying = [
        commits / f".000001.json.{HOST}.{os.getppid()}.tmp",  # of a running process
        commits / f".000001.json.another-{HOST}.{dead}.tmp",  # of an unknown process
        commits / f".000001.json.{dead}.tmp",
        tokens / "c.1.0.0.partial",
    ]
    for file in swept + staying:
        file.write_bytes(b"half of it")
    before = verify(path)
    assert before.faults == []
    assert set(before.leftovers) == {str(file) for file in swept + staying}

    few.extract(path)
    assert content(path) == content(few.store)
    assert [file for file in swept if file.exists()] == []
    after = verify(path)
    assert after.sound
    assert set(after.leftovers) == {str(file) for file in staying}


def test_a_new_store_sweeps_leftovers_beside_it(few: Sample, dead: int, tmp_path: Path) -> None:
    path = tmp_path / "few.zarr"
    # In a container every start counts its processes from 1, so a leftover may have this process's own id.
    swept = [tmp_path / f".few.zarr.{HOST}.{pid}.tmp" for pid in (dead, os.getpid())]
    staying = [
        tmp_path / f".few.zarr.{HOST}.{os.getppid()}.tmp",
        tmp_path / f".few.zarr.another-{HOST}.{dead}.tmp",
        tmp_path / f".few.zarr.{dead}.tmp",
        tmp_path / "few.tmp",
    ]
    for folder in (*swept, *staying):
        shutil.copytree(few.stores["int8"], folder)
    (tmp_path / ".few.zarr.lock").touch()
    few.extract(path)
    assert content(path) == content(few.store)
    assert sorted(tmp_path.iterdir()) == sorted([path, *staying])
