"""Fixtures and helpers of the tests of the commands: one run of the whole road, from frames to a plan."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner, Result

from wmcache.cli import main, wmplan, wmtrain

COMMANDS: dict[str, click.Command] = {"wmcache": main, "wmtrain": wmtrain, "wmplan": wmplan}
MODEL = "--width 16 --depth 1 --heads 2 --batch-size 8 --device cpu --dtype float32"
PLAN = "--episodes 2 --budget 10 --samples 8 --elites 3 --iterations 2 --horizon 2 --device cpu"
PLAN_FOLDER = "plan-all-x1-horizon2-device-cpu-samples8-elites3-iterations2-2x10"
STORE = "{home}/stores/pointmaze-umaze/tcn-64.zarr"


@pytest.fixture(scope="module", autouse=True)
def _restore_the_process() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small only wait for each other's threads
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run(line: str, home: Path, **paths: object) -> Result:
    """Run a command line; `{name}` in it is replaced by a path, which may contain spaces."""
    name, *words = (word.format(home=home, **paths) for word in line.split())
    return CliRunner().invoke(COMMANDS[name], words, env={"WMCACHE_HOME": str(home)}, prog_name=name)


def contents(*folders: Path) -> dict[Path, tuple[int, int]]:
    """Every file with its time and size, and every folder; the time of a folder changes with a lock that came and went."""
    found = [file for folder in folders for file in folder.rglob("*")]
    return {file: (0, 0) if file.is_dir() else (file.lstat().st_mtime_ns, file.lstat().st_size) for file in found}


@pytest.fixture(scope="session")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home after collect, fit, extract, wmtrain and wmplan; read only, so copy it to change it."""
    home = tmp_path_factory.mktemp("home") / "Läufe mit Leerzeichen"
    for line in (
        "wmcache collect --episodes 6 --length 40 --image-size 32 --frames-per-shard 64 --cluster local:1",
        "wmcache fit --steps 5 --batch-size 16 --device cpu",
        "wmcache extract --device cpu",
        f"wmtrain --cache {STORE} --steps 4 {MODEL}",
        f"wmplan --run {{home}}/runs/pointmaze-umaze-tcn-64 {PLAN}",
    ):
        result = run(line, home)
        assert result.exit_code == 0, result.output
    return home


@pytest.fixture
def refused(road: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Checks that a command line gives one line of error and an exit status, and leaves every file and folder as it was."""
    monkeypatch.chdir(tmp_path)

    def check(line: str, *named: str, **paths: object) -> None:
        before = contents(road, tmp_path)
        result = run(line, road, tmp=tmp_path, **paths)
        assert isinstance(result.exception, SystemExit), result.exception
        assert result.stdout == ""
        # What click itself refuses comes with a reminder of the usage, and status 2.
        *usage, error = result.stderr.splitlines()
        assert result.exit_code == (2 if usage else 1)
        assert all(line == "" or line.startswith(("Usage: ", "Try ")) for line in usage)
        assert error.startswith("Error: ")
        for part in named:
            assert part.format(home=road, tmp=tmp_path, **paths) in error
        assert contents(road, tmp_path) == before

    return check
