"""Stores are listed in any state; only stores are deleted."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zarr

from wmcache.cache import TokenStore
from wmcache.cache.catalogue import Entry, list_stores, remove, summarise
from wmcache.cache.records import record_file
from wmcache.common.errors import UserError
from wmcache.common.paths import usage

from ..conftest import contents, make_writer, write


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    """2 of 4 shards are done."""
    write(make_writer(tmp_path / "unfinished.zarr"), [3, 0])
    return tmp_path / "unfinished.zarr"


def test_a_complete_store(finished: Path) -> None:
    entry = summarise(finished)
    size = sum(map(len, contents(finished).values()))
    assert entry == Entry(str(finished), "made-up", "made-up", 50, 6, 4, "float16", size, 4, 4, True, "")
    assert entry.state == "complete"
    assert size > TokenStore.open(finished).card.token_bytes
    record_file(finished, 2).unlink()
    assert (summarise(finished).shards_done, summarise(finished).shards) == (3, 4)


def test_summarising_reads_no_tokens(finished: Path) -> None:
    before = summarise(finished)
    for file in (finished / "tokens").glob("c.*"):
        file.write_bytes(bytes(file.stat().st_size))
    assert summarise(finished) == before


def test_all_stores_under_a_folder_are_listed_in_order(tmp_path: Path, finished: Path, unfinished: Path) -> None:
    (tmp_path / "b").mkdir()
    shutil.copytree(finished, tmp_path / "b" / "damaged.zarr")
    (tmp_path / "b" / "damaged.zarr" / "zarr.json").write_text("{")
    finished.rename(tmp_path / "a.zarr")
    # Not stores, or not yet.
    shutil.copytree(unfinished, tmp_path / ".b.zarr.host.123.tmp")
    shutil.copytree(unfinished, tmp_path / ".hidden.zarr")
    (tmp_path / "file.zarr").write_text("a file")
    (tmp_path / "dataset").mkdir()
    found = [(Path(entry.path).relative_to(tmp_path).as_posix(), entry.state) for entry in list_stores(tmp_path)]
    assert found == [("a.zarr", "complete"), ("b/damaged.zarr", "damaged"), ("unfinished.zarr", "2 of 4 shards")]
    assert list_stores(tmp_path / "none") == []


def test_a_store_can_be_summarised_while_it_is_written(unfinished: Path) -> None:
    # Writers delete torn shards and rename temporary files between the listing and the sizes.
    made, done = unfinished / "tokens" / "x", threading.Event()

    def churn() -> None:
        while not done.is_set():
            made.mkdir()
            (made / "file").write_text("x")
            (made / "file").unlink()
            made.rmdir()

    with ThreadPoolExecutor(1) as pool:
        churning = pool.submit(churn)
        try:
            for _ in range(400):
                assert summarise(unfinished).state == "2 of 4 shards"
        finally:
            done.set()
        churning.result(10)


def test_only_the_store_is_deleted(tmp_path: Path, finished: Path, unfinished: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    shutil.copytree(finished, tmp_path / f".old.zarr.{platform.node()}.{dead.pid}.tmp")  # of a killed deletion
    size, before = usage(finished), contents(unfinished)
    assert remove(finished) == size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thesis.txt", "unfinished.zarr"]
    assert contents(unfinished) == before
    with pytest.raises(UserError, match=r"made-up\.zarr .*wmcache ls"):
        remove(finished)


def test_other_folders_files_and_links_are_not_deleted(tmp_path: Path, finished: Path) -> None:
    zarr.create_group(tmp_path / "other.zarr", attributes={"format": "another"})
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / "link.zarr").symlink_to(finished)
    before = contents(tmp_path)
    names = ("other.zarr", "thesis.txt", ".", "link.zarr", "made-up.zarr/tokens", "made-up.zarr/tokens/commits")
    for name in names:
        with pytest.raises(UserError, match=name):
            remove(tmp_path / name)
    assert contents(tmp_path) == before
    assert (tmp_path / "link.zarr").is_symlink()
