"""Standard streams that are closed, have lost their reader, or cannot encode a name: in real processes, of cheap commands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from shutil import copytree

import pytest

from wmcache.common.errors import command

BIN = Path(sys.executable).parent


def run(words: str, *paths: Path, closed: str = "", broken: str = "", **environment: str) -> tuple[int, str, str]:
    """Run a command with closed streams, or with streams whose reader has gone; returns status, stdout and stderr."""
    reader, writer = os.pipe()
    os.close(reader)
    to = {name: writer if name in broken else subprocess.PIPE for name in ("stdout", "stderr")}
    program, *rest = words.split()
    close = " ".join({"stdout": ">&-", "stderr": "2>&-"}[name] for name in closed.split())
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {close}', "sh", BIN / program, *rest, *paths],
        stdout=to["stdout"],
        stderr=to["stderr"],
        env={**os.environ, **environment},
        check=False,
    )
    os.close(writer)
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    return done.returncode, (done.stdout or b"").decode(encoding), (done.stderr or b"").decode(encoding)


@pytest.fixture(scope="module")
def strange(store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two stores: one whose name is Japanese, one with a line break and a terminal code in its name."""
    folder = tmp_path_factory.mktemp("strange")
    copytree(store_path, folder / "迷路.zarr")
    copytree(store_path, folder / "line\nbreak\x1b[31m.zarr")
    return folder


@pytest.mark.parametrize(
    ("words", "broken"),
    [
        ("wmcache --help", "stdout"),
        ("wmcache ls", "stdout"),
        ("wmtrain --version", "stdout"),
        ("wmplan", "stderr"),
        ("wmcache info /nowhere", "stderr"),
        ("wmcache verify {store}", "stderr"),  # a progress bar
    ],
)
def test_a_pipe_without_a_reader_ends_a_command_as_sigpipe_does(store_path: Path, words: str, broken: str) -> None:
    assert run(words.format(store=store_path), broken=broken) == (141, "", "")


@pytest.mark.parametrize("closed", ["stdout stderr", "stderr"])
def test_closed_streams_do_not_stop_a_command(closed: str, store_path: Path) -> None:
    status, stdout, _ = run("wmcache verify", store_path, closed=closed)
    assert status == 0
    assert bool(stdout) == (closed == "stderr")


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_what_the_terminal_cannot_show_is_escaped(strange: Path, encoding: str) -> None:
    status, stdout, _ = run("wmcache ls", strange, PYTHONIOENCODING=encoding)
    assert status == 0
    assert len(stdout.splitlines()) == 3
    assert "\x1b" not in stdout
    assert r"line\nbreak\x1b[31m.zarr" in stdout
    assert ("迷路.zarr" if encoding == "utf-8" else r"\u8ff7\u8def.zarr") in stdout


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_advice_with_a_strange_name_can_be_pasted() -> None:
    name = "it's a\nline \\n\x1b[31m 迷路 \u2028"
    line = command("printf", "%s", name)
    assert len(line.splitlines()) == 1
    assert subprocess.run(["bash", "-c", line], capture_output=True, check=True).stdout.decode() == name
