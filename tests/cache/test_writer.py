"""Writers at the same time and after each other: each shard is written once, and nothing that is done is done again."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from wmcache.cache import StoreWriter
from wmcache.cache.layout import DamagedError, shard_file
from wmcache.cache.records import lock_file
from wmcache.cache.writer import channel_sums
from wmcache.common.errors import UserError
from wmcache.common.locks import exclusive

from ..conftest import IDENTITY, TOKENS, contents, make_writer, times, write


class TestClaims:
    def test_a_shard_is_claimed_by_one_writer_at_a_time(self, tmp_path: Path) -> None:
        first, second = (make_writer(tmp_path / "some.zarr") for _ in range(2))
        with first.claim(1) as one, second.claim(1) as same, second.claim(2) as another:
            assert (one, same, another) == (True, False, True)
            with first.claim(2) as claimed:
                assert not claimed
            assert lock_file(tmp_path / "some.zarr", 1).exists()  # the refused claim left it alone
            for writer in (first, second):
                assert writer.claimed() == {1, 2}
        assert first.claimed() == set()
        with second.claim(1) as claimed:
            assert claimed

    def test_waiting_writers_get_a_shard_one_after_another(self, tmp_path: Path) -> None:
        first, *writers = [make_writer(tmp_path / "some.zarr") for _ in range(7)]
        inside, counts = [], []

        def work(writer: StoreWriter) -> None:
            for _ in range(40):
                with writer.claim(0, wait=True) as claimed:
                    assert claimed
                    inside.append(writer)
                    counts.append(len(inside))
                    inside.remove(writer)

        with ThreadPoolExecutor(6) as pool:
            with contextlib.suppress(KeyboardInterrupt), first.claim(0):  # a claim ends with an exception
                waiting = [pool.submit(work, writer) for writer in writers]
                time.sleep(0.2)
                assert counts == []
                raise KeyboardInterrupt
            for future in waiting:
                future.result(timeout=60)
        assert counts == [1] * 240
        assert list((tmp_path / "some.zarr" / "tokens" / "commits").iterdir()) == []

    def test_a_claim_taken_at_the_moment_of_release_is_kept(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        writer, release = make_writer(tmp_path / "some.zarr"), FileLock.release
        waiting = FileLock(lock_file(writer.path, 1))

        def hand_over(held: FileLock, force: bool = False) -> None:
            release(held, force)
            monkeypatch.undo()
            waiting.acquire(timeout=0)

        monkeypatch.setattr(FileLock, "release", hand_over)
        with writer.claim(1):
            pass
        # If the file were gone, a third writer could create another one and lock that.
        with writer.claim(1) as claimed:
            assert not claimed
        waiting.release()


class TestPending:
    def test_a_shard_is_not_done_after_its_second_write_failed(
        self, finished: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = contents(finished)
        writer = StoreWriter.resume(finished, IDENTITY)

        def full(path: Path) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("wmcache.common.files.sync", full)  # called after the rename
            with pytest.raises(UserError, match=r"made-up\.zarr: No space left on device"):
                writer.write_shard(1, TOKENS[:16])
        assert shard_file(finished, 1).stat().st_size == writer.card.shard_bytes(1)
        assert writer.pending() == [1]
        write(writer)
        assert contents(finished) == before

    @pytest.mark.parametrize("frames", [1, 16, 17, 40])
    def test_sums_are_those_of_numpy(self, frames: int) -> None:
        tokens = np.random.default_rng(frames).normal(3, 2, (frames, 5, 3)).astype(np.float16)
        wide = tokens.astype(np.float64)
        total, squares = channel_sums(tokens)
        np.testing.assert_allclose(total, wide.sum((0, 1)), rtol=1e-12)
        np.testing.assert_allclose(squares, (wide**2).sum((0, 1)), rtol=1e-12)


def test_reopening_waits_for_a_claimed_shard(finished: Path) -> None:
    first, second = (StoreWriter.resume(finished, IDENTITY) for _ in range(2))
    with ThreadPoolExecutor(1) as pool:
        with first.claim(1):
            done = pool.submit(second.reopen, [1])
            with pytest.raises(TimeoutError):
                done.result(timeout=0.2)
            assert first.is_done(1)
        done.result(timeout=10)
    assert not first.is_done(1)


def test_a_store_that_appears_while_another_process_starts_it_is_resumed(tmp_path: Path, finished: Path) -> None:
    path = tmp_path / "late.zarr"
    with ThreadPoolExecutor(1) as pool:
        with exclusive(path.with_name(f".{path.name}.lock")):
            late = pool.submit(make_writer, path)
            time.sleep(0.2)
            shutil.copytree(finished, path)
            when = times(path)
        assert late.result(timeout=10).pending() == []
    assert contents(path) == contents(finished)
    assert times(path) == when


def test_damaged_metadata_is_not_written_again_for_another_identity(finished: Path) -> None:
    (finished / "zarr.json").write_text("")
    damaged = contents(finished), times(finished)
    with pytest.raises(DamagedError, match=r"made-up\.zarr.* wmcache extract"):
        StoreWriter.resume(finished, IDENTITY)
    with pytest.raises(UserError, match=r"image_size|--out"):
        make_writer(finished, dataclasses.replace(IDENTITY, image_size=96))
    assert (contents(finished), times(finished)) == damaged
