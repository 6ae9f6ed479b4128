"""A real scheduler and real workers on loopback, some of which die while a command uses them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from wmcache.cache import TokenStore
from wmcache.cluster.dask import WORKER_VARIABLES
from wmcache.pipeline import encoders
from wmcache.pipeline.collect import collect
from wmcache.pipeline.extract import extract
from wmcache.pipeline.frames import FrameDataset

pytestmark = pytest.mark.cluster

PATIENCE = 120.0
SHARDS = 40


class Site:
    """Processes, each in a folder of its own with what it says beside it; those that live at the end are killed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, *words: str, cwd: Path | None = None) -> subprocess.Popen[bytes]:
        here = self._folder / str(len(self._processes))
        here.mkdir(parents=True)
        with (here / "said").open("wb") as said:
            process = subprocess.Popen(
                [Path(sys.executable).with_name(words[0]), *words[1:]],
                cwd=cwd or here,
                stdout=said,
                stderr=said,
                env={**os.environ, "OMP_NUM_THREADS": "1", "WMCACHE_HOME": str(here)},
            )
        self._processes.append(process)
        return process

    def said(self, process: subprocess.Popen[bytes]) -> list[str]:
        text = (self._folder / str(self._processes.index(process)) / "said").read_text()
        return text.replace("\r", "\n").splitlines()

    def scheduler(self) -> tuple[subprocess.Popen[bytes], str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        return self.start(
            "dask", "scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard"
        ), f"tcp://127.0.0.1:{port}"

    def worker(self, address: str) -> subprocess.Popen[bytes]:
        # Without a nanny, which would start another one.
        return self.start("dask", "worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard")

    def wait_for(self, condition: Callable[[], bool], alive: subprocess.Popen[bytes]) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            assert alive.poll() is None, self.said(alive)
            assert time.monotonic() < end, self.said(alive)
            time.sleep(0.01)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path / "site")
    yield site
    site.close()


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("many") / "frames"
    collect("UMaze", path, episodes=3, length=80, image_size=32, frames_per_shard=6)
    return path


@pytest.fixture(scope="module")
def serial(frames: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("serial") / "serial.zarr"
    dataset = FrameDataset.open(frames)
    assert len(dataset.card.shards) == SHARDS
    extract(dataset, encoders.create("random-vit", image_size=64, dtype="float32", device="cpu"), path)
    return path


def words(frames: Path, address: str) -> list[str]:
    encoder = ["--encoder", "random-vit", "--image-size", "64", "--dtype", "float32", "--device", "cpu"]
    # Relative paths: workers have other working directories.
    return ["wmcache", "extract", "--dataset", frames.name, *encoder, "--out", "store.zarr", "--cluster", address]


def done(store: Path) -> int:
    """How many shards have been written."""
    return len(list((store / "tokens").glob("c.*")))


def tokens(store: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (store / "tokens").glob("c.*")}


def test_a_worker_that_is_killed_costs_no_more_than_time(site: Site, frames: Path, serial: Path) -> None:
    store = frames.parent / "store.zarr"
    _, address = site.scheduler()
    killed, _ = site.worker(address), site.worker(address)
    command = site.start(*words(frames, address), cwd=frames.parent)
    site.wait_for(lambda: done(store) >= 4, alive=command)
    killed.send_signal(signal.SIGKILL)
    assert done(store) < SHARDS - 4
    assert command.wait(PATIENCE) == 0, site.said(command)
    ours, known = TokenStore.open(store), TokenStore.open(serial)
    assert ours.complete
    assert tokens(store) == tokens(serial)
    assert ours.identity == known.identity
    assert ours.mean.tolist() == known.mean.tolist()


def test_a_scheduler_that_dies_is_one_line_and_another_one_goes_on(site: Site, frames: Path, serial: Path) -> None:
    folder = frames.parent / "again"
    folder.mkdir()
    (folder / frames.name).symlink_to(frames)
    store = folder / "store.zarr"
    scheduler, address = site.scheduler()
    command = site.start(*words(frames, address), cwd=folder)
    # So that it can be seen to wait.
    site.wait_for(lambda: any("no workers yet" in line for line in site.said(command)), alive=command)
    assert f"start some with: {WORKER_VARIABLES} dask worker {address} --nthreads 2" in "\n".join(site.said(command))
    site.worker(address)
    site.wait_for(lambda: done(store) >= 4, alive=command)
    scheduler.send_signal(signal.SIGKILL)
    assert command.wait(PATIENCE) == 1
    others = ("extract random-vit:", "dashboard:", address)
    (error,) = [line for line in site.said(command) if line and not line.startswith(others)]
    assert error == (
        f"Error: the scheduler of {address} has gone; start it again, or another one, then run the same command again, which goes on"
    )
    first = tokens(store)
    assert 4 <= len(first) < SHARDS
    _, address = site.scheduler()
    site.worker(address)
    again = site.start(*words(frames, address), cwd=folder)
    assert again.wait(PATIENCE) == 0, site.said(again)
    assert TokenStore.open(store).complete
    assert tokens(store) == tokens(serial)
