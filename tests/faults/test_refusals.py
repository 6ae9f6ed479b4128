"""File systems that refuse memory maps or locks, and files that cannot be read: none of it is reported as damage."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from damage_tools import DESTROYS
from fault_workers import command

from wmcache.cache import TokenStore
from wmcache.cache.catalogue import summarise
from wmcache.cache.layout import DamagedError
from wmcache.cache.verify import verify
from wmcache.common.errors import UnreadableError, UserError
from wmcache.pipeline import repair  # noqa: F401 (another user may not be able to import it)

HERE = Path(__file__).parent
AnotherUser = Callable[[], AbstractContextManager[None]]


@pytest.mark.sweep
def test_system_calls_that_fail_are_not_reported_as_damage(tmp_path: Path) -> None:
    # The tests of refused_calls.py, in a process with refuse.c preloaded.
    if (compiler := shutil.which("cc") or shutil.which("gcc")) is None:
        pytest.skip("a C compiler is not installed")
    library = tmp_path / "refuse.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, HERE / "refuse.c", "-ldl"], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library), "WMCACHE_HOME": str(tmp_path)}
    words = ["-q", "-p", "no:cacheprovider", "--basetemp", tmp_path / "inner", HERE / "refused_calls.py"]
    found = subprocess.run(
        [sys.executable, "-m", "pytest", *words], env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout


@pytest.fixture
def copied(store_path: Path, open_folder: Path) -> Path:
    """A store that any user can read."""
    return Path(shutil.copytree(store_path, open_folder / "tcn.zarr"))


@pytest.mark.parametrize(
    "name", ["tokens/c.1.0.0", "zarr.json", "tokens/zarr.json", "action", "action/c/0/0", "tokens/commits/000001.json"]
)
def test_a_file_that_this_user_may_not_read_is_not_called_damaged(
    copied: Path, another_user: AnotherUser, name: str
) -> None:
    (copied / name).chmod(0)
    with another_user():
        with pytest.raises(UnreadableError) as refusal:
            verify(copied)
        status, output = command("wmcache", "repair", copied)
    (copied / name).chmod(0o755)
    assert not isinstance(refusal.value, DamagedError)
    for message in (str(refusal.value), output.splitlines()[-1]):
        assert str(copied / name).removesuffix("/c/0/0") in message
        assert not [word for word in DESTROYS if word in message.partition(";")[2]], message
    assert status == 1
    assert verify(copied).sound


def test_a_store_that_this_user_may_not_read_is_not_listed_as_damaged(copied: Path, another_user: AnotherUser) -> None:
    (copied / "zarr.json").chmod(0)
    with another_user():
        found = summarise(copied)
        with pytest.raises(UserError) as refusal:
            TokenStore.open(copied)
    assert (found.state, found.damaged) == ("unreadable", False)
    assert str(copied) in str(refusal.value)
