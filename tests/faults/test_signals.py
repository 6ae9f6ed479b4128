"""Signals to the real commands: they end soon, with their own exit status and the command that continues, and leave no process."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from fault_workers import Child, Sample, content, train_run

from wmcache.cache import TokenStore
from wmcache.cache.records import lock_file
from wmcache.common.errors import UserError
from wmcache.common.locks import exclusive
from wmcache.engine.checkpoint import last_checkpoint
from wmcache.trainer.options import TrainOptions

from ..cluster.conftest import Running

Start = Callable[..., Child]
FLAGS = {"batch": "batch-size", "checkpoint_every": "checkpoint-every", "log_every": "log-every"}
STATUS = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGINT: 130}


class Command(Running):
    """A real command in its own process group, as a shell or a batch system runs it."""

    def __init__(self, *words: object, folder: Path) -> None:
        self.words = [str(word) for word in words]
        super().__init__(self.words, folder / "output", folder, dict(os.environ))

    def send(self, sent: signal.Signals, *, to_all: bool = False) -> None:
        """Send a signal to the process, or to its group as Ctrl-C in a terminal does."""
        self._sent = sent
        self._started = psutil.Process(self.process.pid).children(recursive=True)
        if to_all:
            os.killpg(self.process.pid, sent)
        else:
            self.process.send_signal(sent)

    def check_stopped(self, patience: float = 60.0) -> None:
        """Wait for the end; check the exit status, the command that continues, and that no process stays."""
        assert self.wait(patience) == STATUS[self._sent], self.lines
        assert self.lines[-1].endswith(f": {shlex.join(self.words)}")
        assert not any("Traceback" in line for line in self.lines)
        assert psutil.wait_procs(self._started, timeout=20)[1] == []

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *raised: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def open_for_writing(fifo: Path) -> int | None:
    """Open a pipe if a process reads it; a plain `open` would also wait for a dead reader."""
    try:
        return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return None


@pytest.mark.parametrize(
    ("sent", "workers", "to_all"),
    [(signal.SIGUSR1, 1, False), pytest.param(signal.SIGINT, 2, True, marks=pytest.mark.sweep)],
    ids=["SIGUSR1", "Ctrl-C to all of 3 processes"],
)
def test_a_stopped_extraction_continues(
    start: Start, few: Sample, tmp_path: Path, sent: signal.Signals, workers: int, to_all: bool
) -> None:
    data, out = Path(shutil.copytree(few.dataset, tmp_path / "few")), tmp_path / "some.zarr"
    # A tar that blocks: the signal arrives in the middle of the work on any machine.
    fifo = data / "frames-000001.tar"
    fifo.unlink()
    os.mkfifo(fifo)
    sample = Sample(data, few.weights, {})
    words = [*sample.words, "--out", out, "--cluster", f"local:{workers}"]
    with Command("wmcache", "extract", *words, folder=tmp_path) as command:
        pipe = command.wait_for(lambda: open_for_writing(fifo))
        command.wait_for(lambda: len(list((out / "tokens" / "commits").glob("[0-9]*.json"))) == 2)
        done = content(out / "tokens")
        command.send(sent, to_all=to_all)
        # The signal is handled before the tar answers.
        time.sleep(0.3)
        os.close(pipe)
        fifo.unlink()
        shutil.copy(few.dataset / fifo.name, fifo)
        command.check_stopped()
    assert content(out / "tokens") == done
    with pytest.raises(UserError):
        TokenStore.open(out)
    start(sample.extract, out).returned()
    assert content(out / "tokens") == content(few.store / "tokens")
    assert done.items() <= content(out / "tokens").items()


def test_an_extraction_that_waits_for_another_can_be_stopped(few: Sample, tmp_path: Path) -> None:
    out = Path(shutil.copytree(few.store, tmp_path / "some.zarr"))
    (out / "tokens" / "commits" / "000001.json").unlink()
    words = ["wmcache", "extract", *few.words, "--out", out]
    with exclusive(lock_file(out, 1)), Command(*words, folder=tmp_path) as command:
        command.wait_for(lambda: any("another extraction" in line for line in command.lines))
        command.send(signal.SIGTERM)
        command.check_stopped(20)


def test_a_stopped_wmtrain_continues(start: Start, store_path: Path, tmp_path: Path) -> None:
    run, straight = tmp_path / "run", tmp_path / "straight"
    model = {"width": 16, "depth": 1, "heads": 2, "dropout": 0.1}
    settings = {"steps": 150, "batch": 8, "device": "cpu", "checkpoint_every": 10, "log_every": 1}
    words = [word for name, value in {**model, **settings}.items() for word in (f"--{FLAGS.get(name, name)}", value)]
    with Command("wmtrain", "--cache", store_path, "--out", run, *words, folder=tmp_path) as command:
        command.wait_for(lambda: list((run / "checkpoints").glob("step-*")))
        command.send(signal.SIGTERM)
        command.check_stopped()
    options = TrainOptions(model_options=model, **settings)
    assert last_checkpoint(run).name < "step-00000150"
    for out in (run, straight):
        start(train_run, out, store_path, options).returned()
    assert content(last_checkpoint(run)) == content(last_checkpoint(straight))
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 151))
