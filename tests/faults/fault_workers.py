"""What the processes of these tests run, and the handle by which a test holds one."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib
import io
import itertools
import os
import resource
import shutil
import signal
import subprocess
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
import psutil
import pytest
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from wmcache.cache import Identity, StoreWriter, TokenStore
from wmcache.cache.layout import read_attributes
from wmcache.cache.verify import verify
from wmcache.cache.windows import Windows, batch_windows
from wmcache.common.errors import UserError
from wmcache.common.files import exclusive
from wmcache.engine.checkpoint import last_checkpoint, save_checkpoint
from wmcache.pipeline import encoders
from wmcache.pipeline import extract as extraction
from wmcache.pipeline.collect import collect
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.extract import extract, extract_together
from wmcache.pipeline.frames import FrameDataset, Frames
from wmcache.pipeline.repair import repair
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.train import train

M_ARENA_MAX = -8
NOT_DATA = (".lock", ".tmp", ".partial")
PATIENCE = 60.0
"""Seconds after which a process is said to hang."""


class NotAllowedError(Exception):
    """This machine, or this user, does not let a test make the fault."""


class Child:
    """A process that has begun to run a function, and what became of it."""

    def __init__(self, processes: ForkServerContext, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._answer, theirs = processes.Pipe(duplex=False)
        self.process = processes.Process(target=_report, args=(theirs, function, arguments))
        self.process.start()
        theirs.close()
        assert self._receive(PATIENCE) == "began"

    @property
    def pid(self) -> int:
        """Its number."""
        assert self.process.pid is not None
        return self.process.pid

    def kill(self) -> None:
        """SIGKILL, if it is alive, and wait for its end."""
        self.process.kill()
        self.process.join(PATIENCE)
        assert self.process.exitcode is not None

    def outcome(self, patience: float = PATIENCE) -> tuple[str, Any]:
        """Wait for the end: ("returned", value), ("refused", message of the UserError), ("crashed", traceback) or ("died", exit code)."""
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
        """Wait for the end, and insist that it was a good one; returns what the function returned."""
        kind, value = self.outcome(patience)
        if kind == "not allowed":
            pytest.skip(value)
        assert kind == "returned", f"{kind}: {value}"
        return value

    def refused(self, patience: float = PATIENCE) -> str:
        """Wait for the end, and insist that it was a UserError; returns its message."""
        kind, value = self.outcome(patience)
        assert kind == "refused", f"{kind}: {value}"
        return str(value)


def _report(answer: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    # Progress bars of many processes at once are of no use to anybody.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    answer.send("began")
    try:
        found = ("returned", function(*arguments))
    except UserError as error:
        found = ("refused", str(error))
    except NotAllowedError as error:
        found = ("not allowed", str(error))
    except BaseException:  # noqa: BLE001 (the test is told)
        found = ("crashed", traceback.format_exc())
    answer.send(found)


def extract_store(out: Path, data: Path, weights: Path, dtype: str = "float16") -> None:
    """As `wmcache extract`."""
    torch.set_num_threads(1)
    extract(FrameDataset.open(data), encoders.create("tcn", weights=weights, device="cpu"), out, dtype=dtype)


def extract_slice(out: Path, data: Path, weights: Path, part: tuple[int, int], dies: bool = False) -> None:
    """As `wmcache extract --shard-slice`; or dies with a shard encoded that is not written yet."""
    torch.set_num_threads(1)
    if dies:
        StoreWriter.write_shard = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign, assignment]
    encoder = encoders.create("tcn", weights=weights, device="cpu")
    extract_together(FrameDataset.open(data), [(encoder, out)], part=part)


def extract_beside(
    out: Path, data: Path, weights: Path, together: Barrier, log: Path, settings: dict[str, str], dies_at: int = 0
) -> None:
    """As `extract_store`, at the same moment as others; notes what it encodes, or dies at its `dies_at`-th shard, when the others begin."""
    torch.set_num_threads(1)
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
    """The end of an extraction whose shards are done, at the same moment as others, of one store after the other."""
    for path in stores:
        writer = StoreWriter.resume(path, Identity.from_json(read_attributes(path)["identity"], str(path)))
        together.wait(PATIENCE)
        writer.finish()


def repair_beside(path: Path, together: Barrier, later: float) -> None:
    """As `repair_store`, at the same moment as others, or so many seconds later."""
    together.wait(PATIENCE)
    time.sleep(later)
    repair_store(path)


def count_up(number: Path, lock: Path, rounds: int, together: Barrier) -> None:
    """Add 1 to the number in a file, in a way that loses some of them wherever two do it at once."""
    together.wait(PATIENCE)
    for _ in range(rounds):
        with exclusive(lock):
            value = int(number.read_text())
            number.write_text("being written")
            time.sleep(0.001)
            number.write_text(str(value + 1))


def repair_store(path: Path) -> None:
    """As `wmcache repair`."""
    torch.set_num_threads(1)
    repair(path, device="cpu")


def collect_few(out: Path) -> None:
    """As `wmcache collect`: 24 frames in 3 tars; shard and episode bounds do not coincide, and the last shard is short."""
    collect("wmcache/PointMaze-UMaze-v0", out, episodes=2, length=12, image_size=32, frames_per_shard=10)


def train_run(out: Path, cache: Path, options: TrainOptions) -> None:
    """As `wmtrain`."""
    torch.set_num_threads(1)
    train(cache, out, options)


def save_step(run: Path, step: int) -> None:
    """Save the checkpoint that a small model has after so many optimiser steps."""
    torch.set_num_threads(1)
    model, optimiser = small_model()
    for number in range(step):
        optimiser.zero_grad()
        model(torch.full((2, 4), float(number))).square().mean().backward()
        optimiser.step()
    save_checkpoint(run, step, model, optimiser)


def small_model() -> tuple[torch.nn.Module, torch.optim.AdamW]:
    """A model and its optimiser, before the first step."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    return model, torch.optim.AdamW(model.parameters(), fused=True)


CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"}
TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def die_changing(moment: int, place: Path, function: Callable[..., Any], *arguments: Any) -> int:
    """Run a function, and die by SIGKILL right before its `moment`-th change of a file in `place` (0: never); returns their number."""
    changes = itertools.count(1)

    def hook(event: str, details: tuple[Any, ...]) -> None:
        change = event in CHANGES or (event == "open" and isinstance(details[2], int) and details[2] & TO_WRITE)
        # shutil.rmtree names files relative to the folder that it has open.
        ours = change and any(
            isinstance(word, str) and (word.startswith(str(place)) or "/" not in word) for word in map(_name, details)
        )
        if ours and next(changes) == moment:
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


def command(*words: Any) -> tuple[int, str]:
    """What a command line does, in this process: its exit status, and what it says on stderr."""
    from wmcache import cli

    torch.set_num_threads(1)
    sys.argv = [str(word) for word in words]
    program = {"wmcache": cli.main, "wmtrain": cli.wmtrain}[sys.argv[0]]
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        try:
            program.main(sys.argv[1:], prog_name=sys.argv[0])
        except SystemExit as end:
            status = end.code
    return (status if isinstance(status, int) else 1), said.getvalue()


def private_mounts() -> None:
    """From here on, what this process mounts is there for this process alone, and gone with it."""
    new_mounts, new_users = 0x00020000, 0x10000000
    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None, use_errno=True).unshare(new_mounts | (new_users if user else 0)):
        raise NotAllowedError(f"no mounts of one's own here: {os.strerror(ctypes.get_errno())}")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    mount("--make-rprivate", "/")


def mount(*words: str | Path) -> None:
    """As the command of that name."""
    done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotAllowedError(f"mount {words}: {done.stderr}")


@dataclass
class Attempt:
    """A command in a place without enough room, and the same command again when there is enough.

    Attributes:
        limit: of the room.
        status, said: of the first.
        opened: what opening a store there says then; None where it opens.
        faults: what `verify` finds then.
        again: status and words of the second.
        content: what is there then.
    """

    limit: str
    status: int
    said: str
    opened: str | None
    faults: list[str]
    again: tuple[int, str]
    content: dict[str, bytes]

    @property
    def told(self) -> str:
        """The last line."""
        return self.said.rstrip().splitlines()[-1]


ROOM = "remount,size=64m,nr_inodes=10000"


def on_small_disks(place: Path, resource: str, every: int, last: int, words: list[Any]) -> list[Attempt]:
    """Try a command that writes to `{out}` on disks that are too small by more and more.

    Args:
        place: where to mount them.
        resource: of which there is too little: `nr_inodes`, or `size`, in pages.
        every: step from one number of them to the next.
        last: how many of the largest numbers; 0 for all.
        words: the command.
    """
    private_mounts()
    page = 4096

    def used() -> int:
        found = os.statvfs(place)
        return found.f_files - found.f_ffree if resource == "nr_inodes" else found.f_blocks - found.f_bfree

    def run(out: Path) -> tuple[int, str]:
        return command(*[str(word).format(out=out) for word in words])

    mount("-t", "tmpfs", "-o", ROOM.removeprefix("remount,"), "none", place)
    assert run(place / "out")[0] == 0
    # More than stays: temporary files need room too.
    most = used() + 6
    attempts = []
    for limit in range(most, (most - last if last else 3) - 1, -every):
        folder = place / str(limit)
        folder.mkdir()
        value = limit if resource == "nr_inodes" else limit * page
        mount("-t", "tmpfs", "-o", f"{resource}={value}", "none", folder)
        attempts.append(
            _attempt(f"{resource}={value}", folder / "out", run, lambda folder=folder: mount("-o", ROOM, folder))
        )
    return attempts


def with_small_files(out: Path, sizes: list[int], words: list[Any]) -> list[Attempt]:
    """Try a command that writes to `{out}` where no file may be larger than so many bytes."""

    def run(place: Path) -> tuple[int, str]:
        return command(*[str(word).format(out=place) for word in words])

    attempts = []
    for size in sizes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        unlimited = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        attempts.append(_attempt(f"{size} bytes", out.with_name(str(size)), run, unlimited))
    return attempts


def _attempt(limit: str, out: Path, run: Callable[[Path], tuple[int, str]], make_room: Callable[[], object]) -> Attempt:
    status, said = run(out)
    opened, faults = None, []
    try:
        TokenStore.open(out)
    except UserError as error:
        opened = str(error)
    if (out / "zarr.json").exists():
        faults = [f"{fault.file}: {fault.reason}" for fault in verify(out).faults]
    make_room()
    again = run(out)
    return Attempt(limit, status, said, opened, faults, again, content(out))


def save_on_small_disks(place: Path, resource: str) -> list[tuple[str | None, int, dict[str, bytes], dict[str, bytes]]]:
    """Save a second checkpoint where there is room for the first and so much more.

    Returns:
        For each: what was said, the step of the newest checkpoint and its files then, and its files once there is room.
    """
    private_mounts()
    found = []
    for more in range(8):
        folder = place / str(more)
        folder.mkdir()
        mount("-t", "tmpfs", "-o", ROOM.removeprefix("remount,"), "none", folder)
        save_step(folder / "run", 1)
        room = os.statvfs(folder)
        used = room.f_files - room.f_ffree if resource == "nr_inodes" else (room.f_blocks - room.f_bfree) * 4096
        mount("-o", f"remount,{resource}={used + more * (1 if resource == 'nr_inodes' else 4096)}", folder)
        said = None
        try:
            save_step(folder / "run", 2)
        except UserError as error:
            said = str(error)
        last = last_checkpoint(folder / "run")
        before = content(last)
        mount("-o", ROOM, folder)
        save_step(folder / "run", 2)
        found.append((said, int(last.name.removeprefix("step-")), before, content(last_checkpoint(folder / "run"))))
    return found


def on_read_only(place: Path, copies: dict[str, Path], commands: list[list[Any]]) -> list[tuple[int, str]]:
    """Copy folders to a place that is read-only from then on, and run commands there."""
    private_mounts()
    mount("-t", "tmpfs", "none", place)
    for name, source in copies.items():
        shutil.copytree(source, place / name)
    mount("-o", "remount,ro", place)
    return [command(*words) for words in commands]


def gather_from_read_only(place: Path, store: Path) -> tuple[NDArray[np.float16], bool]:
    """All tokens of a copy of a store in a place that is read-only, and whether it is sound."""
    private_mounts()
    mount("-t", "tmpfs", "none", place)
    shutil.copytree(store, place / "some.zarr")
    mount("-o", "remount,ro", place)
    found = TokenStore.open(place / "some.zarr")
    return found.gather(np.arange(len(found))), verify(place / "some.zarr").sound


def train_in_few_addresses(out: Path, cache: Path, options: TrainOptions, spare: int) -> str:
    """As `wmtrain` under `ulimit -v`; returns what it prints."""
    # Else the allocator reserves 64 MB for every thread, and uses hardly any of it.
    ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
    importlib.import_module("torch._dynamo")  # which the first optimiser imports, with libraries of some hundred MB
    limit = psutil.Process().memory_info().vms + spare
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        train_run(out, cache, options)
    return said.getvalue()


def train_in_little_memory(out: Path, cache: Path, options: TrainOptions, group: Path, limit: int) -> tuple[str, int]:
    """As `wmtrain` in a new control group; returns what it prints, and the most memory that the group has used."""
    first = "memory" in group.parts
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(limit))
        (group / "cgroup.procs").write_text(str(os.getpid()))
    except OSError as error:
        raise NotAllowedError(f"no memory control group here: {error}") from error
    for shard in (cache / "tokens").glob("c.*"):  # whoever reads a page first has it on its account
        with shard.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        train_run(out, cache, options)
    return said.getvalue(), int((group / ("memory.max_usage_in_bytes" if first else "memory.peak")).read_text())


def new_control_group() -> Path:
    """Where a control group for memory could be, below the one that this process is in."""
    names = {line.split(":")[1]: line.split(":")[2] for line in Path("/proc/self/cgroup").read_text().splitlines()}
    root = Path("/sys/fs/cgroup/memory" if "memory" in names else "/sys/fs/cgroup")
    return root / names.get("memory", names.get("", "/")).lstrip("/") / f"wmcache-test-{os.getpid()}"


def gather_with_few_files(path: Path, frames: NDArray[np.int64]) -> NDArray[np.float16]:
    """Tokens, read by a process that may have 64 files open."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    return TokenStore.open(path).gather(frames)


def gather_at_the_limit(path: Path, limit: str) -> None:
    """Open a store while there is enough of everything, and read it when there is no more to be had."""
    store = TokenStore.open(path)
    frames = np.arange(0, len(store), store.card.frames_per_shard)
    out = np.zeros((len(frames), *store.card.frame_shape), np.float16)
    if limit == "RLIMIT_NOFILE":
        resource.setrlimit(resource.RLIMIT_NOFILE, (psutil.Process().num_fds() + 1,) * 2)
    else:
        resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 1_000_000,) * 2)
    store.gather(frames, out)


def gather_after_fork(path: Path, frames: NDArray[np.int64]) -> list[int]:
    """Read, fork, and read in the fork, from the same store and from one that it opens; returns how the forks ended."""
    store = TokenStore.open(path)
    expected = store.gather(frames)
    ends = []
    for again in (False, True):
        if (child := os.fork()) == 0:
            signal.alarm(20)  # a fork that waits for a thread which it does not have would wait for ever
            found = (TokenStore.open(path) if again else store).gather(frames)
            os._exit(0 if np.array_equal(found, expected) else 1)
        ends.append(os.waitpid(child, 0)[1])
    np.testing.assert_array_equal(store.gather(frames), expected)
    return ends


class Batches(Dataset[dict[str, NDArray[Any]]]):
    """Batches of windows, for a `DataLoader`."""

    def __init__(self, windows: Windows, count: int) -> None:
        self.windows, self.count = windows, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, step: int) -> dict[str, NDArray[Any]]:
        return self.windows.batch(batch_windows(len(self.windows), 0, step, 16))


def load_in_forks(path: Path) -> int:
    """Read windows through a `DataLoader` of two forks of a process that has read; returns how many batches were right."""
    batches = Batches(TokenStore.open(path).windows(), 12)
    expected = [batches[step] for step in range(len(batches))]
    loader = DataLoader(batches, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=20)
    return sum(
        all(np.array_equal(found[name], values) for name, values in wanted.items())
        for found, wanted in zip(loader, expected, strict=True)
    )


def content(path: Path) -> dict[str, bytes]:
    """The bytes of every file in a folder that holds data; what a dead process may leave behind is none."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and not any(part.endswith(NOT_DATA) for part in file.relative_to(path).parts)
    }
