"""Signals through the real commands: they end soon, with a status of their own and the words to go on with, and leave no process."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from fault_workers import Child, extract_store, train_run

from wmcache.cache import TokenStore
from wmcache.cache.records import lock_file
from wmcache.common.errors import UserError
from wmcache.common.files import exclusive
from wmcache.engine.checkpoint import last_checkpoint
from wmcache.trainer.options import TrainOptions

Content = Callable[[Path], dict[str, bytes]]
Start = Callable[..., Child]
PATIENCE = 60.0
FLAGS = {"batch": "batch-size", "checkpoint_every": "checkpoint-every", "log_every": "log-every"}
STATUS = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGINT: 130}


class Command:
    """A real command, as a shell or a batch system runs it: in a process group of its own."""

    def __init__(self, *words: Any, said: Path) -> None:
        self.words = [str(word) for word in words]
        self._said = said
        with said.open("wb") as stderr:
            program = Path(sys.executable).with_name(self.words[0])
            self.process = subprocess.Popen(
                [program, *self.words[1:]],
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self._started: list[psutil.Process] = []

    @property
    def said(self) -> str:
        return self._said.read_text()

    def wait_for(self, condition: Callable[[], Any]) -> Any:
        end = time.monotonic() + PATIENCE
        while not (found := condition()):
            assert self.process.poll() is None, self.said
            assert time.monotonic() < end, f"it did not happen: {self.said}"
            time.sleep(0.01)
        return found

    def send(self, sent: signal.Signals, *, to_all: bool = False) -> None:
        """Send a signal, to the process alone or to all that it has started too, as Ctrl-C in a terminal does."""
        self._sent = sent
        self._started = psutil.Process(self.process.pid).children(recursive=True)
        if to_all:
            os.killpg(self.process.pid, sent)
        else:
            self.process.send_signal(sent)

    def require_stopped(self, patience: float = PATIENCE) -> None:
        """Wait for the end; insist on the status, on the words to go on with, and on no process that stays."""
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{patience} s after {self._sent.name} it still runs: {self.said}")
        assert self.process.returncode == STATUS[self._sent], self.said
        assert self.said.splitlines()[-1] == f"stopped; go on with: {shlex.join(self.words)}"
        assert "Traceback" not in self.said
        assert psutil.wait_procs(self._started, timeout=20)[1] == []

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@dataclass
class Stopped:
    """An extraction that was told to stop while it waited for the frames of shard 1.

    Attributes:
        command: what was run.
        data, out: the frames, of which one tar cannot be read; and the store.
        done: the bytes of the shards that were done.
    """

    command: Command
    data: Path
    out: Path
    done: dict[str, bytes]


CASES = {
    "SIGUSR1": (signal.SIGUSR1, 1, False),
    "Ctrl-C to all of 3 processes": (signal.SIGINT, 2, True),
}


def open_for_writing(fifo: Path) -> int | None:
    """Once somebody reads it; a plain `open` would wait for a dead reader too."""
    try:
        return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return None


@pytest.fixture(scope="module")
def stopped(
    few_path: Path, tcn_weights: Path, content: Content, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Stopped]]:
    """All cases at once, for each spends seconds on its imports and at its end."""
    cases = {}
    for name, (_, workers, _) in CASES.items():
        folder = tmp_path_factory.mktemp("stopped")
        data, out = Path(shutil.copytree(few_path, folder / "few")), folder / "some.zarr"
        # A tar that does not answer: whatever the machine, the signal comes in the middle.
        (data / "frames-000001.tar").unlink()
        os.mkfifo(data / "frames-000001.tar")
        words = ["--dataset", data, "--weights", tcn_weights, "--out", out, "--device", "cpu"]
        words += ["--cluster", f"local:{workers}"]
        cases[name] = Stopped(Command("wmcache", "extract", *words, said=folder / "stderr"), data, out, {})
    try:
        for name, case in cases.items():
            fifo = case.data / "frames-000001.tar"
            held = case.command.wait_for(lambda fifo=fifo: open_for_writing(fifo))
            case.command.wait_for(
                lambda case=case: len(list((case.out / "tokens" / "commits").glob("[0-9]*.json"))) == 2
            )
            case.done = content(case.out / "tokens")
            sent, _, to_all = CASES[name]
            case.command.send(sent, to_all=to_all)
            # Before the tar answers, so that it cannot be its answer that ends the work.
            time.sleep(0.3)
            os.close(held)
            fifo.unlink()
            shutil.copy(few_path / fifo.name, fifo)
        yield cases
    finally:
        for case in cases.values():
            case.command.kill()


@pytest.mark.parametrize("name", list(CASES))
def test_a_stopped_extraction_says_how_to_go_on_and_goes_on(
    stopped: dict[str, Stopped],
    start: Start,
    content: Content,
    few_stores: dict[str, Path],
    tcn_weights: Path,
    name: str,
) -> None:
    case = stopped[name]
    case.command.require_stopped()
    assert content(case.out / "tokens") == case.done
    with pytest.raises(UserError, match="incomplete"):
        TokenStore.open(case.out)
    start(extract_store, case.out, case.data, tcn_weights).returned()
    assert content(case.out / "tokens") == content(few_stores["float16"] / "tokens")
    assert {**content(case.out / "tokens"), **case.done} == content(case.out / "tokens")


def test_an_extraction_that_waits_for_another_can_be_stopped(
    few_path: Path, few_stores: dict[str, Path], tcn_weights: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(few_stores["float16"], tmp_path / "some.zarr"))
    (out / "tokens" / "commits" / "000001.json").unlink()
    words = ["--dataset", few_path, "--weights", tcn_weights, "--out", out, "--device", "cpu"]
    with exclusive(lock_file(out, 1)):
        command = Command("wmcache", "extract", *words, said=tmp_path / "stderr")
        try:
            command.wait_for(lambda: "another extraction" in command.said)
            command.send(signal.SIGTERM)
            command.require_stopped(20)
        finally:
            command.kill()


def test_a_stopped_wmtrain_says_how_to_go_on_and_goes_on(
    start: Start, content: Content, store_path: Path, tmp_path: Path
) -> None:
    run, straight = tmp_path / "run", tmp_path / "straight"
    model = {"width": 16, "depth": 1, "heads": 2, "dropout": 0.1}
    settings = {"steps": 150, "batch": 8, "device": "cpu", "checkpoint_every": 10, "log_every": 1}
    words = [word for name, value in {**model, **settings}.items() for word in (f"--{FLAGS.get(name, name)}", value)]
    command = Command("wmtrain", "--cache", store_path, "--out", run, *words, said=tmp_path / "stderr")
    try:
        command.wait_for(lambda: list((run / "checkpoints").glob("step-*")))
        command.send(signal.SIGTERM)
        command.require_stopped()
    finally:
        command.kill()
    options = TrainOptions(model_options=model, **settings)
    assert last_checkpoint(run).name < "step-00000150"
    for out in (run, straight):
        start(train_run, out, store_path, options).returned()
    assert content(last_checkpoint(run)) == content(last_checkpoint(straight))
    steps = [
        line["step"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in line
    ]
    assert steps == list(range(1, 151))
