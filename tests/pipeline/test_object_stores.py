"""Frames and tokens in an object store have the bytes of those in a folder."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from upath import UPath

from wmcache.cache import StoreWriter, TokenStore
from wmcache.cache import writer as writer_module
from wmcache.cache.catalogue import list_stores
from wmcache.cache.layout import shard_file
from wmcache.cache.mirror import MirroredReader
from wmcache.cache.records import record_file
from wmcache.cache.verify import verify
from wmcache.cli import main
from wmcache.common.errors import UserError
from wmcache.common.paths import put, remove, upload
from wmcache.pipeline.collect import collect
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.extract import extract
from wmcache.pipeline.frames import FrameDataset
from wmcache.pipeline.repair import repair, verify_deep

from ..conftest import contents


@pytest.fixture
def bucket(bucket: UPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> UPath:
    """The empty bucket, and a home of its own for what is cached of it."""
    monkeypatch.setenv("WMCACHE_HOME", str(tmp_path / "home"))
    return bucket


@pytest.fixture
def far(bucket: UPath, store_path: Path) -> UPath:
    """The store in the bucket."""
    upload(store_path, bucket / store_path.name, last="zarr.json")
    return bucket / store_path.name


def objects(at: UPath) -> dict[str, bytes]:
    """Key below a URL -> content."""
    keys = at.fs.find(at.path)
    return {key.removeprefix(at.path).lstrip("/"): at.fs.cat_file(key) for key in keys}


def collect_again(out: UPath) -> None:
    """Collect with the settings of the shared dataset."""
    settings: dict[str, Any] = {"episodes": 6, "length": 60, "image_size": 32, "frames_per_shard": 64}
    collect("wmcache/PointMaze-UMaze-v0", out, **settings, cluster="local:1")


@contextmanager
def failing_once(bucket: UPath, name: str) -> Iterator[list[str]]:
    """Let the first attempt to write an object of this name fail; yields the names that are written."""
    written, failed, pipe_file = list[str](), list[str](), type(bucket.fs).pipe_file

    def fail(self: Any, path: str, *arguments: Any, **settings: Any) -> Any:
        written.append(path.rpartition("/")[2])
        if written[-1] == name and not failed:
            failed.append(written.pop())
            raise TimeoutError("Connect timeout on endpoint URL")
        return pipe_file(self, path, *arguments, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(bucket.fs), "pipe_file", fail)
        yield written


def test_a_collection_into_a_bucket_resumes_and_is_read_like_a_folder(
    bucket: UPath, dataset_path: Path, dataset: FrameDataset
) -> None:
    out = bucket / dataset_path.name
    with failing_once(bucket, "frames-000003.tar") as written:
        with pytest.raises(UserError, match=r"^.*memory://bucket/.*timeout.*$"):
            collect_again(out)
        with pytest.raises(UserError, match=str(out)):
            FrameDataset.open(out)
        whole = {name for name in written if name.endswith(".tar")}
        written.clear()
        collect_again(out)
        assert not whole & set(written)
    assert objects(out) == contents(dataset_path)
    found = FrameDataset.open(str(out))
    assert found.card == dataset.card
    np.testing.assert_array_equal(found.steps.state, dataset.steps.state)
    np.testing.assert_array_equal(found.read_frames([359, 0, 64]), dataset.read_frames([359, 0, 64]))


def test_a_store_in_a_bucket_of_frames_in_a_bucket_is_read_through_the_mirror(
    bucket: UPath, dataset_path: Path, encoder: Encoder, store: TokenStore
) -> None:
    upload(dataset_path, bucket / "frames", last="dataset.json")
    path = bucket / "stores" / "tcn-64.zarr"
    extract(FrameDataset.open(bucket / "frames"), encoder, path)
    far = TokenStore.open(str(path), mirrored=True)
    assert isinstance(far._reader, MirroredReader)
    assert far.card.dataset["path"] == "memory://bucket/frames"
    windows, expected = (it.windows(frameskip=3, split="train") for it in (far, store))
    assert len(windows) == len(expected)
    for numbers in np.array_split(np.random.default_rng(0).permutation(len(windows)), 5):
        batch = expected.batch(numbers)
        for name, value in windows.batch(numbers).items():
            np.testing.assert_array_equal(value, batch[name])
    # Its card is enough to encode frames again.
    assert verify_deep(path, device="cpu").sound


def test_an_extraction_into_a_bucket_resumes(
    bucket: UPath, dataset: FrameDataset, encoder: Encoder, store_path: Path
) -> None:
    path = bucket / "tcn-64.zarr"
    with failing_once(bucket, "c.3.0.0") as written:
        with pytest.raises(UserError, match=r"^.*memory://bucket/tcn-64\.zarr.*timeout.*$"):
            extract(dataset, encoder, path)
        with pytest.raises(UserError, match=str(path)):
            TokenStore.open(path)
        whole = {name for name in written if name.startswith("c.")}
        assert whole
        found = verify(path)
        assert (found.complete, found.faults) == (False, [])
        written.clear()
        extract(dataset, encoder, path)
        assert not whole & set(written)
    assert objects(path) == contents(store_path)
    assert verify(path).sound


def test_a_shard_that_another_process_starts_again_at_the_end_is_extracted_again(
    bucket: UPath,
    dataset: FrameDataset,
    encoder: Encoder,
    store_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, finish, begun = bucket / "tcn-64.zarr", StoreWriter.try_finish, list[int]()

    def finish_with_another(self: StoreWriter) -> list[int]:
        if not begun:
            begun.append(4)
            remove(record_file(path, 4))
        return finish(self)

    monkeypatch.setattr(StoreWriter, "try_finish", finish_with_another)
    extract(dataset, encoder, path)
    assert begun
    assert objects(path) == contents(store_path)


def test_a_shard_that_another_process_has_done_is_not_written(
    far: UPath, store: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, writer = objects(far), StoreWriter.resume(far, store.identity)
    frames = store.card.shard_frames(2)
    with monkeypatch.context() as patch:
        for change in ("pipe_file", "rm_file", "rm"):
            patch.setattr(type(far.fs), change, None)
        writer.write_shard(2, store.gather(np.arange(frames.start, frames.stop)))
    assert objects(far) == before


DAMAGE: dict[str, Callable[[UPath], object]] = {
    "shard lost": lambda path: remove(shard_file(path, 2)),
    "record lost": lambda path: remove(record_file(path, 2)),
    "column lost": lambda path: remove(path / "state"),
    "array garbled": lambda path: put(path / "tokens" / "zarr.json", b"{"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_store_in_a_bucket_is_repaired(far: UPath, store_path: Path, damage: str) -> None:
    assert verify(far).sound
    DAMAGE[damage](far)
    found = verify(far)
    assert not found.sound
    assert {fault.shard for fault in found.faults} == ({2} if "shard" in damage or "record" in damage else {None})
    repair(far, device="cpu")
    assert objects(far) == contents(store_path)
    assert verify(far).sound


def run(*words: str) -> Result:
    return CliRunner().invoke(main, words, prog_name="wmcache")


def test_stores_are_listed(bucket: UPath, far: UPath, store_path: Path) -> None:
    upload(store_path, bucket / "more" / "deeper" / "b.zarr", last="zarr.json")
    put(bucket / "more" / "damaged.zarr" / "zarr.json", b"{")
    result = run("ls", "memory://bucket", "--json")
    assert result.exit_code == 0, result.output
    found = {entry["path"]: entry for entry in json.loads(result.stdout)}
    assert list(found) == [
        "memory://bucket/more/damaged.zarr",
        "memory://bucket/more/deeper/b.zarr",
        "memory://bucket/tcn-64.zarr",
    ]
    assert [entry["complete"] for entry in found.values()] == [False, True, True]
    (here,) = list_stores(store_path.parent)
    assert found["memory://bucket/tcn-64.zarr"] == {**here.__dict__, "path": "memory://bucket/tcn-64.zarr"}
    assert "memory://bucket/tcn-64.zarr" in run("ls", "memory://bucket").stdout


def test_only_the_named_store_is_deleted(bucket: UPath, far: UPath, store_path: Path) -> None:
    put(bucket / "frames" / "dataset.json", b"{}")
    upload(store_path, bucket / "tcn-64.zarr.old", last="zarr.json")
    neighbours = len(objects(bucket / "tcn-64.zarr.old"))
    result = run("rm", "--yes", str(far))
    assert result.exit_code == 0, result.output
    assert len(objects(bucket)) == neighbours + 1
    for name in (str(far), "memory://bucket/frames", "memory://bucket/frames/dataset.json"):
        result = run("rm", "--yes", name)
        assert result.exit_code == 1
        assert name in result.stderr
    assert len(objects(bucket)) == neighbours + 1


def test_two_processes_create_a_store_at_the_same_moment(
    bucket: UPath, store: TokenStore, dataset: FrameDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    both_found_none, real = threading.Barrier(2), writer_module.create_arrays

    def create_arrays(*arguments: Any) -> None:
        both_found_none.wait(60)
        real(*arguments)

    monkeypatch.setattr(writer_module, "create_arrays", create_arrays)
    with ThreadPoolExecutor(2) as pool:
        settings = (bucket / "some.zarr", store.card, store.identity, dataset.steps.store_columns())
        first, second = (future.result() for future in [pool.submit(StoreWriter.create, *settings) for _ in range(2)])
    assert first.pending() == second.pending() == list(range(store.card.num_shards))


def test_a_store_is_not_created_among_other_objects(bucket: UPath, encoder: Encoder, dataset: FrameDataset) -> None:
    put(bucket / "mine" / "thesis.txt", b"all of it")
    with pytest.raises(UserError, match=r"thesis\.txt.* --out"):
        extract(dataset, encoder, bucket / "mine")
    with pytest.raises(UserError, match="memory://bucket"):
        extract(dataset, encoder, bucket)
    assert objects(bucket / "mine") == {"thesis.txt": b"all of it"}
