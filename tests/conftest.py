"""Fixtures that all tests share: a small dataset, encoder, stores and runs, made once per session by the real functions."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from upath import UPath

from wmcache.cache import Identity, StoreCard, StoreWriter, TokenStore
from wmcache.cache.windows import split_episodes
from wmcache.common.paths import AnyPath, as_path, remove, upload
from wmcache.pipeline import encoders
from wmcache.pipeline.collect import collect
from wmcache.pipeline.derive import derive_change_maps
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.encoders.tcn import TcnOptions
from wmcache.pipeline.extract import extract
from wmcache.pipeline.fit import fit
from wmcache.pipeline.frames import FrameDataset
from wmcache.planner.context import EvalContext
from wmcache.planner.options import PlanOptions
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.train import train

# `make test` tries the same examples every time; `make test-long` searches for others.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("search", max_examples=1000, deadline=None)
settings.load_profile("repeatable")
# A shell that starts the tests in the background lets them and their child processes ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
# With several threads these tiny networks are ten times slower as soon as another program runs.
torch.set_num_threads(1)
NOBODY = 65534


@pytest.fixture(scope="module", autouse=True)
def _restore_the_process() -> Iterator[None]:
    """Commands that run in this process set handlers and threads."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    torch.set_num_threads(1)
    for number, handler in handlers.items():
        signal.signal(number, handler)


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
    """() -> a block in which this process does not have the rights of root."""
    return _as_another_user


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """An empty folder that any user can read, unlike `tmp_path`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        path.chmod(0o755)
        yield path
        for inside in (path, *path.rglob("*")):
            if inside.is_dir() and not inside.is_symlink():
                inside.chmod(0o755)


@pytest.fixture(scope="session")
def user_package() -> Iterator[str]:
    """The name of a package with environments, which can be imported here and in other processes."""
    folder = str(Path(__file__).parent / "package")
    before = os.environ.get("PYTHONPATH")
    sys.path.insert(0, folder)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, before]))
    yield "dots_package"
    sys.path.remove(folder)
    os.environ["PYTHONPATH"] = before or ""


@pytest.fixture(scope="session")
def dataset_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 episodes of 60 frames in 6 tars; read only, so copy it to change it."""
    path = tmp_path_factory.mktemp("data") / "pointmaze-umaze"
    # Shards and episodes have different bounds, and the last shard is short.
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
    """The same store with change maps of frames 5 env steps apart; read only."""
    path = copytree(store_path, tmp_path_factory.mktemp("ddp-stores") / store_path.name)
    derive_change_maps(TokenStore.open(path), 5)
    return path


TrainRun = Callable[..., Path]


def episodes_of(lengths: Sequence[int]) -> dict[str, Any]:
    """Return the step columns of episodes of these lengths that contain no numbers of the env."""
    return {
        "episode": np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
        "step": np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
    }


IDENTITY = Identity(
    encoder="made-up",
    weights_source="file",
    weights_sha256="ab" * 32,
    layer="norm",
    token_selection="patch",
    image_size=64,
    resize="bilinear antialias 64",
    normalisation=((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    compute_dtype="float32",
    store_dtype="float16",
    dataset_fingerprint="cd" * 32,
)
# 50 frames of [6, 4] in shards of 16.
CARD = StoreCard({"name": "made-up"}, {"name": "made-up"}, (2, 3), 4, frames=50, frames_per_shard=16)
TOKENS = np.random.default_rng(0).normal(3, 2, (CARD.frames, 6, 4)).astype(np.float16)
# Some frames and one shard are zeros, which zarr would not write by default.
TOKENS[[0, 7, 49]] = 0
TOKENS[32:48] = 0
TOKENS.flags.writeable = False
# Two episodes, 20 and 30 frames long.
STEPS = {
    "action": np.random.default_rng(1).uniform(-1, 1, (CARD.frames, 2)).astype(np.float32),
    "state": np.random.default_rng(2).normal(size=(CARD.frames, 4)),
    **episodes_of((20, 30)),
}


def make_writer(path: AnyPath, identity: Identity = IDENTITY, **changes: Any) -> StoreWriter:
    """Start a store of 4 shards, with these changes of its card."""
    card = dataclasses.replace(CARD, **changes)
    return StoreWriter.create(path, card, dataclasses.replace(identity, store_dtype=card.dtype), STEPS)


def write(writer: StoreWriter, shards: Iterable[int] | None = None) -> None:
    """Write these shards; or those that are pending, and finish the store."""
    for shard in writer.pending() if shards is None else shards:
        rows = writer.card.shard_frames(shard)
        with writer.claim(shard) as claimed:
            assert claimed
            writer.write_shard(shard, TOKENS[rows.start : rows.stop])
    if shards is None:
        writer.finish()


def columns_of(store: TokenStore, rows: Any = slice(None)) -> dict[str, Any]:
    """Return the step columns of a store, or these rows of them."""
    return {name: getattr(store, name)[rows] for name in ("action", "state", "episode", "step")}


def write_tokens(path: Path, tokens: Any, card: StoreCard, identity: Identity, columns: dict[str, Any]) -> Path:
    """Write a finished store of tokens [n, N, D]; number and width of the frames are theirs, not the card's."""
    card = dataclasses.replace(card, token_dim=tokens.shape[2], frames=len(tokens))
    writer = StoreWriter.create(path, card, identity, columns)
    for shard in writer.pending():
        rows = card.shard_frames(shard)
        writer.write_shard(shard, tokens[rows.start : rows.stop].astype(np.float16))
    writer.finish()
    return path


def shards_of(store: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (store / "tokens").glob("c.*")}


def times(path: Path) -> dict[Path, tuple[int, int]]:
    return {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in path.rglob("*") if file.is_file()}


def flip(file: Path, *offsets: int) -> None:
    data = bytearray(file.read_bytes())
    for offset in offsets:
        data[offset] ^= 1
    file.write_bytes(data)


def contents(path: Path) -> dict[str, bytes]:
    """Return the files in a folder, with their content."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A finished store, to be damaged."""
    writer = make_writer(tmp_path / "made-up.zarr")
    write(writer)
    return tmp_path / "made-up.zarr"


@pytest.fixture
def bucket() -> Iterator[UPath]:
    """An empty bucket of an object store in this process."""
    there = as_path("memory://bucket")
    assert isinstance(there, UPath)
    remove(there)
    yield there
    remove(there)


@pytest.fixture
def far(bucket: UPath, finished: Path) -> UPath:
    """The finished store in that bucket."""
    assert upload(finished, bucket / "made-up.zarr", last="zarr.json")
    return bucket / "made-up.zarr"


@pytest.fixture(scope="session")
def tiny() -> TrainOptions:
    return TrainOptions(
        model_options={"width": 16, "depth": 1, "heads": 2, "dropout": 0.1},
        steps=8,
        batch=8,
        dtype="float32",
        device="cpu",
        log_every=1,
        validate_every=8,
        checkpoint_every=4,
    )


@pytest.fixture(scope="session")
def planted_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose latents are a linear map of a linear system: 20 episodes of 40 frames, 2 tokens of 3 dimensions."""
    return plant(tmp_path_factory.mktemp("planted") / "planted-8.zarr", tokens=2)


@pytest.fixture(scope="session")
def lone_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with 1 token of 6 dimensions."""
    return plant(tmp_path_factory.mktemp("lone") / "lone-8.zarr", tokens=1)


@pytest.fixture(scope="session")
def uneven_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same frames cut into a train episode of 420 frames and 19 of 20."""
    lengths = [20] * 20
    lengths[int(split_episodes(20, "train", TrainOptions().split_seed)[0])] = 420
    return plant(tmp_path_factory.mktemp("uneven") / "uneven-8.zarr", 2, lengths)


@pytest.fixture(scope="session")
def still_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same actions and states; the latents of all frames are equal."""
    return plant(tmp_path_factory.mktemp("still") / "still-8.zarr", tokens=2, still=True)


def plant(path: Path, tokens: int, lengths: Sequence[int] = (40,) * 20, *, still: bool = False) -> Path:
    """Write such a store; other lengths cut the same frames elsewhere, so that dynamics jump within episodes."""
    episodes, length = 20, 40
    rng = np.random.default_rng(0)
    action = rng.uniform(-1, 1, (episodes, length, 2)).astype(np.float32)
    state = np.zeros((episodes, length, 4))
    state[:, 0] = rng.normal(size=(episodes, 4))
    for t in range(length - 1):
        state[:, t + 1, 2:] = 0.9 * state[:, t, 2:] + 0.3 * action[:, t]
        state[:, t + 1, :2] = state[:, t, :2] + 0.3 * state[:, t + 1, 2:]
    latents = (state @ rng.normal(size=(4, 6)) + rng.normal(size=6)).reshape(-1, tokens, 6 // tokens).astype(np.float16)
    if still:
        latents[:] = latents[0]
    identity = Identity("planted", "file", "0", "norm", "patch", 8, "none", ((0.5,), (0.5,)), "float32", "float16", "0")
    card = StoreCard({}, {}, (1, tokens), 6 // tokens, frames=len(latents), frames_per_shard=len(latents))
    steps = {
        "action": action.reshape(-1, 2),
        "state": state.reshape(-1, 4),
        **episodes_of(lengths),
    }
    return write_tokens(path, latents, card, identity, steps)


@pytest.fixture(scope="session")
def train_run(tmp_path_factory: pytest.TempPathFactory) -> TrainRun:
    """(store, options of the model) -> a run."""

    def train_tiny(store: Path, **model: Any) -> Path:
        sizes = {"width": 16, "depth": 1, "heads": 2, "dropout": 0.0, **model}
        options = TrainOptions(
            model_options=sizes, steps=30, batch=8, learning_rate=3e-3, dtype="float32", device="cpu", log_every=5
        )
        path = tmp_path_factory.mktemp("runs") / "umaze-tcn"
        train(store, path, options)
        return path

    return train_tiny


@pytest.fixture(scope="session")
def run_path(store_path: Path, train_run: TrainRun) -> Path:
    """Read only, so copy it to change it."""
    return train_run(store_path)


@pytest.fixture(scope="session")
def tiny_plan() -> PlanOptions:
    # The budget is not a multiple of a chunk of 5 env steps.
    search = {"samples": 8, "elites": 3, "iterations": 2}
    return PlanOptions(episodes=3, budget=12, horizon=2, search=search, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def context(run_path: Path, tiny_plan: PlanOptions) -> EvalContext:
    return EvalContext(run_path, tiny_plan)


@pytest.fixture(scope="session")
def train_ddp(ddp_store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainRun:
    """(steps of each stage, options of the model) -> a run of DDP-WM, with a checkpoint after each stage."""

    def train_tiny(steps: int, **model: Any) -> Path:
        sizes = {"width": 16, "depth": 1, "heads": 2, "dropout": 0.0}
        sizes |= {"locator_width": 12, "locator_depth": 1, "locator_mlp": 16}
        path = tmp_path_factory.mktemp("ddp") / "ddp"
        options = TrainOptions(
            model="ddp-wm",
            model_options={**sizes, **model},
            steps=steps,
            batch=8,
            learning_rate=3e-3,
            dtype="float32",
            device="cpu",
            log_every=5,
            checkpoint_every=steps,
        )
        train(ddp_store_path, path, options)
        return path

    return train_tiny


@pytest.fixture(scope="session")
def ddp_run(train_ddp: TrainRun) -> Path:
    """Read only, so copy it to change it."""
    return train_ddp(steps=20)


@pytest.fixture
def run_until(ddp_run: Path, tmp_path: Path) -> Callable[[int], Path]:
    """(number of a stage) -> a copy of the run that ends with it."""

    def cut(stage: int) -> Path:
        run = copytree(ddp_run, tmp_path / f"stage-{stage}", symlinks=True)
        for later in sorted((run / "checkpoints").glob("step-*"))[stage:]:
            rmtree(later)
        (run / "checkpoints" / "last").unlink()
        return run

    return cut
