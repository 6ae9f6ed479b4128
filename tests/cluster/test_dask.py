"""A scheduler and workers on loopback, which are killed while a command uses them."""

from __future__ import annotations

import os
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
    """Processes in folders of their own, with their output beside them; all are killed at the end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, *words: str, cwd: Path | None = None) -> subprocess.Popen[bytes]:
        here = self._folder / str(len(self._processes))
        here.mkdir(parents=True)
        with (here / "output").open("wb") as output:
            process = subprocess.Popen(
                [Path(sys.executable).with_name(words[0]), *words[1:]],
                cwd=cwd or here,
                stdout=output,
                stderr=output,
                env={**os.environ, "OMP_NUM_THREADS": "1", "WMCACHE_HOME": str(here)},
            )
        self._processes.append(process)
        return process

    def lines(self, process: subprocess.Popen[bytes]) -> list[str]:
        text = (self._folder / str(self._processes.index(process)) / "output").read_text()
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

    def wait_for(self, condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            assert process.poll() is None, self.lines(process)
            assert time.monotonic() < end, self.lines(process)
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
    # Relative, since workers have other working directories.
    return ["wmcache", "extract", "--dataset", frames.name, *encoder, "--out", "store.zarr", "--cluster", address]


def tokens(store: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (store / "tokens").glob("c.*")}


def test_a_killed_worker_costs_only_time(site: Site, frames: Path, serial: Path) -> None:
    store = frames.parent / "store.zarr"
    _, address = site.scheduler()
    killed, _ = site.worker(address), site.worker(address)
    command = site.start(*words(frames, address), cwd=frames.parent)
    site.wait_for(lambda: len(tokens(store)) >= 4, process=command)
    killed.kill()
    assert len(tokens(store)) < SHARDS - 4
    assert command.wait(PATIENCE) == 0, site.lines(command)
    found, expected = TokenStore.open(store), TokenStore.open(serial)
    assert found.complete
    assert tokens(store) == tokens(serial)
    assert found.identity == expected.identity
    assert found.mean.tolist() == expected.mean.tolist()


def test_a_killed_scheduler_is_one_line_and_another_one_resumes(site: Site, frames: Path, serial: Path) -> None:
    folder = frames.parent / "again"
    folder.mkdir()
    (folder / frames.name).symlink_to(frames)
    store = folder / "store.zarr"
    scheduler, address = site.scheduler()
    command = site.start(*words(frames, address), cwd=folder)
    start = f"{WORKER_VARIABLES} dask worker {address} --nthreads 2"
    site.wait_for(lambda: any(line.endswith(start) for line in site.lines(command)), process=command)
    site.worker(address)
    site.wait_for(lambda: len(tokens(store)) >= 4, process=command)
    scheduler.kill()
    assert command.wait(PATIENCE) == 1
    others = ("extract random-vit:", "dashboard:", address)
    (error,) = [line for line in site.lines(command) if line and not line.startswith(others)]
    assert error.startswith("Error: ")
    assert address in error
    first = tokens(store)
    assert 4 <= len(first) < SHARDS
    _, address = site.scheduler()
    site.worker(address)
    again = site.start(*words(frames, address), cwd=folder)
    assert again.wait(PATIENCE) == 0, site.lines(again)
    assert TokenStore.open(store).complete
    assert tokens(store) == tokens(serial)
