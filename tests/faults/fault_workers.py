"""What the child processes of the fault suite run, a handle on one of them, and the sample that they work on."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from wmcache.cache import Identity, StoreWriter, TokenStore, reader
from wmcache.cache.layout import read_attributes
from wmcache.cache.windows import batch_windows
from wmcache.common.errors import UserError
from wmcache.engine.checkpoint import Progress, save_checkpoint
from wmcache.pipeline import encoders
from wmcache.pipeline import extract as extraction
from wmcache.pipeline.collect import collect
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.extract import extract, extract_together
from wmcache.pipeline.frames import FrameDataset, Frames
from wmcache.pipeline.repair import repair
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.train import train

NOT_DATA = (".lock", ".tmp", ".partial")
PATIENCE = 60.0
"""Seconds after which a process counts as hanging."""


class NotAllowedError(Exception):
    """This machine or this user does not allow a test to cause the fault."""


class Child:
    """A process that runs a function, and its outcome."""

    def __init__(self, processes: ForkServerContext, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._answer, far_end = processes.Pipe(duplex=False)
        self.process = processes.Process(target=_report, args=(far_end, function, arguments))
        self.process.start()
        far_end.close()
        assert self._receive(PATIENCE) == "began"

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def kill(self) -> None:
        self.process.kill()
        self.process.join(PATIENCE)
        assert self.process.exitcode is not None

    def outcome(self, patience: float = PATIENCE) -> tuple[str, Any]:
        """Wait for ("returned", value), ("refused", message of the UserError), ("crashed", traceback) or ("died", exit code)."""
        found = self._receive(patience)
        self.process.join(patience)
        assert self.process.exitcode is not None, "the process has answered, but does not end"
        return found or ("died", self.process.exitcode)

    def _receive(self, patience: float) -> Any:
        if not self._answer.poll(patience):
            raise AssertionError(f"the process hangs: nothing after {patience} s")
        try:
            return self._answer.recv()
        except EOFError:
            return None

    def returned(self, patience: float = PATIENCE) -> Any:
        """Wait for the end and return the function's value; anything else fails the test."""
        kind, value = self.outcome(patience)
        if kind == "not allowed":
            pytest.skip(value)
        assert kind == "returned", f"{kind}: {value}"
        return value

    def refused(self, patience: float = PATIENCE) -> str:
        kind, value = self.outcome(patience)
        assert kind == "refused", f"{kind}: {value}"
        return str(value)


def _report(answer: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    # Progress bars of many processes at once are noise.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    torch.set_num_threads(1)
    answer.send("began")
    try:
        found = ("returned", function(*arguments))
    except UserError as error:
        found = ("refused", str(error))
    except NotAllowedError as error:
        found = ("not allowed", str(error))
    except BaseException:  # noqa: BLE001 (the test receives it)
        found = ("crashed", traceback.format_exc())
    answer.send(found)


@dataclass(frozen=True)
class Sample:
    """A small frame dataset, the weights of an encoder, and the undisturbed store of each dtype."""

    dataset: Path
    weights: Path
    stores: dict[str, Path]

    @property
    def store(self) -> Path:
        return self.stores["float16"]

    @property
    def frames(self) -> FrameDataset:
        return FrameDataset.open(self.dataset)

    @property
    def words(self) -> list[object]:
        """Options of `wmcache extract`, without `--out`."""
        return ["--dataset", self.dataset, "--weights", self.weights, "--device", "cpu"]

    def extract(self, out: Path, dtype: str = "float16") -> None:
        extract(self.frames, encoders.create("tcn", weights=self.weights, device="cpu"), out, dtype=dtype)


def extract_slice(out: Path, data: Path, weights: Path, part: tuple[int, int], dies: bool = False) -> None:
    """As `wmcache extract --shard-slice`; or die with a shard encoded that is not written yet."""
    if dies:
        StoreWriter.write_shard = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign, assignment]
    encoder = encoders.create("tcn", weights=weights, device="cpu")
    extract_together(FrameDataset.open(data), [(encoder, out)], part=part)


def extract_beside(
    out: Path, data: Path, weights: Path, together: Barrier, log: Path, settings: dict[str, str], dies_at: int = 0
) -> None:
    """As `Sample.extract`, at the same moment as others; log what is encoded, or die at shard number `dies_at` while the others start."""
    encode, numbers = extraction.encode_frames, itertools.count(1)

    def noted(loaded: Sequence[Encoder], frames: Frames, batch: int) -> list[NDArray[np.float16]]:
        if next(numbers) == dies_at:
            together.wait(PATIENCE)
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        with log.open("a") as file:
            file.write(hashlib.sha256(frames).hexdigest() + "\n")
        return encode(loaded, frames, batch)

    extraction.encode_frames = noted
    dataset = FrameDataset.open(data)
    encoder = encoders.create("tcn", weights=weights, device="cpu", normalisation=settings.get("normalisation"))
    if not dies_at:
        together.wait(PATIENCE)
    extract(dataset, encoder, out, dtype=settings.get("store_dtype", "float16"))


def finish_beside(stores: list[Path], together: Barrier) -> None:
    for path in stores:
        writer = StoreWriter.resume(path, Identity.from_json(read_attributes(path)["identity"], str(path)))
        together.wait(PATIENCE)
        writer.finish()


def repair_beside(path: Path, together: Barrier, later: float) -> None:
    """As `repair_store`, at the same moment as others, or `later` seconds after them."""
    together.wait(PATIENCE)
    time.sleep(later)
    repair_store(path)


def repair_store(path: Path) -> None:
    repair(path, device="cpu")


def collect_few(out: Path) -> None:
    """As `wmcache collect`: 24 frames in 3 tars; shards and episodes have different bounds, and the last shard is short."""
    collect(
        "wmcache/PointMaze-UMaze-v0", out, episodes=2, length=12, image_size=32, frames_per_shard=10, cluster="local:1"
    )


def train_run(out: Path, cache: Path, options: TrainOptions) -> None:
    train(cache, out, options)


def save_step(run: Path, step: int) -> None:
    """Save the checkpoint that a small model has after so many optimiser steps."""
    model, optimiser = small_model()
    for number in range(step):
        optimiser.zero_grad()
        model(torch.full((2, 4), float(number))).square().mean().backward()
        optimiser.step()
    save_checkpoint(run, Progress(step), model, optimiser)


def small_model() -> tuple[torch.nn.Module, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    return model, torch.optim.AdamW(model.parameters(), fused=True)


CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"}
TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def die_changing(moment: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> int:
    """Run a function, and die by SIGKILL before change number `moment` of a file in a folder (0: never); returns the number of changes."""
    changes = itertools.count(1)

    def hook(event: str, details: tuple[Any, ...]) -> None:
        change = event in CHANGES or (event == "open" and isinstance(details[2], int) and details[2] & TO_WRITE)
        # shutil.rmtree names files relative to the folder that it has open.
        inside = change and any(
            isinstance(word, str) and (word.startswith(str(folder)) or "/" not in word) for word in map(_name, details)
        )
        if inside and next(changes) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    function(*arguments)
    return next(changes) - 1


def _name(word: Any) -> Any:
    return os.fspath(word) if isinstance(word, os.PathLike) else word


def die_writing(size: int, function: Callable[..., Any], *arguments: Any) -> None:
    """Run a function, and die by SIGXFSZ in the middle of writing the first file that grows beyond `size` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    function(*arguments)


def command(*words: object) -> tuple[int, str]:
    """Run a command line in this process; returns its exit status and all that it prints. Exceptions that it lets through are raised."""
    from wmcache import cli

    sys.argv = [str(word) for word in words]
    program = {"wmcache": cli.main, "wmtrain": cli.wmtrain}[sys.argv[0]]
    with io.StringIO() as output, contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
        try:
            program.main(sys.argv[1:], prog_name=sys.argv[0])
        except SystemExit as end:
            status = end.code
        return (status if isinstance(status, int) else 1), output.getvalue()


def load_in_forks(path: Path) -> int:
    """Read windows through a `DataLoader` with two forks of a process that has read; returns the number of right batches."""
    windows = TokenStore.open(path).windows()
    reader.BYTES_WORTH_A_THREAD, reader.COPY_THREADS = 100, 2  # a fork has none of the threads

    def read(step: int) -> dict[str, NDArray[Any]]:
        return windows.batch(batch_windows(len(windows), 0, step, 16))

    expected = [read(step) for step in range(12)]
    options = {"batch_size": None, "num_workers": 2, "multiprocessing_context": "fork", "timeout": 20}
    loader = DataLoader[Any](range(12), collate_fn=read, **options)  # type: ignore[arg-type]
    return sum(
        all(np.array_equal(found[name], values) for name, values in wanted.items())
        for found, wanted in zip(loader, expected, strict=True)
    )


def content(path: Path) -> dict[str, bytes]:
    """Return the bytes of every data file in a folder; leftovers of dead processes do not count."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and not any(part.endswith(NOT_DATA) for part in file.relative_to(path).parts)
    }
