"""Writers at the same time and after each other: each shard is written once, and nothing that is done is done again."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from numpy.typing import NDArray

from wmcache.cache import Identity, StoreWriter, TokenStore
from wmcache.cache.layout import DamagedError, read_attributes, shard_file
from wmcache.cache.records import lock_file, record_file
from wmcache.cache.writer import LackingError, channel_sums
from wmcache.common.errors import UserError
from wmcache.common.locks import exclusive

Tokens = NDArray[np.float16]
MakeWriter = Callable[..., StoreWriter]
Write = Callable[..., None]
Contents = Callable[[Path], dict[str, bytes]]
STEPS = ("action", "state", "episode", "step")


def times(path: Path) -> dict[Path, tuple[int, int]]:
    return {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in path.rglob("*")}


def work_times(path: Path) -> dict[Path, tuple[int, int]]:
    """Of the shards and their records."""
    found = times(path / "tokens")
    return {file: when for file, when in found.items() if file.name.startswith("c.") or file.parent.name == "commits"}


class TestClaims:
    def test_a_shard_is_claimed_by_one_writer_at_a_time(self, tmp_path: Path, make_writer: MakeWriter) -> None:
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

    def test_waiting_writers_get_a_shard_one_after_another(self, tmp_path: Path, make_writer: MakeWriter) -> None:
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
        self, tmp_path: Path, make_writer: MakeWriter, monkeypatch: pytest.MonkeyPatch
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

    def test_the_claim_of_a_killed_process_ends(self, tmp_path: Path, make_writer: MakeWriter) -> None:
        writer = make_writer(tmp_path / "some.zarr")
        script = (
            "import sys, time; from pathlib import Path; from wmcache.common.locks import exclusive\n"
            "with exclusive(Path(sys.argv[1])) as held: print(held, flush=True); time.sleep(60)"
        )
        words = [sys.executable, "-c", script, str(lock_file(writer.path, 1))]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "True\n"
            with writer.claim(1) as claimed:
                assert not claimed
        finally:
            process.kill()
            process.communicate()
        assert lock_file(writer.path, 1).exists()
        with writer.claim(1) as claimed:
            assert claimed

    def test_a_store_that_cannot_be_written_is_named(self, tmp_path: Path, make_writer: MakeWriter) -> None:
        writer = make_writer(tmp_path / "some.zarr")
        commits = writer.path / "tokens" / "commits"
        commits.rmdir()
        commits.write_text("in the way")  # root ignores permissions
        with pytest.raises(UserError, match=r"some\.zarr: ") as caught, writer.claim(0):
            pass
        assert "\n" not in str(caught.value)


class TestPending:
    @pytest.mark.parametrize(
        "damage",
        [
            lambda path: record_file(path, 2).unlink(),
            lambda path: record_file(path, 2).write_text("{"),
            lambda path: shutil.copy(record_file(path, 1), record_file(path, 2)),
            lambda path: shard_file(path, 2).unlink(),
            lambda path: shard_file(path, 2).write_bytes(shard_file(path, 2).read_bytes()[:-1]),
            lambda path: shard_file(path, 2).write_bytes(b""),
        ],
        ids=["no record", "damaged record", "another's record", "no file", "cut file", "empty file"],
    )
    def test_a_shard_is_done_with_its_record_and_its_file(
        self,
        finished: Path,
        identity: Identity,
        damage: Callable[[Path], object],
        write: Write,
        contents: Contents,
    ) -> None:
        before = contents(finished)
        writer = StoreWriter.resume(finished, identity)
        assert writer.pending() == []
        damage(finished)
        assert writer.pending() == writer.try_finish() == [2]
        assert [writer.is_done(shard) for shard in range(4)] == [True, True, False, True]
        with pytest.raises(LackingError, match=r"1 of 4 .*\(2\)"):
            writer.finish()
        write(writer)
        assert contents(finished) == before

    def test_records_of_another_identity_do_not_count(
        self, tmp_path: Path, finished: Path, identity: Identity, make_writer: MakeWriter
    ) -> None:
        other = make_writer(tmp_path / "other.zarr", dataclasses.replace(identity, weights_sha256="00" * 32))
        for shard in range(4):
            shutil.copy(shard_file(finished, shard), tmp_path / "other.zarr" / "tokens")
        shutil.copytree(finished / "tokens" / "commits", other.path / "tokens" / "commits", dirs_exist_ok=True)
        assert other.pending() == [0, 1, 2, 3]

    def test_a_shard_is_not_done_after_its_second_write_failed(
        self,
        finished: Path,
        identity: Identity,
        tokens: Tokens,
        write: Write,
        contents: Contents,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        before = contents(finished)
        writer = StoreWriter.resume(finished, identity)

        def full(path: Path) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("wmcache.common.files.sync", full)  # called after the rename
            with pytest.raises(UserError, match=r"made-up\.zarr: No space left on device"):
                writer.write_shard(1, tokens[:16])
        assert shard_file(finished, 1).stat().st_size == writer.card.shard_bytes(1)
        assert writer.pending() == [1]
        write(writer)
        assert contents(finished) == before

    def test_a_lost_record_can_be_written_from_the_tokens(
        self, finished: Path, identity: Identity, tokens: Tokens, contents: Contents
    ) -> None:
        before = contents(finished)
        writer = StoreWriter.resume(finished, identity)
        for shard in (1, 3):
            record_file(finished, shard).unlink()
            rows = writer.card.shard_frames(shard)
            writer.record(shard, tokens[rows.start : rows.stop])
        assert contents(finished) == before

    @pytest.mark.parametrize("frames", [1, 16, 17, 40])
    def test_sums_are_those_of_numpy(self, frames: int) -> None:
        tokens = np.random.default_rng(frames).normal(3, 2, (frames, 5, 3)).astype(np.float16)
        wide = tokens.astype(np.float64)
        total, squares = channel_sums(tokens)
        np.testing.assert_allclose(total, wide.sum((0, 1)), rtol=1e-12)
        np.testing.assert_allclose(squares, (wide**2).sum((0, 1)), rtol=1e-12)


class TestFinish:
    def test_resuming_and_finishing_a_complete_store_changes_nothing(
        self, finished: Path, identity: Identity, make_writer: MakeWriter, contents: Contents
    ) -> None:
        before, when = contents(finished), times(finished)
        make_writer(finished)
        StoreWriter.resume(finished, identity).finish()
        assert contents(finished) == before
        assert times(finished) == when

    def test_a_reopened_store_is_incomplete_and_lacks_just_those_shards(
        self, finished: Path, identity: Identity, write: Write, contents: Contents
    ) -> None:
        before, when = contents(finished), shard_file(finished, 0).stat()
        writer = StoreWriter.resume(finished, identity)
        writer.reopen([1, 3])
        assert writer.pending() == [1, 3]
        assert not shard_file(finished, 1).exists()
        with pytest.raises(UserError, match=r"made-up\.zarr"):
            TokenStore.open(finished)
        write(writer)
        assert contents(finished) == before
        now = shard_file(finished, 0).stat()
        assert (now.st_mtime_ns, now.st_ino) == (when.st_mtime_ns, when.st_ino)

    def test_reopening_an_incomplete_store_changes_nothing(
        self, tmp_path: Path, make_writer: MakeWriter, write: Write, contents: Contents
    ) -> None:
        path = tmp_path / "some.zarr"
        writer = make_writer(path)
        write(writer, [0])
        before, when = contents(path), times(path)
        writer.reopen([])
        assert contents(path) == before
        assert times(path) == when

    def test_reopening_waits_for_a_claimed_shard(self, finished: Path, identity: Identity) -> None:
        first, second = (StoreWriter.resume(finished, identity) for _ in range(2))
        with ThreadPoolExecutor(1) as pool:
            with first.claim(1):
                done = pool.submit(second.reopen, [1])
                with pytest.raises(TimeoutError):
                    done.result(timeout=0.2)
                assert first.is_done(1)
            done.result(timeout=10)
        assert not first.is_done(1)


class TestResume:
    def test_another_identity_is_refused_with_the_field_and_both_values(
        self, finished: Path, identity: Identity, contents: Contents
    ) -> None:
        before, when = contents(finished), times(finished)
        with pytest.raises(UserError, match=r"made-up\.zarr .*image_size: 64 .* 96") as caught:
            StoreWriter.resume(finished, dataclasses.replace(identity, image_size=96))
        assert not isinstance(caught.value, DamagedError)
        assert contents(finished) == before
        assert times(finished) == when

    def test_a_missing_store_and_another_folder_are_refused(self, tmp_path: Path, identity: Identity) -> None:
        (tmp_path / "other.zarr").mkdir()
        for name in ("none.zarr", "other.zarr"):
            with pytest.raises(UserError, match=name):
                StoreWriter.resume(tmp_path / name, identity)

    def test_a_store_that_appears_while_another_process_starts_it_is_resumed(
        self, tmp_path: Path, make_writer: MakeWriter, finished: Path, contents: Contents
    ) -> None:
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

    def test_writers_that_start_a_store_at_once_start_one(
        self, tmp_path: Path, make_writer: MakeWriter, finished: Path, write: Write, contents: Contents
    ) -> None:
        path = tmp_path / "many.zarr"
        together = threading.Barrier(6)

        def start(_: int) -> StoreWriter:
            together.wait(10)
            return make_writer(path)

        with ThreadPoolExecutor(6) as pool:
            writers = list(pool.map(start, range(6), timeout=60))
        assert sorted(file.name for file in tmp_path.iterdir()) == ["made-up.zarr", "many.zarr"]
        write(writers[0], [0])
        assert [writer.pending() for writer in writers] == [[1, 2, 3]] * 6
        write(writers[5])
        assert contents(path) == contents(finished)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "attributes emptied": lambda path: (path / "zarr.json").write_text(""),
    "array lost": lambda path: (path / "tokens/zarr.json").unlink(),
    "all columns lost": lambda path: [shutil.rmtree(path / name) for name in STEPS],
}


class TestRepair:
    @pytest.mark.parametrize("damage", DAMAGE)
    def test_damaged_metadata_is_written_again_only_for_the_same_identity(
        self, finished: Path, identity: Identity, make_writer: MakeWriter, write: Write, contents: Contents, damage: str
    ) -> None:
        before, when = contents(finished), work_times(finished)
        DAMAGE[damage](finished)
        with pytest.raises(DamagedError, match=r"made-up\.zarr.* wmcache extract"):
            StoreWriter.resume(finished, identity)
        damaged = contents(finished), times(finished)
        with pytest.raises(UserError, match=r"image_size|--out"):
            make_writer(finished, dataclasses.replace(identity, image_size=96))
        assert (contents(finished), times(finished)) == damaged
        writer = make_writer(finished)
        assert writer.pending() == []
        assert read_attributes(finished)["complete"] is False
        write(writer)
        assert contents(finished) == before
        assert work_times(finished) == when
        assert [path.name for path in finished.parent.iterdir()] == ["made-up.zarr"]

    def test_one_sound_record_identifies_a_damaged_store(
        self, finished: Path, make_writer: MakeWriter, write: Write, contents: Contents
    ) -> None:
        complete = contents(finished)
        for file in (finished / "zarr.json", *(record_file(finished, shard) for shard in (0, 1, 2))):
            file.write_text("{")
        write(make_writer(finished))
        assert contents(finished) == complete
