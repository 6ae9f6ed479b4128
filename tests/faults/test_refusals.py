"""File systems that refuse memory maps, and files that the system cannot read: neither is taken for damage."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from wmcache.cache import TokenStore
from wmcache.cache.catalogue import summarise
from wmcache.cache.layout import DamagedError
from wmcache.cache.verify import verify
from wmcache.cli import main
from wmcache.common.errors import UnreadableError, UserError
from wmcache.pipeline import repair  # noqa: F401 (another user may not be able to import it)

HERE = Path(__file__).parent
DESTROYS = ("repair", "again with", "wmcache extract", "collect", "fit it again", "delete", "--overwrite", "damaged")
"""What no advice about a healthy file may contain."""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled `refuse.c`."""
    if (compiler := shutil.which("cc") or shutil.which("gcc")) is None:
        pytest.skip("there is no C compiler")
    library = tmp_path_factory.mktemp("shim") / "refuse.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, HERE / "refuse.c", "-ldl"], check=True)
    return library


@pytest.fixture(scope="module")
def refusals(
    shim: Path, store_path: Path, dataset_path: Path, tcn_weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What `refusal_worker.py` saw."""
    folder = tmp_path_factory.mktemp("refusals")
    words = [shutil.copytree(store_path, folder / "tcn.zarr"), shutil.copytree(dataset_path, folder / "frames")]
    worker = subprocess.run(
        [sys.executable, HERE / "refusal_worker.py", folder, *words, shutil.copy(tcn_weights, folder)],
        env={**os.environ, "LD_PRELOAD": str(shim), "WMCACHE_HOME": str(folder)},
        stdout=subprocess.PIPE,
        check=True,
    )
    found: dict[str, Any] = json.loads(worker.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("number", [errno.ENODEV, errno.EACCES])
def test_a_store_that_cannot_be_mapped_is_read_all_the_same(refusals: dict[str, Any], number: int) -> None:
    found = refusals["maps"][str(number)]
    assert found["equal"]
    assert found["sound"][0] == 0, found["sound"][1]


@pytest.mark.parametrize("number", [errno.ENODEV, errno.EACCES])
def test_damage_is_found_without_maps(refusals: dict[str, Any], number: int) -> None:
    found = refusals["maps"][str(number)]
    kind, message = found["damaged"]
    assert kind == "UserError"
    assert f"frame {found['first']} " in message
    assert "wmcache repair" in message
    assert found["others"]
    status, output = found["verify"]
    assert status == 1
    assert f"in frames {found['first']}" in output


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_what_the_system_cannot_read_is_not_called_damaged(refusals: dict[str, Any], number: int) -> None:
    found = refusals["unreadable"][str(number)]
    assert not found.pop("changed")
    for tried, (status, output) in found.items():
        if tried == "extract tokens/c.1.0.0":  # a finished extraction reads no tokens
            continue
        last = output.splitlines()[-1]
        assert status == 1, (tried, output)
        assert os.strerror(number) in last, (tried, last)
        assert tried.split()[-1].removesuffix("/c") in last or tried in ("gather", "extract weights"), (tried, last)
        assert not [word for word in DESTROYS if word in last.partition(";")[2]], (tried, last)
        assert "Traceback" not in output, tried


def test_checkpoints_and_weights_are_read_without_maps(refusals: dict[str, Any]) -> None:
    assert refusals["tensors"]["same"]
    assert refusals["tensors"]["metadata"] == {"encoder": "tcn"}


@pytest.mark.parametrize("tried", ["failed", "stale"])
def test_a_checkpoint_that_the_system_cannot_read_is_not_to_be_deleted(refusals: dict[str, Any], tried: str) -> None:
    kind, message = refusals["tensors"][tried]
    assert kind == "UnreadableError"
    assert "delete" not in message


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_without_file_locks_stores_are_read_and_none_is_written(refusals: dict[str, Any], number: int) -> None:
    found = refusals["locks"][str(number)]
    status, output = found["extract"]
    assert status == 1
    assert found["place"] in output
    assert "locks" in output.splitlines()[-1]
    assert found["left"] == []
    assert found["verify"][0] == 0
    assert found["finished"][0] == 0  # nothing is to be written
    assert found["read"] == 9


AnotherUser = Callable[[], AbstractContextManager[None]]


@pytest.fixture
def copied(store_path: Path, open_folder: Path) -> Path:
    """A store where any user may look."""
    return shutil.copytree(store_path, open_folder / "tcn.zarr")


@pytest.mark.parametrize(
    "name", ["tokens/c.1.0.0", "zarr.json", "tokens/zarr.json", "action", "action/c/0/0", "tokens/commits/000001.json"]
)
def test_a_file_that_this_user_may_not_read(copied: Path, another_user: AnotherUser, name: str) -> None:
    (copied / name).chmod(0)
    with another_user():
        with pytest.raises(UnreadableError) as refused:
            verify(copied)
        read = CliRunner().invoke(main, ["repair", str(copied)])
    (copied / name).chmod(0o755)
    assert not isinstance(refused.value, DamagedError)
    for message in (str(refused.value), read.output.splitlines()[-1]):
        assert str(copied / name).removesuffix("/c/0/0") in message
        assert not [word for word in DESTROYS if word in message.partition(";")[2]], message
    assert read.exit_code == 1
    assert verify(copied).sound


def test_reading_a_shard_that_this_user_may_not_read(copied: Path, another_user: AnotherUser) -> None:
    (copied / "tokens" / "c.1.0.0").chmod(0)
    store = TokenStore.open(copied)
    first = store.card.frames_per_shard
    with another_user():
        assert len(store.gather(np.arange(first))) == first
        with pytest.raises(UnreadableError, match=r"c\.1\.0\.0"):
            store.gather(np.array([first]))


def test_a_store_that_this_user_may_not_read_is_not_listed_as_damaged(copied: Path, another_user: AnotherUser) -> None:
    (copied / "zarr.json").chmod(0)
    with another_user():
        found = summarise(copied)
        with pytest.raises(UserError) as refused:
            TokenStore.open(copied)
    assert (found.state, found.damaged) == ("unreadable", False)
    assert str(copied) in str(refused.value)
