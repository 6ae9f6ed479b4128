"""Real servers and schedulers on loopback."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Test modules cannot import each other; they share modules beside them.
sys.path.insert(0, str(Path(__file__).parent))

from s3_server import S3Server

PATIENCE = 120.0


def lines_of(output: str) -> list[str]:
    """Return the lines without progress bars."""
    lines = [line.strip() for line in re.split(r"[\r\n]", output)]
    return [line for line in lines if line and not re.search(r"\d+%\||\d+/\d+ \[|B/s\]$", line)]


class Running:
    """A command that runs in a working directory, and its output."""

    def __init__(self, words: list[str], output: Path, cwd: Path, environment: dict[str, str]) -> None:
        self._output = output
        with output.open("wb") as file:
            program = Path(sys.executable).with_name(words[0])
            self.process = subprocess.Popen(
                [program, *words[1:]],
                cwd=cwd,
                env={**environment, "OMP_NUM_THREADS": "1"},
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    @property
    def lines(self) -> list[str]:
        return lines_of(self._output.read_text())

    def wait_for(self, condition: Callable[[], Any]) -> Any:
        end = time.monotonic() + PATIENCE
        while not (found := condition()):
            assert self.process.poll() is None, f"it has ended: {self.lines}"
            assert time.monotonic() < end, f"it makes no progress: {self.lines}"
            time.sleep(0.005)
        return found

    def wait(self, patience: float = PATIENCE) -> int:
        """Wait for the end, and return the exit status."""
        try:
            return self.process.wait(patience)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it hangs: {self.lines}") from None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """(words, cwd=…, **environment) -> the running command; it is killed at the end of the test."""
    started: list[Running] = []

    def begin(words: list[str], cwd: Path | None = None, **environment: str) -> Running:
        folder = tmp_path / f"command-{len(started)}"
        folder.mkdir()
        started.append(Running(words, folder / "output", cwd or folder, environment or dict(os.environ)))
        return started[-1]

    yield begin
    for running in started:
        running.kill()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An object store; tests use `s3`."""
    with S3Server(tmp_path_factory.mktemp("s3") / "server") as server:
        with server.client() as client:
            client.create_bucket(Bucket="bucket")
        yield server


@pytest.fixture
def s3(s3_server: S3Server) -> S3Server:
    """A running server with a bucket named `bucket`, started again if a test has killed it."""
    s3_server.start()
    return s3_server
