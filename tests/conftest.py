"""A small road from frames to tokens, made once a session by the real commands' functions."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from shutil import copytree

import pytest
import torch
from hypothesis import settings

from wmcache.cache import TokenStore
from wmcache.pipeline import encoders
from wmcache.pipeline.change_maps import derive_change_maps
from wmcache.pipeline.collect import collect
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.encoders.tcn import TcnOptions
from wmcache.pipeline.extract import extract
from wmcache.pipeline.fit import fit
from wmcache.pipeline.frames import FrameDataset

# `make test` tries the same examples every time; `make test-long` looks for others.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("search", max_examples=1000, deadline=None)
settings.load_profile("repeatable")
# A shell that starts the tests in the background has told them, and all that they start, to ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Threads that wait for each other make these tiny networks ten times slower as soon as anything else runs beside the tests.
torch.set_num_threads(1)
NOBODY = 65534


@contextmanager
def _as_another_user() -> Iterator[None]:
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def another_user() -> Callable[[], AbstractContextManager[None]]:
    """() -> a block in which this process has no rights of root; an ordinary user has none anyway."""
    return _as_another_user


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """An empty folder in which any user may look; `tmp_path` is this user's alone."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        path.chmod(0o755)
        yield path
        for inside in (path, *path.rglob("*")):
            if inside.is_dir() and not inside.is_symlink():
                inside.chmod(0o755)


@pytest.fixture(scope="session")
def dataset_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 episodes of 60 frames in 6 tars; read only, so copy it to change it."""
    path = tmp_path_factory.mktemp("data") / "pointmaze-umaze"
    # Shard and episode bounds must not coincide, and the last shard is short.
    collect(
        "wmcache/PointMaze-UMaze-v0", path, episodes=6, length=60, image_size=32, frames_per_shard=64, cluster="local:1"
    )
    return path


@pytest.fixture(scope="session")
def dataset(dataset_path: Path) -> FrameDataset:
    return FrameDataset.open(dataset_path)


@pytest.fixture(scope="session")
def tcn_weights(dataset: FrameDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoders") / "tcn.safetensors"
    return fit(dataset, "tcn", path, TcnOptions(steps=20, batch=16), max_frames=1000, device="cpu").weights


@pytest.fixture(scope="session")
def encoder(tcn_weights: Path) -> Encoder:
    return encoders.create("tcn", weights=tcn_weights, device="cpu")


@pytest.fixture(scope="session")
def store_path(dataset: FrameDataset, encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only, so copy it to change it."""
    path = tmp_path_factory.mktemp("stores") / "tcn-64.zarr"
    extract(dataset, encoder, path)
    return path


@pytest.fixture(scope="session")
def store(store_path: Path) -> TokenStore:
    return TokenStore.open(store_path)


@pytest.fixture(scope="session")
def ddp_store_path(store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same store with change maps beside it, of frames 5 env steps apart; read only as well."""
    path = copytree(store_path, tmp_path_factory.mktemp("ddp-stores") / store_path.name)
    derive_change_maps(TokenStore.open(path), 5)
    return path
