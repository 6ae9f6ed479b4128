from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from wmcache.cache import UserError
from wmcache.pipeline.cluster import run_tasks


@pytest.mark.parametrize("threads", [1, 2])
def test_every_item_is_done_once(threads: int) -> None:
    done: list[int] = []

    def task(item: int) -> int:
        done.append(item)
        return 1

    run_tasks(task, range(20), workers=1, threads=threads, total=20, label="test")
    assert sorted(done) == list(range(20))


@pytest.mark.parametrize("threads", [1, 2])
def test_items_that_fail_are_counted_and_the_others_done(threads: int) -> None:
    done: list[int] = []

    def task(item: int) -> int:
        if item in (3, 4):
            raise UserError(f"item {item} is bad")
        done.append(item)
        return 1

    with pytest.raises(UserError, match=r"2 of 10 shards failed, the others are done; the first: item [34] is bad"):
        run_tasks(task, range(10), workers=1, threads=threads, total=10, label="test")
    assert sorted(done) == [0, 1, 2, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_of_ours_is_not_hidden(threads: int) -> None:
    def task(item: int) -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_tasks(task, range(3), workers=1, threads=threads, total=3, label="test")


def test_nothing_to_do_starts_no_process() -> None:
    run_tasks(len, [], workers=2, total=0, label="test")


def test_a_worker_that_is_killed_is_replaced_and_what_kills_every_worker_fails(tmp_path: Path) -> None:
    def task(item: int) -> int:
        if item == 3 or (item == 1 and not (tmp_path / "tried").exists()):
            (tmp_path / "tried").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        (tmp_path / str(item)).touch()
        return 1

    with pytest.raises(UserError, match=r"1 of 5 shards failed, .* killed again and again; lower --workers"):
        run_tasks(task, range(5), workers=2, total=5, label="test")
    assert {file.name for file in tmp_path.iterdir()} == {"0", "1", "2", "4", "tried"}
