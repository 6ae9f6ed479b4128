"""What the tests of all importers share: the frames that are imported, and a way to run the command."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator

import pytest
from click.testing import CliRunner, Result

from wmcache.cli import main
from wmcache.pipeline.frames import FrameDataset, Frames

Import = Callable[..., Result]


@pytest.fixture(scope="session")
def everything(dataset: FrameDataset) -> Frames:
    """All 360 frames of the shared dataset."""
    return dataset.read_frames(range(len(dataset.steps)))


@pytest.fixture
def run_import() -> Iterator[Import]:
    """Runs `wmcache import`; checks that a failure is one line and status 1."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def run(*words: object) -> Result:
        result = CliRunner().invoke(main, ["import", *map(str, words)])
        if result.exit_code:
            assert isinstance(result.exception, SystemExit), result.exception
            assert result.exit_code == 1, result.output
            assert len([line for line in result.stderr.splitlines() if line.startswith("Error: ")]) == 1
            assert result.stderr.splitlines()[-1].startswith("Error: ")
        return result

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
