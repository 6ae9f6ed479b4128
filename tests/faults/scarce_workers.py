"""What the child processes of `test_resources.py` run: commands with too little disk, memory or address space."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import io
import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from fault_workers import NotAllowedError, command, content, save_step, train_run

from wmcache.cache import TokenStore
from wmcache.cache.verify import verify
from wmcache.common.errors import UserError
from wmcache.engine.checkpoint import last_checkpoint
from wmcache.trainer.options import TrainOptions

M_ARENA_MAX = -8


def private_mounts() -> None:
    """Make the mounts of this process private; they end with it."""
    new_mounts, new_users = 0x00020000, 0x10000000
    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None, use_errno=True).unshare(new_mounts | (new_users if user else 0)):
        raise NotAllowedError(f"private mounts are not allowed: {os.strerror(ctypes.get_errno())}")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    mount("--make-rprivate", "/")


def mount(*words: str | Path) -> None:
    done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotAllowedError(f"mount {words}: {done.stderr}")


@dataclass
class Attempt:
    """A command with too little room, and the same command again when there is enough.

    `opened` is the error of opening the store in between, and `faults` are those that `verify` finds then.
    """

    limit: str
    status: int
    output: str
    opened: str | None
    faults: list[str]
    again: tuple[int, str]
    content: dict[str, bytes]


ROOM = "remount,size=64m,nr_inodes=10000"


def on_small_disks(disks: Path, resource: str, every: int, last: int, words: list[Any]) -> list[Attempt]:
    """Try a command that writes to `{out}` on disks with fewer and fewer inodes (`nr_inodes`) or pages (`size`).

    Args:
        every: step from one limit to the next.
        last: try only this many of the largest limits; 0 for all.
    """
    private_mounts()
    page = 4096

    def used() -> int:
        found = os.statvfs(disks)
        return found.f_files - found.f_ffree if resource == "nr_inodes" else found.f_blocks - found.f_bfree

    def run(out: Path) -> tuple[int, str]:
        return command(*[str(word).format(out=out) for word in words])

    mount("-t", "tmpfs", "-o", ROOM.removeprefix("remount,"), "none", disks)
    assert run(disks / "out")[0] == 0
    # Temporary files need room too.
    most = used() + 6
    attempts = []
    for limit in range(most, (most - last if last else 3) - 1, -every):
        folder = disks / str(limit)
        folder.mkdir()
        value = limit if resource == "nr_inodes" else limit * page
        mount("-t", "tmpfs", "-o", f"{resource}={value}", "none", folder)
        attempts.append(
            _attempt(f"{resource}={value}", folder / "out", run, lambda folder=folder: mount("-o", ROOM, folder))
        )
    return attempts


def with_small_files(out: Path, sizes: list[int], words: list[Any]) -> list[Attempt]:
    """Try a command that writes to `{out}` with a limit on the size of files, for each limit in bytes."""

    def run(folder: Path) -> tuple[int, str]:
        return command(*[str(word).format(out=folder) for word in words])

    attempts = []
    for size in sizes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        unlimited = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        attempts.append(_attempt(f"{size} bytes", out.with_name(str(size)), run, unlimited))
    return attempts


def _attempt(limit: str, out: Path, run: Callable[[Path], tuple[int, str]], make_room: Callable[[], object]) -> Attempt:
    status, output = run(out)
    opened, faults = None, []
    try:
        TokenStore.open(out)
    except UserError as error:
        opened = str(error)
    if (out / "zarr.json").exists():
        faults = [f"{fault.file}: {fault.reason}" for fault in verify(out).faults]
    make_room()
    again = run(out)
    return Attempt(limit, status, output, opened, faults, again, content(out))


def save_on_small_disks(disks: Path, resource: str) -> list[tuple[str | None, int, dict[str, bytes], dict[str, bytes]]]:
    """Save a second checkpoint where there is room for the first and a little more.

    Returns for each amount of room the error or None, the step of the newest checkpoint, its files, and its files once there is room.
    """
    private_mounts()
    found = []
    for more in range(8):
        folder = disks / str(more)
        folder.mkdir()
        mount("-t", "tmpfs", "-o", ROOM.removeprefix("remount,"), "none", folder)
        save_step(folder / "run", 1)
        room = os.statvfs(folder)
        used = room.f_files - room.f_ffree if resource == "nr_inodes" else (room.f_blocks - room.f_bfree) * 4096
        mount("-o", f"remount,{resource}={used + more * (1 if resource == 'nr_inodes' else 4096)}", folder)
        refusal = None
        try:
            save_step(folder / "run", 2)
        except UserError as error:
            refusal = str(error)
        last = last_checkpoint(folder / "run")
        before = content(last)
        mount("-o", ROOM, folder)
        save_step(folder / "run", 2)
        found.append((refusal, int(last.name.removeprefix("step-")), before, content(last_checkpoint(folder / "run"))))
    return found


def on_read_only(folder: Path, copies: dict[str, Path], commands: list[list[Any]]) -> list[tuple[int, str]]:
    """Copy folders to a mount, make it read-only, and run commands there."""
    private_mounts()
    mount("-t", "tmpfs", "none", folder)
    for name, source in copies.items():
        shutil.copytree(source, folder / name)
    mount("-o", "remount,ro", folder)
    return [command(*words) for words in commands]


def train_in_few_addresses(out: Path, cache: Path, options: TrainOptions, spare: int) -> str:
    """As `wmtrain` under `ulimit -v`; returns its output."""
    # The allocator would reserve 64 MB for every thread.
    ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
    importlib.import_module("torch._dynamo")  # which the first optimiser imports, with libraries of some hundred MB
    limit = psutil.Process().memory_info().vms + spare
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train_run(out, cache, options)
    return printed.getvalue()


def train_in_little_memory(out: Path, cache: Path, options: TrainOptions, group: Path, limit: int) -> tuple[str, int]:
    """As `wmtrain` in a new control group; returns its output and the peak memory of the group."""
    first = "memory" in group.parts
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(limit))
        (group / "cgroup.procs").write_text(str(os.getpid()))
    except OSError as error:
        raise NotAllowedError(f"memory control groups are not available: {error}") from error
    for shard in (cache / "tokens").glob("c.*"):  # a page counts for the group that reads it first
        with shard.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train_run(out, cache, options)
    return printed.getvalue(), int((group / ("memory.max_usage_in_bytes" if first else "memory.peak")).read_text())


def new_control_group() -> Path:
    names = {line.split(":")[1]: line.split(":")[2] for line in Path("/proc/self/cgroup").read_text().splitlines()}
    root = Path("/sys/fs/cgroup/memory" if "memory" in names else "/sys/fs/cgroup")
    return root / names.get("memory", names.get("", "/")).lstrip("/") / f"wmcache-test-{os.getpid()}"


def gather_at_the_limit(path: Path, limit: str) -> None:
    """Open a store, then read it with no spare file descriptor or address space."""
    store = TokenStore.open(path)
    frames = np.arange(0, len(store), store.card.frames_per_shard)
    out = np.zeros((len(frames), *store.card.frame_shape), np.float16)
    if limit == "RLIMIT_NOFILE":
        resource.setrlimit(resource.RLIMIT_NOFILE, (psutil.Process().num_fds() + 1,) * 2)
    else:
        resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 1_000_000,) * 2)
    store.gather(frames, out)
