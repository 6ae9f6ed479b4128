"""Fixtures and helpers of the tests of the commands: one run of the whole road, from frames to a plan."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from wmcache.cli import main, wmplan, wmtrain
from wmcache.common.errors import UserError
from wmcache.trainer.options import TrainOptions

COMMANDS: dict[str, click.Command] = {"wmcache": main, "wmtrain": wmtrain, "wmplan": wmplan}
MODEL = "--width 16 --depth 1 --heads 2 --batch-size 8 --device cpu --dtype float32"
PLAN = "--episodes 2 --budget 10 --samples 8 --elites 3 --iterations 2 --horizon 2 --device cpu"
PLAN_FOLDER = "plan-all-x1-horizon2-device-cpu-samples8-elites3-iterations2-2x10"
STORE = "{home}/stores/pointmaze-umaze/tcn-64.zarr"
RUN = "{home}/runs/pointmaze-umaze-tcn-64"
ADAPTER = "wmcache fit --encoder dino-tok --steps 2 --batch-size 8 --shallow 4 --device cpu"
SIZES = {"width": 16, "depth": 1, "heads": 2, "dropout": 0.0}
TINY = TrainOptions(model_options=SIZES, steps=4, batch=8, dtype="float32", device="cpu")


def run(line: str, home: Path | None = None, **paths: object) -> Result:
    """Run a command line; `{name}` in it is replaced by a path, which may contain spaces."""
    name, *words = (word.format(home=home, **paths) for word in line.split())
    return CliRunner().invoke(COMMANDS[name], words, env=home and {"WMCACHE_HOME": str(home)}, prog_name=name)


def succeed(line: str, home: Path | None = None, **paths: object) -> Result:
    """Run a command line, which has to succeed."""
    result = run(line, home, **paths)
    assert result.exit_code == 0, result.output
    return result


def error_of(result: Result) -> str:
    """The only line that a refused command printed; click's own refusals have a reminder of the usage, and status 2."""
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.stdout == ""
    *usage, error = result.stderr.splitlines()
    assert result.exit_code == (2 if usage else 1)
    assert all(line == "" or line.startswith(("Usage: ", "Try ")) for line in usage), result.stderr
    assert error.startswith("Error: ")
    return error


def parser(patch: pytest.MonkeyPatch, target: str, kind: type, command: str) -> Callable[[str], Any]:
    """Return what gives the options that a command line results in, without calling the target."""

    def settings_of(line: str) -> Any:
        received: list[Any] = []

        def receive(*arguments: object, **_: object) -> None:
            received.extend(value for value in arguments if isinstance(value, kind))
            raise UserError("received")

        patch.setattr(target, receive)
        assert error_of(run(f"{command} {line}")) == "Error: received"
        return received[0]

    return settings_of


def flat(options: Any, nested: str) -> dict[str, Any]:
    values = asdict(options)
    return {**values.pop(nested), **values}


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
        f"wmplan --run {RUN} {PLAN}",
    ):
        succeed(line, home)
    return home


@pytest.fixture
def home(tmp_path: Path, dataset_path: Path, tcn_weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with the frames and tcn's weights where the commands look for them, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WMCACHE_HOME", str(tmp_path / "home"))
    shutil.copytree(dataset_path, tmp_path / "home/pointmaze-umaze")
    (tmp_path / "home/encoders").mkdir()
    shutil.copy(tcn_weights, tmp_path / "home/encoders/pointmaze-umaze-tcn.safetensors")
    return tmp_path / "home"


@pytest.fixture
def refused(road: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Checks that a command line gives one line of error and an exit status, and leaves every file and folder as it was."""
    monkeypatch.chdir(tmp_path)

    def check(line: str, *named: str, status: int | None = None, **paths: object) -> None:
        before = contents(road, tmp_path)
        result = run(line, road, tmp=tmp_path, **paths)
        error = error_of(result)
        assert status in (None, result.exit_code)
        for part in named:
            assert part.format(home=road, tmp=tmp_path, **paths) in error
        assert contents(road, tmp_path) == before

    return check
