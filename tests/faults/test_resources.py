"""Too little of everything: disk, memory, file descriptors, permission. Nothing half-done is believed, and people are told what to do."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fault_workers import (
    Attempt,
    Child,
    gather_at_the_limit,
    gather_from_read_only,
    gather_with_few_files,
    new_control_group,
    on_read_only,
    on_small_disks,
    save_on_small_disks,
    save_step,
    train_in_few_addresses,
    train_in_little_memory,
    train_run,
    with_small_files,
)

from wmcache.cache import Identity, StoreCard, StoreWriter, TokenStore
from wmcache.cache.layout import read_attributes
from wmcache.engine.checkpoint import last_checkpoint
from wmcache.trainer.options import TrainOptions

Content = Callable[[Path], dict[str, bytes]]
Start = Callable[..., Child]

MODEL = ["--width", 16, "--depth", 1, "--heads", 2, "--device", "cpu"]


def unclear(line: str, place: Path) -> bool:
    """Whether an error's line lacks the place that the user gave or what to do, or names files that the user never gave."""
    of_ours = re.search(r"\.tmp|\.partial|\.lock|events\.out", re.sub(r"\(.*\)", "", line))
    return not line.startswith("Error: ") or str(place) not in line or ";" not in line or bool(of_ours)


def require_attempts(attempts: list[Attempt], place: Path, undisturbed: dict[str, bytes]) -> None:
    failed = [attempt for attempt in attempts if attempt.status]
    assert failed, "there was always enough"
    assert len(failed) < len(attempts) or attempts[0].limit.endswith("bytes"), "there was never enough"
    for attempt in failed:
        assert "Traceback" not in attempt.said, attempt.limit
        assert attempt.status == 1, attempt.limit
        # Neither is it taken for whole, nor for broken.
        assert attempt.opened is not None, attempt.limit
        assert "incomplete" in attempt.opened or "does not exist" in attempt.opened, attempt.limit
        assert attempt.faults == [], attempt.limit
    for attempt in attempts:
        assert attempt.again[0] == 0, f"{attempt.limit}: {attempt.again[1]}"
        assert attempt.content == undisturbed, attempt.limit
    bad = [attempt.told for attempt in failed if unclear(attempt.told, place)]
    assert not bad, "\n".join(bad)


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
def test_an_extraction_onto_a_full_disk_says_so_and_goes_on_when_there_is_room(
    start: Start,
    content: Content,
    few_path: Path,
    few_stores: dict[str, Path],
    tcn_weights: Path,
    tmp_path: Path,
    dtype: str,
    scarce: str,
    every: int,
    last: int,
) -> None:
    words = [
        "--dataset",
        few_path,
        "--weights",
        tcn_weights,
        "--device",
        "cpu",
        "--store-dtype",
        dtype,
        "--out",
        "{out}",
    ]
    attempts = start(on_small_disks, tmp_path, scarce, every, last, ["wmcache", "extract", *words]).returned()
    require_attempts(attempts, tmp_path, content(few_stores[dtype]))


@pytest.mark.parametrize(
    ("dtype", "every"),
    [("float16", 3), *(pytest.param(name, 1, marks=pytest.mark.sweep) for name in ("float16", "int8"))],
)
def test_an_extraction_with_a_limit_on_the_size_of_files_says_so_and_goes_on_without_it(
    start: Start,
    content: Content,
    few_path: Path,
    few_stores: dict[str, Path],
    tcn_weights: Path,
    tmp_path: Path,
    dtype: str,
    every: int,
) -> None:
    words = [
        "--dataset",
        few_path,
        "--weights",
        tcn_weights,
        "--device",
        "cpu",
        "--store-dtype",
        dtype,
        "--out",
        "{out}",
    ]
    # Below the sizes of the columns, the description, the records, the shards and the finished description.
    sizes = [100, 400, 700, 1000, 1500, 1700, 2000, 2700, 3500][::every]
    attempts = start(with_small_files, tmp_path / "some", sizes, ["wmcache", "extract", *words]).returned()
    require_attempts(attempts, tmp_path, content(few_stores[dtype]))


@pytest.mark.parametrize(("scarce", "every"), [("nr_inodes", 1), ("size", 2)])
def test_a_run_on_a_full_disk_says_so_and_goes_on_when_there_is_room(
    start: Start, content: Content, store_path: Path, tmp_path: Path, scarce: str, every: int
) -> None:
    words = ["--steps", 4, "--batch-size", 4, "--checkpoint-every", 2, "--log-every", 1, *MODEL, "--cache", store_path]
    attempts = start(on_small_disks, tmp_path, scarce, every, 0, ["wmtrain", *words, "--out", "{out}"]).returned()
    straight = attempts[0]
    assert straight.status == 0
    weights = "checkpoints/step-00000004/model.safetensors"
    for attempt in attempts:
        assert "Traceback" not in attempt.said, attempt.limit
        assert attempt.status in (0, 1), attempt.limit
        assert attempt.again[0] == 0, f"{attempt.limit}: {attempt.again[1]}"
        assert attempt.content[weights] == straight.content[weights], attempt.limit
    failed = [attempt for attempt in attempts if attempt.status]
    assert len(failed) > 5
    bad = [attempt.told for attempt in failed if unclear(attempt.told, tmp_path)]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("scarce", ["nr_inodes", "size"])
def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(
    start: Start, content: Content, tmp_path: Path, scarce: str
) -> None:
    expected = {}
    for number in (1, 2):
        save_step(tmp_path / str(number), number)
        expected[number] = content(last_checkpoint(tmp_path / str(number)))
    place = tmp_path / "disks"
    place.mkdir()
    found = start(save_on_small_disks, place, scarce).returned()
    for said, step, before, after in found:
        assert before == expected[step]
        assert step == (1 if said else 2)
        assert after == expected[2]
    refusals = [said for said, *_ in found if said]
    assert 3 < len(refusals) < len(found)
    bad = [said for said in refusals if not re.match(r"cannot write checkpoint .*step-00000002 .*; free space", said)]
    assert not bad, "\n".join(bad)


@pytest.fixture
def spoilt(few_stores: dict[str, Path], store_path: Path, tmp_path: Path) -> dict[str, Path]:
    """Stores, whole and not, and a run, to be copied to where nothing can be written."""
    folder = tmp_path / "spoilt"
    copies = {name: Path(shutil.copytree(few_stores["float16"], folder / name)) for name in ("whole", "bad", "part")}
    file = copies["bad"] / "tokens" / "c.1.0.0"
    values = bytearray(file.read_bytes())
    values[500] ^= 1
    file.write_bytes(values)
    identity = Identity.from_json(read_attributes(copies["part"])["identity"], "part")
    StoreWriter.resume(copies["part"], identity).reopen([1])
    return {**copies, "long": store_path}


READ_ONLY = {
    "extract a new store": "wmcache extract --dataset {few} --weights {weights} --device cpu --out {place}/new.zarr",
    "extract what is missing": "wmcache extract --dataset {few} --weights {weights} --device cpu --out {place}/part",
    "repair a damaged store": "wmcache repair {place}/bad --device cpu",
    "repair an unfinished store": "wmcache repair {place}/part --device cpu",
    "train into a new run": "wmtrain --cache {place}/long --out {place}/run {model}",
    "train into a new run in a new folder": "wmtrain --cache {place}/long --out {place}/runs/run {model}",
    "go on with a run": "wmtrain --cache {place}/long --out {place}/begun {model}",
}


def test_writing_to_a_read_only_place_names_it_and_says_what_to_do(
    start: Start,
    spoilt: dict[str, Path],
    store_path: Path,
    few_path: Path,
    tcn_weights: Path,
    tiny: TrainOptions,
    tmp_path: Path,
) -> None:
    place, model = (
        tmp_path / "read-only",
        " ".join(map(str, ["--steps", 4, "--batch-size", 8, "--dtype", "float32", *MODEL])),
    )
    place.mkdir()
    train_run(tmp_path / "begun", store_path, replace(tiny, steps=4, model_options={**tiny.model_options}))
    words = {
        name: [
            word.format(place=place, few=few_path, weights=tcn_weights)
            for word in line.replace("{model}", model).split()
        ]
        for name, line in READ_ONLY.items()
    }
    found = start(on_read_only, place, {**spoilt, "begun": tmp_path / "begun"}, list(words.values())).returned()
    bad = []
    for name, (status, said) in zip(words, found, strict=True):
        line = said.rstrip().splitlines()[-1]
        assert "Traceback" not in said, name
        if status != 1 or unclear(line, place) or "Read-only file system" not in line:
            bad.append(f"{name}: {line}")
    assert not bad, "\n".join(bad)


def test_a_finished_store_in_a_read_only_place_can_be_used(
    start: Start, spoilt: dict[str, Path], few_path: Path, tcn_weights: Path, tmp_path: Path
) -> None:
    place = tmp_path / "read-only"
    place.mkdir()
    lines = [
        ["wmcache", "verify", place / "whole"],
        ["wmcache", "info", place / "whole"],
        ["wmcache", "ls", place],
        ["wmcache", "repair", place / "whole"],  # there is nothing to do
        [
            "wmcache",
            "extract",
            "--dataset",
            few_path,
            "--weights",
            tcn_weights,
            "--device",
            "cpu",
            "--out",
            place / "whole",
        ],
        ["wmtrain", "--cache", place / "long", "--out", tmp_path / "run", "--steps", 2, "--batch-size", 8, *MODEL],
    ]
    for words, (status, said) in zip(lines, start(on_read_only, place, spoilt, lines).returned(), strict=True):
        assert status == 0, f"{words}: {said}"


def test_tokens_are_read_from_a_read_only_place(start: Start, few_stores: dict[str, Path], tmp_path: Path) -> None:
    tokens, sound = start(gather_from_read_only, tmp_path, few_stores["int8"]).returned()
    np.testing.assert_array_equal(tokens, TokenStore.open(few_stores["int8"]).gather(np.arange(24)))
    assert sound


@pytest.fixture
def thrifty(tiny: TrainOptions) -> TrainOptions:
    """Few windows in the validation, which takes up to 64 at once."""
    return replace(tiny, steps=10, batch=4, frameskip=20, log_every=5, validate_every=10, checkpoint_every=10)


def test_a_store_larger_than_the_addresses_allowed_is_trained_on_from_disk(
    start: Start, big_store: Path, thrifty: TrainOptions, tmp_path: Path
) -> None:
    said = start(train_in_few_addresses, tmp_path / "run", big_store, thrifty, 200_000_000).returned()
    assert "MB of tokens on disk (" in said
    assert last_checkpoint(tmp_path / "run").name == "step-00000010"


def test_a_store_larger_than_the_addresses_allowed_is_not_forced_into_memory(
    start: Start, big_store: Path, thrifty: TrainOptions, tmp_path: Path
) -> None:
    arguments = (tmp_path / "run", big_store, replace(thrifty, residence="ram"), 200_000_000)
    assert start(train_in_few_addresses, *arguments).refused().endswith("; choose a --residence of disk")


def test_a_store_larger_than_the_memory_of_its_control_group_is_trained_on_from_disk(
    start: Start, big_store: Path, thrifty: TrainOptions, tmp_path: Path
) -> None:
    options = replace(thrifty, steps=40, batch=16)
    group, limit = new_control_group(), 300_000_000
    child = start(train_in_little_memory, tmp_path / "run", big_store, options, group, limit)
    try:
        said, peak = child.returned()
    finally:
        child.kill()
        if group.exists():
            group.rmdir()
    assert "MB of tokens on disk (" in said
    assert peak <= limit
    assert last_checkpoint(tmp_path / "run").name == "step-00000040"


@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_NOFILE"])
def test_what_the_machine_lacks_is_not_taken_for_damage_of_the_store(start: Start, big_store: Path, limit: str) -> None:
    said = start(gather_at_the_limit, big_store, limit).refused()
    assert "repair" not in said


def test_a_store_of_more_shards_than_files_may_be_open_is_read_whole(start: Start, tmp_path: Path) -> None:
    frames = np.arange(600)
    rng = np.random.default_rng(0)
    card = StoreCard({}, {}, (1, 2), 4, frames=len(frames), frames_per_shard=3)
    identity = Identity("made-up", "file", "0", "norm", "patch", 8, "none", ((0.5,), (0.5,)), "float32", "float16", "0")
    steps = {
        "action": rng.normal(size=(600, 2)),
        "state": rng.normal(size=(600, 4)),
        "episode": frames // 60,
        "step": frames % 60,
    }
    tokens = rng.normal(size=(600, 2, 4)).astype(np.float16)
    writer = StoreWriter.create(tmp_path / "some.zarr", card, identity, steps)
    for shard in writer.pending():
        writer.write_shard(shard, tokens[card.shard_frames(shard).start : card.shard_frames(shard).stop])
    writer.finish()
    wanted = np.concatenate([rng.permutation(frames), frames])
    np.testing.assert_array_equal(start(gather_with_few_files, writer.path, wanted).returned(), tokens[wanted])
