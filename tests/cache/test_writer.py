"""Writers beside each other and after each other: each shard is done once, and nothing that is done is done again."""

from __future__ import annotations

import dataclasses
import errno
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from numpy.typing import NDArray

from wmcache.cache import Identity, StoreWriter, TokenStore
from wmcache.cache.layout import DamagedError, read_attributes, shard_file
from wmcache.cache.records import Records, lock_file, record_file
from wmcache.cache.writer import channel_sums
from wmcache.common.errors import UserError
from wmcache.common.files import exclusive, read_json, write_json

Tokens = NDArray[np.float16]
MakeWriter = Callable[..., StoreWriter]
Finish = Callable[[StoreWriter], None]
STEPS = ("action", "state", "episode", "step")


def everything(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def times(path: Path) -> dict[Path, tuple[int, int]]:
    return {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in path.rglob("*")}


def work_times(path: Path) -> dict[Path, tuple[int, int]]:
    """Of the shards and their records."""
    found = times(path / "tokens")
    return {file: when for file, when in found.items() if file.name.startswith("c.") or file.parent.name == "commits"}


@pytest.fixture
def do_the_rest(tokens: Tokens) -> Finish:
    """(writer): what an extraction does."""

    def finish(writer: StoreWriter) -> None:
        for shard in writer.pending():
            rows = writer.card.shard_frames(shard)
            with writer.claim(shard) as ours:
                assert ours
                writer.write_shard(shard, tokens[rows.start : rows.stop])
        writer.finish()

    return finish


class TestClaims:
    def test_a_shard_is_held_by_one_writer_and_the_others_pass_on(
        self, tmp_path: Path, make_writer: MakeWriter
    ) -> None:
        first, second = (make_writer(tmp_path / "some.zarr") for _ in range(2))
        with first.claim(1) as ours, second.claim(1) as theirs, second.claim(2) as another:
            assert (ours, theirs, another) == (True, False, True)
            with first.claim(2) as now:
                assert not now
            assert [writer.is_claimed(shard) for writer in (first, second) for shard in (0, 1, 2)] == [
                False,
                True,
                True,
            ] * 2
        assert not any(first.is_claimed(shard) for shard in range(4))
        with second.claim(1) as theirs:
            assert theirs

    def test_a_claim_that_was_refused_leaves_the_other_alone(self, tmp_path: Path, make_writer: MakeWriter) -> None:
        first, second, third = (make_writer(tmp_path / "some.zarr") for _ in range(3))
        with first.claim(1) as ours:
            assert ours
            with second.claim(1) as theirs:
                assert not theirs
            assert lock_file(tmp_path / "some.zarr", 1).exists()
            with third.claim(1) as theirs:
                assert not theirs

    def test_a_claim_ends_with_the_work_however_it_ends(self, tmp_path: Path, make_writer: MakeWriter) -> None:
        first, second = (make_writer(tmp_path / "some.zarr") for _ in range(2))
        with pytest.raises(KeyboardInterrupt), first.claim(1):
            raise KeyboardInterrupt
        with second.claim(1) as ours:
            assert ours
        assert list((tmp_path / "some.zarr" / "tokens" / "commits").iterdir()) == []

    def test_who_waits_gets_the_shard_when_it_is_let_go(self, tmp_path: Path, make_writer: MakeWriter) -> None:
        first, second = (make_writer(tmp_path / "some.zarr") for _ in range(2))
        got, trying = threading.Event(), threading.Event()

        def wait() -> bool:
            trying.set()
            with second.claim(1, wait=True) as ours:
                got.set()
                return ours

        with ThreadPoolExecutor(1) as pool:
            with first.claim(1):
                answer = pool.submit(wait)
                assert trying.wait(10)
                assert not got.wait(0.2)
            assert answer.result(timeout=10)
        assert got.is_set()

    def test_many_who_wait_get_it_one_after_another(self, tmp_path: Path, make_writer: MakeWriter) -> None:
        writers = [make_writer(tmp_path / "some.zarr") for _ in range(6)]
        inside, most = [], []

        def work(writer: StoreWriter) -> None:
            for _ in range(40):
                with writer.claim(0, wait=True) as ours:
                    assert ours
                    inside.append(writer)
                    most.append(len(inside))
                    inside.remove(writer)

        with ThreadPoolExecutor(6) as pool:
            for _ in pool.map(work, writers, timeout=60):
                pass
        assert most == [1] * 240
        assert list((tmp_path / "some.zarr" / "tokens" / "commits").iterdir()) == []

    def test_who_gets_a_claim_the_moment_it_ends_keeps_it(
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
        # Were the file gone, a third would make another one and hold that.
        with writer.claim(1) as ours:
            assert not ours
        waiting.release()

    def test_the_claim_of_a_killed_process_ends(
        self, tmp_path: Path, make_writer: MakeWriter, identity: Identity
    ) -> None:
        writer = make_writer(tmp_path / "some.zarr")
        script = (
            "import sys, time; from pathlib import Path; from wmcache.common.files import exclusive\n"
            "with exclusive(Path(sys.argv[1])) as ours: print(ours, flush=True); time.sleep(60)"
        )
        words = [sys.executable, "-c", script, str(lock_file(writer.path, 1))]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "True\n"
            with writer.claim(1) as ours:
                assert not ours
        finally:
            process.kill()
            process.communicate()
        assert lock_file(writer.path, 1).exists()
        with writer.claim(1) as ours:
            assert ours

    def test_a_store_that_cannot_be_written_is_one_line_of_error(self, tmp_path: Path, make_writer: MakeWriter) -> None:
        writer = make_writer(tmp_path / "some.zarr")
        commits = writer.path / "tokens" / "commits"
        commits.rmdir()
        commits.write_text("in the way")  # (root writes where others may not)
        with pytest.raises(UserError, match=r"cannot write .*some\.zarr: ") as caught, writer.claim(0):
            pass
        assert "\n" not in str(caught.value)


class TestWhatIsDone:
    def test_a_shard_with_its_record_and_its_file_is_done(self, finished: Path, identity: Identity) -> None:
        writer = StoreWriter.resume(finished, identity)
        assert writer.pending() == []
        assert all(writer.is_done(shard) for shard in range(4))

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
        ids=["no record", "garbled record", "another's record", "no file", "cut file", "empty file"],
    )
    def test_a_shard_that_lacks_one_of_them_is_not(
        self,
        finished: Path,
        identity: Identity,
        damage: Callable[[Path], object],
        do_the_rest: Finish,
        tokens: Tokens,
    ) -> None:
        before = everything(finished)
        damage(finished)
        writer = StoreWriter.resume(finished, identity)
        assert writer.pending() == [2]
        with pytest.raises(UserError, match=r"lacks 1 of 4 shards \(2\); run the same wmcache extract again"):
            writer.finish()
        do_the_rest(writer)
        assert everything(finished) == before

    def test_a_record_of_another_identity_is_none(
        self, tmp_path: Path, finished: Path, identity: Identity, make_writer: MakeWriter
    ) -> None:
        other = make_writer(tmp_path / "other.zarr", dataclasses.replace(identity, weights_sha256="00" * 32))
        for shard in range(4):
            shutil.copy(shard_file(finished, shard), shard_file(other.path, shard))
        shutil.copytree(finished / "tokens" / "commits", other.path / "tokens" / "commits", dirs_exist_ok=True)
        assert other.pending() == [0, 1, 2, 3]

    def test_a_shard_written_again_has_no_record_until_it_is_whole(
        self, finished: Path, identity: Identity, tokens: Tokens
    ) -> None:
        writer = StoreWriter.resume(finished, identity)
        bad = tokens[:16].copy()
        bad[3] = np.inf
        before = everything(finished)
        with pytest.raises(UserError, match="frame 3;"):
            writer.write_shard(0, bad)
        assert everything(finished) == before  # refused before anything was touched
        writer.write_shard(0, tokens[16:32])
        record = Records(finished, writer.card, identity).read(0)
        assert record.sum == channel_sums(tokens[16:32])[0].tolist()
        np.testing.assert_array_equal(TokenStore.open(finished).gather(np.arange(16)), tokens[16:32])

    def test_a_shard_that_could_not_be_written_again_is_not_done(
        self, finished: Path, identity: Identity, tokens: Tokens, monkeypatch: pytest.MonkeyPatch, do_the_rest: Finish
    ) -> None:
        before = everything(finished)
        writer = StoreWriter.resume(finished, identity)

        def full(path: Path) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("wmcache.common.files.sync", full)
            with pytest.raises(UserError, match=r"cannot write .*made-up\.zarr: No space left on device; free space"):
                writer.write_shard(1, tokens[:16])
        # Other tokens stand in its file by now, of the size that its old record names.
        assert writer.pending() == [1]
        do_the_rest(writer)
        assert everything(finished) == before

    def test_a_lost_record_can_be_written_from_the_tokens(
        self, finished: Path, identity: Identity, tokens: Tokens
    ) -> None:
        before = everything(finished)
        writer = StoreWriter.resume(finished, identity)
        for shard in (1, 3):
            record_file(finished, shard).unlink()
            rows = writer.card.shard_frames(shard)
            writer.record(shard, tokens[rows.start : rows.stop])
        assert everything(finished) == before

    def test_sums_are_those_of_numpy_however_many_frames(self) -> None:
        for frames in (1, 16, 17, 40):
            tokens = np.random.default_rng(frames).normal(3, 2, (frames, 5, 3)).astype(np.float16)
            wide = tokens.astype(np.float64)
            total, squares = channel_sums(tokens)
            np.testing.assert_allclose(total, wide.sum((0, 1)), rtol=1e-12)
            np.testing.assert_allclose(squares, (wide**2).sum((0, 1)), rtol=1e-12)

    def test_what_dead_writers_left_is_swept(self, finished: Path, identity: Identity, tokens: Tokens) -> None:
        dead = subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        commits = finished / "tokens" / "commits"
        ours = commits / f".000001.json.{platform.node()}.{dead.pid}.tmp"
        alive = commits / f".000002.json.{platform.node()}.{os.getpid()}.tmp"
        elsewhere = commits / f".000001.json.another-machine.{dead.pid}.tmp"
        for file in (ours, alive, elsewhere):
            file.write_text("torn")
        StoreWriter.resume(finished, identity).write_shard(1, tokens[16:32])
        assert (ours.exists(), alive.exists(), elsewhere.exists()) == (False, True, True)


class TestFinishing:
    def test_a_complete_store_is_left_alone_to_the_last_byte(self, finished: Path, identity: Identity) -> None:
        before, when = everything(finished), times(finished)
        StoreWriter.resume(finished, identity).finish()
        assert everything(finished) == before
        assert times(finished) == when

    def test_the_order_of_the_shards_changes_no_byte(
        self, tmp_path: Path, finished: Path, make_writer: MakeWriter, tokens: Tokens
    ) -> None:
        writer = make_writer(tmp_path / "other.zarr")
        for shard in (3, 1, 0, 2):
            rows = writer.card.shard_frames(shard)
            writer.write_shard(shard, tokens[rows.start : rows.stop])
        writer.finish()
        assert everything(writer.path) == everything(finished)

    def test_a_reopened_store_is_incomplete_and_lacks_just_those_shards(
        self, finished: Path, identity: Identity, do_the_rest: Finish
    ) -> None:
        before, when = everything(finished), shard_file(finished, 0).stat()
        writer = StoreWriter.resume(finished, identity)
        writer.reopen([1, 3])
        assert writer.pending() == [1, 3]
        assert not shard_file(finished, 1).exists()
        with pytest.raises(UserError, match="is incomplete"):
            TokenStore.open(finished)
        do_the_rest(writer)
        assert everything(finished) == before
        now = shard_file(finished, 0).stat()
        assert (now.st_mtime_ns, now.st_ino) == (when.st_mtime_ns, when.st_ino)

    def test_whoever_reads_a_store_is_told_when_it_is_reopened(
        self, finished: Path, identity: Identity, do_the_rest: Finish
    ) -> None:
        store, other = TokenStore.open(finished), TokenStore.open(finished)
        writer = StoreWriter.resume(finished, identity)
        store.gather(np.arange(50))
        writer.reopen([])
        said = r"made-up\.zarr was replaced or changed while it was being read; start again"
        for reader in (store, other):
            with pytest.raises(UserError, match=said):
                reader.gather(np.arange(3))
        do_the_rest(writer)
        with pytest.raises(UserError, match=said):
            store.gather(np.arange(3))
        TokenStore.open(finished).gather(np.arange(3))

    def test_a_store_that_is_open_already_is_not_written_by_reopening(
        self, tmp_path: Path, make_writer: MakeWriter, tokens: Tokens
    ) -> None:
        writer = make_writer(tmp_path / "some.zarr")
        writer.write_shard(0, tokens[:16])
        before, when = everything(writer.path), times(writer.path)
        writer.reopen([])
        assert everything(writer.path) == before
        assert times(writer.path) == when

    def test_reopening_waits_for_whoever_is_at_the_shard(self, finished: Path, identity: Identity) -> None:
        first, second = (StoreWriter.resume(finished, identity) for _ in range(2))
        with ThreadPoolExecutor(1) as pool:
            with first.claim(1):
                done = pool.submit(second.reopen, [1])
                with pytest.raises(TimeoutError):
                    done.result(timeout=0.2)
                assert first.is_done(1)
            done.result(timeout=10)
        assert not first.is_done(1)


def another(value: Any) -> Any:
    if isinstance(value, str):
        return f"{value} of another"
    return value + 1 if isinstance(value, int) else ((0.0,) * 3, (1.0,) * 3)


class TestTakingUp:
    @pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Identity)])
    def test_another_identity_is_refused_naming_the_field(self, finished: Path, identity: Identity, field: str) -> None:
        other = dataclasses.replace(identity, **{field: another(getattr(identity, field))})
        before, when = everything(finished), times(finished)
        with pytest.raises(UserError, match=rf"made-up\.zarr was extracted with other settings \({field}: ") as caught:
            StoreWriter.resume(finished, other)
        # Both values, so that one sees which is whose.
        for value in (getattr(identity, field), getattr(other, field)):
            assert str(value) in str(caught.value)
        assert not isinstance(caught.value, DamagedError)
        assert everything(finished) == before
        assert times(finished) == when

    def test_every_field_that_differs_is_named(self, finished: Path, identity: Identity) -> None:
        other = dataclasses.replace(identity, image_size=32, encoder="tcn")
        with pytest.raises(UserError, match=r"\(encoder: made-up != tcn; image_size: 64 != 32\)"):
            StoreWriter.resume(finished, other)

    def test_nothing_and_something_else_are_refused(self, tmp_path: Path, identity: Identity) -> None:
        with pytest.raises(UserError, match=r"none\.zarr does not exist"):
            StoreWriter.resume(tmp_path / "none.zarr", identity)
        (tmp_path / "other.zarr").mkdir()
        with pytest.raises(UserError, match=r"other\.zarr/zarr\.json does not exist"):
            StoreWriter.resume(tmp_path / "other.zarr", identity)

    def test_taking_up_a_store_changes_nothing(
        self, finished: Path, make_writer: MakeWriter, identity: Identity
    ) -> None:
        before, when = everything(finished), times(finished)
        make_writer(finished)
        StoreWriter.resume(finished, identity)
        assert everything(finished) == before
        assert times(finished) == when

    def test_who_waits_to_start_a_store_takes_up_the_one_that_is_there_by_then(
        self, tmp_path: Path, make_writer: MakeWriter, finished: Path
    ) -> None:
        path = tmp_path / "late.zarr"
        with ThreadPoolExecutor(1) as pool:
            with exclusive(path.with_name(f".{path.name}.lock")):
                late = pool.submit(make_writer, path)
                time.sleep(0.2)
                shutil.copytree(finished, path)
                when = times(path)
            assert late.result(timeout=10).pending() == []
        assert everything(path) == everything(finished)
        assert times(path) == when

    def test_many_who_start_the_same_store_start_one(
        self, tmp_path: Path, make_writer: MakeWriter, finished: Path, do_the_rest: Finish
    ) -> None:
        path = tmp_path / "many.zarr"
        together = threading.Barrier(6)

        def start(_: int) -> StoreWriter:
            together.wait(10)
            return make_writer(path)

        with ThreadPoolExecutor(6) as pool:
            writers = list(pool.map(start, range(6), timeout=60))
        assert sorted(file.name for file in tmp_path.iterdir()) == ["made-up.zarr", "many.zarr"]
        writers[0].write_shard(0, TokenStore.open(finished).gather(np.arange(16)))
        assert [writer.pending() for writer in writers] == [[1, 2, 3]] * 6
        do_the_rest(writers[5])
        assert everything(path) == everything(finished)


def _write(text: str, name: str) -> Callable[[Path], object]:
    return lambda path: (path / name).write_text(text)


def _edit(name: str, **change: Any) -> Callable[[Path], object]:
    return lambda path: write_json(path / name, {**read_json(path / name, ""), **change})


def _flip_attribute(path: Path) -> None:
    values = read_json(path / "zarr.json", "")
    values["attributes"]["mean"][0] += 1e-3
    write_json(path / "zarr.json", values)


def _flip_in(name: str) -> Callable[[Path], object]:
    def flip(path: Path) -> None:
        file = path / name
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)

    return flip


DESCRIPTIONS: dict[str, Callable[[Path], object]] = {
    "emptied": _write("", "zarr.json"),
    "torn": _write('{"attributes": {"format": "wmcache', "zarr.json"),
    "no object": _write("[]", "zarr.json"),
    "without attributes": _edit("zarr.json", attributes={}),
    "another's attributes": _edit("zarr.json", attributes={"format": "other"}),
    "a changed digit": _flip_attribute,
    "an array": _edit("zarr.json", node_type="array"),
    "lost": lambda path: (path / "zarr.json").unlink(),
    "array emptied": _write("", "tokens/zarr.json"),
    "array lost": lambda path: (path / "tokens/zarr.json").unlink(),
    "array of another shape": _edit("tokens/zarr.json", shape=[50, 6, 5]),
    "array of another fill value": _edit("tokens/zarr.json", fill_value=0.0),
    "column lost": lambda path: shutil.rmtree(path / "state"),
    "column emptied": _write("", "state/zarr.json"),
    "column without values": lambda path: (path / "state/c/0/0").unlink(),
    "column changed": _flip_in("state/c/0/0"),
    "all columns lost": lambda path: [shutil.rmtree(path / name) for name in STEPS],
}


class TestMending:
    @pytest.mark.parametrize("damage", DESCRIPTIONS)
    def test_a_damaged_description_is_written_anew_and_no_token_twice(
        self, finished: Path, identity: Identity, make_writer: MakeWriter, do_the_rest: Finish, damage: str
    ) -> None:
        before = everything(finished)
        when = work_times(finished)
        DESCRIPTIONS[damage](finished)
        with pytest.raises(DamagedError) as caught:
            StoreWriter.resume(finished, identity)
        assert str(caught.value).endswith("extract again") or "extract it again" in str(caught.value)
        assert "\n" not in str(caught.value)
        writer = make_writer(finished)
        assert writer.pending() == []
        with pytest.raises(UserError, match="is incomplete"):
            TokenStore.open(finished)
        do_the_rest(writer)
        assert everything(finished) == before
        assert work_times(finished) == when
        assert [path.name for path in finished.parent.iterdir()] == ["made-up.zarr"]

    @pytest.mark.parametrize("damage", DESCRIPTIONS)
    def test_the_damaged_store_of_another_identity_is_left_alone(
        self, finished: Path, identity: Identity, make_writer: MakeWriter, damage: str
    ) -> None:
        DESCRIPTIONS[damage](finished)
        before, when = everything(finished), times(finished)
        with pytest.raises(UserError, match=r"other settings \(image_size|no record in it is of these settings"):
            make_writer(finished, dataclasses.replace(identity, image_size=96))
        assert everything(finished) == before
        assert times(finished) == when

    def test_one_sound_record_says_whose_a_damaged_store_is(
        self, finished: Path, make_writer: MakeWriter, do_the_rest: Finish
    ) -> None:
        before = everything(finished)
        DESCRIPTIONS["emptied"](finished)
        for shard in (0, 1, 2):
            record_file(finished, shard).write_text("{")
        do_the_rest(make_writer(finished))
        assert everything(finished) == before

    def test_a_store_that_cannot_say_whose_it_is_is_left_alone(self, finished: Path, make_writer: MakeWriter) -> None:
        DESCRIPTIONS["emptied"](finished)
        for shard in range(4):
            record_file(finished, shard).unlink()
        before = everything(finished)
        with pytest.raises(UserError, match=r"made-up\.zarr is damaged, .*--out"):
            make_writer(finished)
        assert everything(finished) == before

    @pytest.mark.parametrize("damage", ["lost", "changed"])
    def test_the_damaged_scale_of_a_store_of_bytes_is_written_anew(
        self, tmp_path: Path, finished: Path, identity: Identity, do_the_rest: Finish, damage: str
    ) -> None:
        # What opening such a store advises is to run its extraction again: create, do the rest, finish.
        like = TokenStore.open(finished)
        card, known = dataclasses.replace(like.card, dtype="int8"), dataclasses.replace(identity, store_dtype="int8")
        steps = {name: getattr(like, name) for name in STEPS}
        path = tmp_path / "int8.zarr"
        do_the_rest(StoreWriter.create(path, card, known, steps))
        before = everything(path)
        if damage == "lost":
            shutil.rmtree(path / "scale")
        else:
            _flip_in("scale/c/0/0/0")(path)
        with pytest.raises(
            DamagedError, match=r"int8\.zarr/scale cannot be relied on .*; run its wmcache extract again"
        ):
            TokenStore.open(path)
        do_the_rest(StoreWriter.create(path, card, known, steps))
        TokenStore.open(path)
        assert everything(path) == before

    def test_a_mended_description_is_sealed(self, finished: Path, make_writer: MakeWriter) -> None:
        DESCRIPTIONS["a changed digit"](finished)
        make_writer(finished)
        assert read_attributes(finished)["complete"] is False
