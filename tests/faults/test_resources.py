"""Too little disk, memory, file descriptors or permission: nothing half-done is used, and the error names the path and a remedy."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import scarce_workers as limited
from damage_tools import flip, is_refusal
from fault_workers import Child, Sample, content, save_step, train_run
from scarce_workers import Attempt

from wmcache.cache import Identity, StoreWriter
from wmcache.cache.layout import read_attributes
from wmcache.engine.checkpoint import last_checkpoint
from wmcache.trainer.options import TrainOptions

Start = Callable[..., Child]

MODEL = ["--width", 16, "--depth", 1, "--heads", 2, "--device", "cpu"]


def check_error(output: str, path: Path, when: str) -> None:
    """The last line is an error that names the user's path and a remedy, and none of wmcache's temporary files."""
    line = output.rstrip().splitlines()[-1]
    temporary = re.search(r"\.tmp|\.partial|\.lock|events\.out", re.sub(r"\(.*\)", "", line))
    assert "Traceback" not in output, when
    assert line.startswith("Error: "), f"{when}: {line}"
    assert str(path) in line, f"{when}: {line}"
    assert ";" in line, f"{when}: {line}"
    assert not temporary, f"{when}: {line}"


def check_attempts(attempts: list[Attempt], path: Path, undisturbed: dict[str, bytes]) -> None:
    failed = [attempt for attempt in attempts if attempt.status]
    assert failed
    assert len(failed) < len(attempts) or attempts[0].limit.endswith("bytes")
    for attempt in failed:
        assert attempt.status == 1, attempt.limit
        check_error(attempt.output, path, attempt.limit)
        # The store is neither complete nor damaged.
        assert attempt.opened is not None, attempt.limit
        assert attempt.faults == [], attempt.limit
    for attempt in attempts:
        assert attempt.again[0] == 0, f"{attempt.limit}: {attempt.again[1]}"
        assert attempt.content == undisturbed, attempt.limit


@pytest.mark.parametrize(
    ("dtype", "scarce", "every", "last"),
    [
        ("float16", "nr_inodes", 11, 0),
        ("float16", "size", 11, 0),
        pytest.param("float16", "nr_inodes", 3, 0, marks=pytest.mark.sweep),
        pytest.param("float16", "size", 2, 0, marks=pytest.mark.sweep),
        pytest.param("int8", "nr_inodes", 1, 11, marks=pytest.mark.sweep),
        pytest.param("int8", "size", 1, 9, marks=pytest.mark.sweep),
    ],
)
def test_an_extraction_onto_a_full_disk_continues_when_there_is_room(
    start: Start, few: Sample, tmp_path: Path, dtype: str, scarce: str, every: int, last: int
) -> None:
    words = ["wmcache", "extract", *few.words, "--store-dtype", dtype, "--out", "{out}"]
    attempts = start(limited.on_small_disks, tmp_path, scarce, every, last, words).returned()
    check_attempts(attempts, tmp_path, content(few.stores[dtype]))


@pytest.mark.parametrize(
    ("dtype", "every"),
    [("float16", 3), *(pytest.param(name, 1, marks=pytest.mark.sweep) for name in ("float16", "int8"))],
)
def test_an_extraction_with_a_limit_on_the_size_of_files_continues_without_it(
    start: Start, few: Sample, tmp_path: Path, dtype: str, every: int
) -> None:
    words = ["wmcache", "extract", *few.words, "--store-dtype", dtype, "--out", "{out}"]
    # Below the sizes of the columns, the description, the records, the shards and the finished description.
    sizes = [100, 400, 700, 1000, 1500, 1700, 2000, 2700, 3500][::every]
    attempts = start(limited.with_small_files, tmp_path / "some", sizes, words).returned()
    check_attempts(attempts, tmp_path, content(few.stores[dtype]))


@pytest.mark.parametrize(("scarce", "every"), [("nr_inodes", 1), ("size", 2)])
def test_a_run_on_a_full_disk_continues_when_there_is_room(
    start: Start, store_path: Path, tmp_path: Path, scarce: str, every: int
) -> None:
    words = ["--steps", 4, "--batch-size", 4, "--checkpoint-every", 2, "--log-every", 1, *MODEL, "--cache", store_path]
    attempts = start(
        limited.on_small_disks, tmp_path, scarce, every, 0, ["wmtrain", *words, "--out", "{out}"]
    ).returned()
    straight = attempts[0]
    assert straight.status == 0
    weights = "checkpoints/step-00000004/model.safetensors"
    for attempt in attempts:
        assert attempt.again[0] == 0, f"{attempt.limit}: {attempt.again[1]}"
        assert attempt.content[weights] == straight.content[weights], attempt.limit
    failed = [attempt for attempt in attempts if attempt.status]
    assert len(failed) > 5
    for attempt in failed:
        assert attempt.status == 1, attempt.limit
        check_error(attempt.output, tmp_path, attempt.limit)


@pytest.mark.parametrize("scarce", ["nr_inodes", "size"])
def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(start: Start, tmp_path: Path, scarce: str) -> None:
    expected = {}
    for number in (1, 2):
        save_step(tmp_path / str(number), number)
        expected[number] = content(last_checkpoint(tmp_path / str(number)))
    disks = tmp_path / "disks"
    disks.mkdir()
    found = start(limited.save_on_small_disks, disks, scarce).returned()
    for refusal, step, before, after in found:
        assert before == expected[step]
        assert step == (1 if refusal else 2)
        assert after == expected[2]
    refusals = [refusal for refusal, *_ in found if refusal]
    assert 3 < len(refusals) < len(found)
    assert all(is_refusal(refusal, disks, "step-00000002", ";") for refusal in refusals), refusals


@pytest.fixture
def spoilt(few: Sample, store_path: Path, tmp_path: Path) -> dict[str, Path]:
    """Stores to be copied to a read-only mount: complete, damaged, unfinished, and one to train on."""
    folder = tmp_path / "spoilt"
    copies = {name: Path(shutil.copytree(few.store, folder / name)) for name in ("whole", "bad", "part")}
    flip(copies["bad"] / "tokens" / "c.1.0.0", 500)
    identity = Identity.from_json(read_attributes(copies["part"])["identity"], "part")
    StoreWriter.resume(copies["part"], identity).reopen([1])
    return {**copies, "long": store_path}


@pytest.fixture
def mounted(tmp_path: Path) -> Path:
    path = tmp_path / "read-only"
    path.mkdir()
    return path


def test_writing_to_a_read_only_folder_names_it(
    start: Start,
    spoilt: dict[str, Path],
    mounted: Path,
    store_path: Path,
    few: Sample,
    tiny: TrainOptions,
    tmp_path: Path,
) -> None:
    train_run(tmp_path / "begun", store_path, replace(tiny, steps=4, model_options={**tiny.model_options}))
    wmtrain = ["wmtrain", "--cache", mounted / "long", "--steps", 4, "--batch-size", 8, "--dtype", "float32", *MODEL]
    commands = [
        ["wmcache", "extract", *few.words, "--out", mounted / "new.zarr"],
        ["wmcache", "extract", *few.words, "--out", mounted / "part"],
        ["wmcache", "repair", mounted / "bad", "--device", "cpu"],
        ["wmcache", "repair", mounted / "part", "--device", "cpu"],
        [*wmtrain, "--out", mounted / "run"],
        [*wmtrain, "--out", mounted / "runs/run"],
        [*wmtrain, "--out", mounted / "begun"],
    ]
    found = start(limited.on_read_only, mounted, {**spoilt, "begun": tmp_path / "begun"}, commands).returned()
    for words, (status, output) in zip(commands, found, strict=True):
        assert status == 1, words
        check_error(output, mounted, str(words))
        assert "Read-only file system" in output.splitlines()[-1], words


def test_a_finished_store_in_a_read_only_folder_can_be_used(
    start: Start, spoilt: dict[str, Path], mounted: Path, few: Sample, tmp_path: Path
) -> None:
    whole = mounted / "whole"
    lines = [
        ["wmcache", "verify", whole],
        ["wmcache", "info", whole],
        ["wmcache", "ls", mounted],
        ["wmcache", "repair", whole],  # nothing to do
        ["wmcache", "extract", *few.words, "--out", whole],
        ["wmtrain", "--cache", mounted / "long", "--out", tmp_path / "run", "--steps", 2, "--batch-size", 8, *MODEL],
    ]
    for words, (status, output) in zip(
        lines, start(limited.on_read_only, mounted, spoilt, lines).returned(), strict=True
    ):
        assert status == 0, f"{words}: {output}"


@pytest.fixture
def thrifty(tiny: TrainOptions) -> TrainOptions:
    """Few windows in the validation, which reads up to 64 at once."""
    return replace(tiny, steps=10, batch=4, frameskip=20, log_every=5, validate_every=10, checkpoint_every=10)


def test_a_store_larger_than_the_address_space_is_trained_on_from_disk(
    start: Start, big_store: Path, thrifty: TrainOptions, tmp_path: Path
) -> None:
    run, spare = tmp_path / "run", 200_000_000
    assert "on disk" in start(limited.train_in_few_addresses, run, big_store, thrifty, spare).returned()
    assert last_checkpoint(run).name == "step-00000010"
    forced = replace(thrifty, residence="ram")
    refusal = start(limited.train_in_few_addresses, tmp_path / "forced", big_store, forced, spare).refused()
    assert is_refusal(refusal, "--residence")


def test_a_store_larger_than_the_memory_of_its_control_group_is_trained_on_from_disk(
    start: Start, big_store: Path, thrifty: TrainOptions, tmp_path: Path
) -> None:
    options = replace(thrifty, steps=40, batch=16)
    group, limit = limited.new_control_group(), 300_000_000
    child = start(limited.train_in_little_memory, tmp_path / "run", big_store, options, group, limit)
    try:
        output, peak = child.returned()
    finally:
        child.kill()
        if group.exists():
            group.rmdir()
    assert "on disk" in output
    assert peak <= limit
    assert last_checkpoint(tmp_path / "run").name == "step-00000040"


@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_NOFILE"])
def test_a_lack_of_resources_is_not_reported_as_damage(start: Start, big_store: Path, limit: str) -> None:
    assert "repair" not in start(limited.gather_at_the_limit, big_store, limit).refused()
