"""Stores at a glance, whatever state they are in; and only a store is ever deleted."""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from wmcache.cache import Identity, StoreWriter, TokenStore
from wmcache.cache.catalogue import Entry, bytes_on_disk, describe, list_stores, look_at, remove
from wmcache.cache.records import record_file
from wmcache.common.errors import UserError

Tokens = NDArray[np.float16]
MakeWriter = Callable[..., StoreWriter]


def everything(path: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture
def unfinished(tmp_path: Path, make_writer: MakeWriter, tokens: Tokens) -> Path:
    """2 of 4 shards are done."""
    writer = make_writer(tmp_path / "unfinished.zarr")
    writer.write_shard(3, tokens[48:])
    writer.write_shard(0, tokens[:16])
    return writer.path


def test_a_complete_store(finished: Path) -> None:
    entry = look_at(finished)
    size = sum(len(data) for data in everything(finished).values())
    assert entry == Entry(str(finished), "made-up", "made-up", 50, 6, 4, "float16", size, 4, 4, True, "")
    assert entry.state == "complete"
    assert size > TokenStore.open(finished).card.token_bytes


def test_an_unfinished_store_says_how_far_it_is(unfinished: Path) -> None:
    entry = look_at(unfinished)
    assert (entry.complete, entry.shards_done, entry.shards, entry.fault) == (False, 2, 4, "")
    assert entry.state == "2 of 4 shards"


@pytest.mark.parametrize("text", ["", "{", '{"attributes": {}}'])
def test_a_damaged_store_says_why(finished: Path, text: str) -> None:
    (finished / "zarr.json").write_text(text)
    entry = look_at(finished)
    assert entry.state == "damaged"
    assert str(finished / "zarr.json") in entry.fault
    assert (entry.path, entry.bytes) == (str(finished), bytes_on_disk(finished))
    assert "\n" not in entry.fault


def test_looking_reads_no_tokens(finished: Path) -> None:
    before = look_at(finished)
    for file in (finished / "tokens").glob("c.*"):
        file.write_bytes(bytes(file.stat().st_size))
    assert look_at(finished) == before


def test_all_stores_under_a_folder_are_listed_in_order(tmp_path: Path, finished: Path, unfinished: Path) -> None:
    (tmp_path / "b").mkdir()
    shutil.copytree(finished, tmp_path / "b" / "damaged.zarr")
    (tmp_path / "b" / "damaged.zarr" / "zarr.json").write_text("{")
    finished.rename(tmp_path / "a.zarr")
    # What is no store, or not one yet.
    shutil.copytree(unfinished, tmp_path / ".b.zarr.host.123.tmp")
    shutil.copytree(unfinished, tmp_path / ".hidden.zarr")
    (tmp_path / "file.zarr").write_text("no folder")
    (tmp_path / "dataset").mkdir()
    found = [(Path(entry.path).relative_to(tmp_path).as_posix(), entry.state) for entry in list_stores(tmp_path)]
    assert found == [("a.zarr", "complete"), ("b/damaged.zarr", "damaged"), ("unfinished.zarr", "2 of 4 shards")]


def test_the_list_is_in_order_whatever_the_file_system_says(tmp_path: Path) -> None:
    names = [f"{number:02d}.zarr" for number in np.random.default_rng(0).permutation(20)]
    for name in names:
        (tmp_path / name).mkdir()
    assert [Path(entry.path).name for entry in list_stores(tmp_path)] == sorted(names)


def test_where_nothing_is_nothing_is_listed(tmp_path: Path) -> None:
    assert list_stores(tmp_path) == []
    assert list_stores(tmp_path / "none") == []


CHURN = """
import itertools, pathlib, sys
folder = pathlib.Path(sys.argv[1])
print("at work", flush=True)
for number in itertools.count():
    made = folder / f"x{number % 7}"
    made.mkdir()
    (made / "file").write_text("x")
    (made / "file").unlink()
    made.rmdir()
"""


def test_a_store_can_be_looked_at_while_it_is_written(unfinished: Path) -> None:
    # Writers delete torn shards and rename temporary files: what was listed may be gone before its size is asked for.
    place = str(unfinished / "tokens")
    process = subprocess.Popen([sys.executable, "-c", CHURN, place], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        for _ in range(400):
            assert look_at(unfinished).state == "2 of 4 shards"
    finally:
        process.kill()
        process.communicate()


def test_a_description_holds_all_that_a_store_says_of_itself(finished: Path, identity: Identity) -> None:
    found = describe(finished)
    store = TokenStore.open(finished)
    assert Identity.from_json(found["identity"], "here") == identity
    assert found["card"] == json.loads(json.dumps(dataclasses.asdict(store.card)))
    assert found["versions"]["zarr"] == zarr.__version__
    assert found["versions"]["numpy"] == np.__version__
    assert found.items() >= dataclasses.asdict(look_at(finished)).items()
    json.dumps(found)


def test_a_description_of_nothing_is_refused(tmp_path: Path, finished: Path) -> None:
    with pytest.raises(UserError, match=r"none\.zarr does not exist"):
        describe(tmp_path / "none.zarr")
    (finished / "zarr.json").write_text("{")
    with pytest.raises(UserError, match=r"made-up\.zarr/zarr\.json cannot be read .*; run its wmcache extract again"):
        describe(finished)


def test_a_store_is_deleted_and_its_neighbours_stay(tmp_path: Path, finished: Path, unfinished: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    size, there = bytes_on_disk(finished), everything(unfinished)
    assert remove(finished) == size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thesis.txt", "unfinished.zarr"]
    assert everything(unfinished) == there
    with pytest.raises(UserError, match=r"made-up\.zarr does not exist; list stores with: wmcache ls"):
        remove(finished)


@pytest.mark.parametrize("text", ["", "{", None])
def test_a_damaged_store_can_be_deleted(finished: Path, text: str | None) -> None:
    if text is None:
        (finished / "zarr.json").unlink()
    else:
        (finished / "zarr.json").write_text(text)
    remove(finished)
    assert list(finished.parent.iterdir()) == []


def test_what_is_no_store_is_not_deleted(tmp_path: Path, finished: Path) -> None:
    zarr.create_group(tmp_path / "other.zarr", attributes={"format": "somebody-elses"})
    (tmp_path / "thesis.txt").write_text("years of work")
    before = everything(tmp_path)
    for name in ("other.zarr", "thesis.txt", ".", "made-up.zarr/tokens", "made-up.zarr/tokens/commits"):
        with pytest.raises(UserError, match=r"is not a token store, so it stays; list stores with: wmcache ls"):
            remove(tmp_path / name)
    assert everything(tmp_path) == before


def test_a_store_can_be_deleted_from_inside(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished)
    remove(Path())
    assert list(finished.parent.iterdir()) == []


def test_a_link_is_not_broken_halfway(tmp_path: Path, finished: Path) -> None:
    # Deleted or refused: both are right, but not a link under a name that nobody gave.
    link = tmp_path / "link.zarr"
    link.symlink_to(finished)
    try:
        remove(link)
    except UserError:
        assert link.is_symlink()
        assert look_at(finished).complete
    else:
        assert not link.is_symlink()
    assert {path.name for path in tmp_path.iterdir()} <= {"link.zarr", "made-up.zarr"}


def test_the_grave_of_a_killed_deletion_is_swept_by_the_next(tmp_path: Path, finished: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    grave = tmp_path / f".old.zarr.{platform.node()}.{dead.pid}.tmp"
    shutil.copytree(finished, grave)
    remove(finished)
    assert list(tmp_path.iterdir()) == []


def test_a_store_without_a_record_counts_it_as_not_done(finished: Path) -> None:
    record_file(finished, 2).unlink()
    assert (look_at(finished).shards_done, look_at(finished).shards) == (3, 4)
