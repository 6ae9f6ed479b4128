"""A scheduler and workers on loopback, which are killed while a command uses them."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from wmcache.cache import TokenStore
from wmcache.cluster.dask import WORKER_VARIABLES
from wmcache.pipeline import encoders
from wmcache.pipeline.collect import collect
from wmcache.pipeline.extract import extract
from wmcache.pipeline.frames import FrameDataset

from ..conftest import shards_of
from .conftest import Running

pytestmark = pytest.mark.cluster

SHARDS = 40
Launch = Callable[..., Running]


def start_scheduler(launch: Launch) -> tuple[Running, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = ["dask", "scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard"]
    return launch(words), f"tcp://127.0.0.1:{port}"


def start_worker(launch: Launch, address: str) -> Running:
    # Without a nanny, which would start another one.
    return launch(["dask", "worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard"])


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


def test_a_killed_worker_costs_only_time(launch: Launch, frames: Path, serial: Path) -> None:
    store = frames.parent / "store.zarr"
    _, address = start_scheduler(launch)
    killed, _ = start_worker(launch, address), start_worker(launch, address)
    command = launch(words(frames, address), cwd=frames.parent)
    command.wait_for(lambda: len(shards_of(store)) >= 4)
    killed.kill()
    assert len(shards_of(store)) < SHARDS - 4
    assert command.wait() == 0, command.lines
    found, expected = TokenStore.open(store), TokenStore.open(serial)
    assert found.complete
    assert shards_of(store) == shards_of(serial)
    assert found.identity == expected.identity
    assert found.mean.tolist() == expected.mean.tolist()


def test_a_killed_scheduler_is_one_line_and_another_one_resumes(launch: Launch, frames: Path, serial: Path) -> None:
    folder = frames.parent / "again"
    folder.mkdir()
    (folder / frames.name).symlink_to(frames)
    store = folder / "store.zarr"
    scheduler, address = start_scheduler(launch)
    command = launch(words(frames, address), cwd=folder)
    start = f"{WORKER_VARIABLES} dask worker {address} --nthreads 2"
    command.wait_for(lambda: any(line.endswith(start) for line in command.lines))
    start_worker(launch, address)
    command.wait_for(lambda: len(shards_of(store)) >= 4)
    scheduler.kill()
    assert command.wait() == 1
    (error,) = [line for line in command.lines if not line.startswith(("extract random-vit:", "dashboard:", address))]
    assert error.startswith("Error: ")
    assert address in error
    assert 4 <= len(shards_of(store)) < SHARDS
    _, address = start_scheduler(launch)
    start_worker(launch, address)
    again = launch(words(frames, address), cwd=folder)
    assert again.wait() == 0, again.lines
    assert TokenStore.open(store).complete
    assert shards_of(store) == shards_of(serial)
