"""Whatever is killed, at whatever moment, goes on when it is run again, and ends with the bytes of a run that nothing disturbed."""

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

import numpy as np
import pytest
from fault_workers import (
    Child,
    collect_few,
    die_changing,
    die_writing,
    extract_store,
    repair_store,
    save_step,
    small_model,
    train_run,
)

from wmcache.cache import TokenStore
from wmcache.cache.layout import read_attributes, write_attributes
from wmcache.cache.verify import verify
from wmcache.common.errors import UserError
from wmcache.engine.checkpoint import checkpoints, last_checkpoint, load_training_state
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.extract import extract
from wmcache.pipeline.frames import FrameDataset
from wmcache.pipeline.repair import repair
from wmcache.trainer.options import TrainOptions

Content = Callable[[Path], dict[str, bytes]]
Start = Callable[..., Child]
Deaths = Iterator[tuple[int, Path]]

KILLED = ("died", -signal.SIGKILL)
SEED = 7
EVERY = 5
"""Of the changes that a run makes to its files, one in so many is a moment to die at."""
SOME_OR_MORE = pytest.mark.parametrize("every", [4 * EVERY, pytest.param(EVERY, marks=pytest.mark.sweep)])


@pytest.fixture
def die_everywhere(start: Start, tmp_path: Path) -> Callable[..., Deaths]:
    """(function, *arguments) -> (moment, folder) of each process that died in the middle of its work on that folder."""

    def sweep(
        function: Callable[..., object],
        *arguments: object,
        prepare: Callable[[Path], object] = lambda path: None,
        every: int = EVERY,
        first: int = 1,
    ) -> Deaths:
        def begin(moment: int) -> tuple[int, Path, Child]:
            path = tmp_path / str(moment) / "few"
            prepare(path)
            return moment, path, start(die_changing, moment, path.parent, function, path, *arguments)

        changes = begin(0)[2].returned()
        assert changes > 5
        moments = iter(range(first + SEED % every, changes + 1, every))
        # The next ones run while the test looks at what this one has left behind.
        ahead = deque(begin(moment) for moment in itertools.islice(moments, 2))
        while ahead:
            moment, path, child = ahead.popleft()
            assert child.outcome() == KILLED, f"change {moment} of {changes}"
            ahead.extend(begin(moment) for moment in itertools.islice(moments, 1))
            yield moment, path

    return sweep


def done(store: Path) -> dict[str, tuple[int, int]]:
    """For each record and its shard, which file it is and when it was written."""
    records = sorted((store / "tokens" / "commits").glob("[0-9]*.json"))
    files = [*records, *(store / "tokens" / f"c.{int(record.stem)}.0.0" for record in records)]
    return {str(file): (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


def seconds_of(child: Child) -> float:
    begin = time.monotonic()
    child.returned()
    return time.monotonic() - begin


def reads_right_or_not_at_all(path: Path, undisturbed: Path) -> bool:
    every = np.arange(24)
    try:
        found = TokenStore.open(path).gather(every)
    except UserError:
        return True
    return np.array_equal(found, TokenStore.open(undisturbed).gather(every))


@SOME_OR_MORE
def test_an_extraction_killed_at_any_change_of_a_file_does_only_the_shards_that_are_not_done(
    die_everywhere: Callable[..., Deaths],
    content: Content,
    few_path: Path,
    few: FrameDataset,
    few_stores: dict[str, Path],
    tcn_weights: Path,
    encoder: Encoder,
    every: int,
) -> None:
    undisturbed = content(few_stores["float16"])
    shards_done = set()
    for moment, path in die_everywhere(extract_store, few_path, tcn_weights, every=every):
        before = done(path)
        shards_done.add(len(before))
        assert reads_right_or_not_at_all(path, few_stores["float16"]), f"change {moment}"
        extract(few, encoder, path)
        assert content(path) == undisturbed, f"change {moment}"
        assert {**done(path), **before} == done(path), f"change {moment}"
        assert verify(path).sound, f"change {moment}"
    # The moments were spread over the whole run, or this would say little.
    assert len(shards_done) > 2


@pytest.mark.parametrize("every", [6, pytest.param(2, marks=pytest.mark.sweep)])
def test_an_int8_store_killed_while_it_is_finished_is_finished_again(
    die_everywhere: Callable[..., Deaths],
    content: Content,
    few_path: Path,
    few: FrameDataset,
    few_stores: dict[str, Path],
    tcn_weights: Path,
    encoder: Encoder,
    every: int,
) -> None:
    def unfinish(path: Path) -> None:
        shutil.copytree(few_stores["int8"], path)
        attributes = read_attributes(path)
        del attributes["mean"], attributes["std"], attributes["columns"]["scale"]
        write_attributes(path, {**attributes, "complete": False})

    for moment, path in die_everywhere(extract_store, few_path, tcn_weights, "int8", prepare=unfinish, every=every):
        before = done(path)
        extract(few, encoder, path, dtype="int8")
        assert content(path) == content(few_stores["int8"]), f"change {moment}"
        assert done(path) == before


@pytest.mark.parametrize(
    "size", [1000, 2700, *(pytest.param(n, marks=pytest.mark.sweep) for n in (300, 1500, 2000, 3500))]
)
def test_an_extraction_killed_in_the_middle_of_a_write_believes_no_torn_file(
    start: Start,
    content: Content,
    few_path: Path,
    few: FrameDataset,
    few_stores: dict[str, Path],
    tcn_weights: Path,
    encoder: Encoder,
    tmp_path: Path,
    size: int,
) -> None:
    # Sizes below those of the metadata, the records, the shards and the finished description, each in turn the first to be torn.
    path = tmp_path / "few.zarr"
    child = start(die_writing, size, extract_store, path, few_path, tcn_weights)
    assert child.outcome() == ("died", -signal.SIGXFSZ)
    torn = [file for file in tmp_path.rglob("*") if file.is_file() and file.stat().st_size == size]
    assert torn, "nothing was torn"
    assert not any(
        str(file.relative_to(path)) in content(few_stores["float16"]) for file in torn if path in file.parents
    )
    extract(few, encoder, path)
    assert content(path) == content(few_stores["float16"])


@pytest.mark.parametrize("enough", [6, pytest.param(30, marks=pytest.mark.sweep)])
def test_an_extraction_killed_at_random_moments_ends_like_one_that_was_not(
    start: Start,
    content: Content,
    few_path: Path,
    few: FrameDataset,
    few_stores: dict[str, Path],
    tcn_weights: Path,
    encoder: Encoder,
    tmp_path: Path,
    enough: int,
) -> None:
    rng = random.Random(SEED)
    undisturbed = content(few_stores["float16"])
    seconds = seconds_of(start(extract_store, tmp_path / "whole.zarr", few_path, tcn_weights))
    kills = 0
    for number in range(100):
        path = tmp_path / f"{number}.zarr"
        for _ in range(5):
            before = done(path)
            child = start(extract_store, path, few_path, tcn_weights)
            time.sleep(rng.uniform(0, seconds))
            child.kill()
            assert {**done(path), **before} == done(path), f"a finished shard was done again; seed {SEED}, kill {kills}"
            if child.process.exitcode == 0:
                break
            kills += 1
        extract(few, encoder, path)
        assert content(path) == undisturbed, f"seed {SEED}, kill {kills}"
        if kills >= enough:
            return
    raise AssertionError(f"only {kills} kills")


@SOME_OR_MORE
@pytest.mark.parametrize("damage", ["shards", "columns", "description"])
def test_a_repair_killed_at_any_change_of_a_file_is_done_by_the_next(
    die_everywhere: Callable[..., Deaths], content: Content, few_stores: dict[str, Path], damage: str, every: int
) -> None:
    undisturbed = content(few_stores["float16"])

    def spoil(path: Path) -> None:
        shutil.copytree(few_stores["float16"], path)
        if damage == "columns":
            shutil.rmtree(path / "action")
            (path / "state" / "zarr.json").write_text("{")
        elif damage == "description":
            (path / "tokens" / "zarr.json").write_text("{}")
        else:
            shard = path / "tokens" / "c.0.0.0"
            values = bytearray(shard.read_bytes())
            values[500] ^= 1
            shard.write_bytes(values)
            (path / "tokens" / "commits" / "000001.json").unlink()

    sound = few_stores["float16"] / "tokens" / "c.2.0.0"
    for moment, path in die_everywhere(repair_store, prepare=spoil, every=every):
        assert reads_right_or_not_at_all(path, few_stores["float16"]), f"change {moment}"
        kept = path / "tokens" / "c.2.0.0"
        before = kept.stat().st_mtime_ns
        repair(path, device="cpu")
        assert content(path) == undisturbed, f"change {moment}"
        assert verify(path).sound, f"change {moment}"
        assert kept.stat().st_mtime_ns == before == sound.stat().st_mtime_ns, f"change {moment}"


@pytest.mark.parametrize("every", [7, pytest.param(2, marks=pytest.mark.sweep)])
def test_a_collection_killed_at_any_change_of_a_file_goes_on(
    die_everywhere: Callable[..., Deaths], content: Content, few_path: Path, every: int
) -> None:
    for moment, path in die_everywhere(collect_few, every=every):
        whole = {file: file.stat().st_mtime_ns for file in path.glob("*.tar")} if path.exists() else {}
        with pytest.raises(UserError, match="collect"):
            FrameDataset.open(path)
        collect_few(path)
        assert content(path) == content(few_path), f"change {moment}"
        assert all(file.stat().st_mtime_ns == stamp for file, stamp in whole.items()), f"change {moment}"


@pytest.mark.parametrize(
    ("saved", "step"),
    [([1], 2), ([1, 2], 3), ([1, 2, 1], 2)],
    ids=["the second", "one that drops the oldest", "one over a later one that was never declared the last"],
)
def test_a_checkpoint_killed_at_any_change_of_a_file_leaves_one_to_go_on_from(
    die_everywhere: Callable[..., Deaths], content: Content, tmp_path: Path, saved: list[int], step: int
) -> None:
    expected = {}
    for number in (1, 2, 3):
        save_step(tmp_path / f"undisturbed-{number}", number)
        expected[number] = content(last_checkpoint(tmp_path / f"undisturbed-{number}"))

    def save_before(run: Path) -> None:
        for number in saved:
            save_step(run, number)
        # As a kill leaves it that comes after a checkpoint is there and before it is declared the last.
        last = run / "checkpoints" / "last"
        last.unlink()
        last.symlink_to(f"step-{saved[-1]:08d}")

    for moment, run in die_everywhere(save_step, step, prepare=save_before, every=1):
        model, optimiser = small_model()
        found = load_training_state(run, model, optimiser)
        assert found in (saved[-1], step), f"change {moment}"
        assert last_checkpoint(run).name == f"step-{found:08d}"
        assert content(last_checkpoint(run)) == expected[found], f"change {moment}"
        save_step(run, 3)
        assert content(last_checkpoint(run)) == expected[3], f"change {moment}"
        assert (run / "checkpoints" / "last").readlink().name == "step-00000003"
        assert len(checkpoints(run)) == 2, f"change {moment}"
        # Nothing of the killed stays.
        assert {file.name for file in (run / "checkpoints").iterdir()} == {
            "last",
            *(folder.name for folder in checkpoints(run)),
        }


def metrics(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def longer(tiny: TrainOptions) -> TrainOptions:
    return replace(tiny, steps=24, checkpoint_every=4, validate_every=12)


@pytest.fixture(scope="module")
def undisturbed_run(store_path: Path, longer: TrainOptions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    train_run(run, store_path, longer)
    return run


def test_a_training_run_killed_at_random_moments_ends_with_the_weights_of_one_that_was_not(
    start: Start, content: Content, store_path: Path, undisturbed_run: Path, longer: TrainOptions, tmp_path: Path
) -> None:
    rng = random.Random(SEED)
    seconds = seconds_of(start(train_run, tmp_path / "whole", store_path, longer))
    kills, after_a_checkpoint = 0, 0
    for number in range(50):
        run = tmp_path / str(number)
        for _ in range(4):
            child = start(train_run, run, store_path, longer)
            time.sleep(rng.uniform(0, seconds))
            child.kill()
            if child.process.exitcode == 0:
                break
            kills += 1
            after_a_checkpoint += bool(checkpoints(run))
        train_run(run, store_path, longer)
        assert content(last_checkpoint(run)) == content(last_checkpoint(undisturbed_run)), f"seed {SEED}, kill {kills}"
        assert metrics(run) == metrics(undisturbed_run), f"seed {SEED}, kill {kills}"
        if kills >= 8 and after_a_checkpoint >= 2:
            return
    raise AssertionError(f"only {kills} kills, {after_a_checkpoint} of them after a checkpoint")


def test_a_training_run_killed_at_any_change_of_a_file_goes_on(
    die_everywhere: Callable[..., Deaths],
    content: Content,
    store_path: Path,
    undisturbed_run: Path,
    longer: TrainOptions,
) -> None:
    for moment, run in die_everywhere(train_run, store_path, longer, every=20):
        train_run(run, store_path, longer)
        assert content(last_checkpoint(run)) == content(last_checkpoint(undisturbed_run)), f"change {moment}"
        assert metrics(run) == metrics(undisturbed_run), f"change {moment}"


@pytest.fixture
def dead(start: Start) -> int:
    """The number of a process that is no more."""
    child = start(os.getpid)
    child.returned()
    return child.pid


def test_what_the_dead_leave_behind_is_swept_or_does_no_harm(
    content: Content, few: FrameDataset, few_stores: dict[str, Path], encoder: Encoder, dead: int, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(few_stores["float16"], tmp_path / "few.zarr"))
    (path / "tokens" / "commits" / "000001.json").unlink()
    write_attributes(path, {**read_attributes(path), "complete": False})
    commits, tokens = path / "tokens" / "commits", path / "tokens"
    host = platform.node()
    swept = [
        commits / f".000001.json.{host}.{dead}.tmp",
        tokens / f".c.0.0.0.{host}.{dead}.tmp",
        tokens / f".c.1.0.0.{host}.{dead}.tmp",
        commits / "000001.lock",
        commits / "000002.lock",  # of a shard that is done
    ]
    staying = [
        commits / f".000001.json.{host}.{os.getppid()}.tmp",  # of one who lives
        commits / f".000001.json.another-{host}.{dead}.tmp",  # of who knows whom
        commits / f".000001.json.{dead}.tmp",
        tokens / f".c.1.0.0.{host}.{os.getppid()}.tmp",
        tokens / f".c.1.0.0.another-{host}.{dead}.tmp",
        tokens / "c.1.0.0.partial",
    ]
    for file in swept + staying:
        file.write_bytes(b"half of it")
    # A whole store that was never moved into its place.
    skeleton = path.with_name(f".few.zarr.{host}.{dead}.tmp")
    shutil.copytree(few_stores["float16"], skeleton)

    # They are none of the store's, and no fault of it.
    before = verify(path)
    assert before.faults == []
    assert set(before.leftovers) == {str(file) for file in swept + staying}

    extract(few, encoder, path)
    assert content(path) == content(few_stores["float16"])
    assert [file for file in swept if file.exists()] == []
    assert [file for file in staying if not file.exists()] == []
    after = verify(path)
    assert after.sound
    assert set(after.leftovers) == {str(file) for file in staying}
    np.testing.assert_array_equal(TokenStore.open(path).action, few.steps.action)


def test_the_dead_may_have_had_ones_own_number(
    content: Content, few: FrameDataset, few_stores: dict[str, Path], encoder: Encoder, tmp_path: Path
) -> None:
    # In a container every start counts its processes from 1.
    path = tmp_path / "few.zarr"
    shutil.copytree(few_stores["int8"], tmp_path / f".few.zarr.{platform.node()}.{os.getpid()}.tmp")
    extract(few, encoder, path)
    assert content(path) == content(few_stores["float16"])
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_store_sweeps_what_the_dead_began_beside_it(
    content: Content, few: FrameDataset, few_stores: dict[str, Path], encoder: Encoder, dead: int, tmp_path: Path
) -> None:
    host, path = platform.node(), tmp_path / "few.zarr"
    swept = tmp_path / f".few.zarr.{host}.{dead}.tmp"
    staying = [
        tmp_path / f".few.zarr.{host}.{os.getppid()}.tmp",
        tmp_path / f".few.zarr.another-{host}.{dead}.tmp",
        tmp_path / f".few.zarr.{dead}.tmp",
        tmp_path / "few.tmp",
    ]
    for folder in (swept, *staying):
        shutil.copytree(few_stores["int8"], folder)
    (tmp_path / ".few.zarr.lock").touch()
    extract(few, encoder, path)
    assert content(path) == content(few_stores["float16"])
    assert sorted(tmp_path.iterdir()) == sorted([path, *staying])
