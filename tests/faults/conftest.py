"""What the tests of faults share: real processes that cost milliseconds, and a way to compare what they leave behind."""

from __future__ import annotations

import multiprocessing
import shutil
import sys
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# What a child process runs has to be importable in it, and test modules are not; a child inherits these folders.
sys.path.insert(0, str(Path(__file__).parent))

import fault_workers
from fault_workers import Child, collect_few, extract_store

from wmcache.cache import Identity, StoreCard, StoreWriter
from wmcache.pipeline.frames import FrameDataset
from wmcache.trainer.options import TrainOptions

PRELOADED = [
    "pytest",
    "torch",
    "torch.utils.tensorboard",
    "wmcache.cache.verify",
    "wmcache.pipeline.collect",
    "wmcache.pipeline.extract",
    "wmcache.pipeline.repair",
    "wmcache.trainer.train",
    "wmcache.cli",
    # What these import at the first call.
    "einops._torch_specific",
    "pyarrow.compute",
    "pydantic.dataclasses",
    "torch._dynamo",
    "wmcache.pipeline.fit",
]

Content = Callable[[Path], dict[str, bytes]]
Start = Callable[..., Child]


@pytest.fixture(scope="session")
def processes() -> ForkServerContext:
    """Starts processes in which everything slow is imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


@pytest.fixture
def start(processes: ForkServerContext) -> Iterator[Start]:
    """(function, *arguments) -> a process that runs a function of `fault_workers`; what is alive at the test's end is killed."""
    children: list[Child] = []

    def run(function: Callable[..., Any], *arguments: Any) -> Child:
        children.append(Child(processes, function, arguments))
        return children[-1]

    yield run
    for child in children:
        child.kill()


@pytest.fixture(scope="session")
def content() -> Content:
    """(folder) -> the bytes of every file in it that holds data; what a dead process may leave behind is none."""

    return fault_workers.content


@pytest.fixture(scope="session")
def few_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 frames in 3 tars, for what is done a hundred times; read only."""
    path = tmp_path_factory.mktemp("few") / "few"
    collect_few(path)
    return path


@pytest.fixture(scope="session")
def few(few_path: Path) -> FrameDataset:
    return FrameDataset.open(few_path)


@pytest.fixture(scope="session")
def few_stores(few_path: Path, tcn_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The undisturbed stores of those frames, by dtype; read only."""
    folder = tmp_path_factory.mktemp("few-stores")
    stores = {dtype: folder / f"{dtype}.zarr" for dtype in ("float16", "int8")}
    for dtype, path in stores.items():
        extract_store(path, few_path, tcn_weights, dtype)
    return stores


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
        checkpoint_every=2,
    )


@pytest.fixture(scope="session")
def big_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """5 600 frames of 75 kB with made-up tokens, 420 MB: more than what tests of small memories leave; read only."""
    rng = np.random.default_rng(0)
    episodes, length = 56, 100
    card = StoreCard({}, {}, (4, 4), 2344, frames=episodes * length, frames_per_shard=128)
    identity = Identity("made-up", "file", "0", "norm", "patch", 8, "none", ((0.5,), (0.5,)), "float32", "float16", "0")
    steps = {
        "action": rng.uniform(-1, 1, (card.frames, 2)).astype(np.float32),
        "state": rng.normal(size=(card.frames, 4)),
        "episode": np.repeat(np.arange(episodes, dtype=np.int32), length),
        "step": np.tile(np.arange(length, dtype=np.int32), episodes),
    }
    writer = StoreWriter.create(tmp_path_factory.mktemp("big") / "big.zarr", card, identity, steps)
    tokens = rng.normal(size=(card.frames_per_shard, *card.frame_shape)).astype(np.float16)
    for shard in writer.pending():
        # Another number in each frame, so that none can be taken for another.
        tokens[:, 0, 0] = np.arange(card.frames_per_shard)
        tokens[:, 0, 1] = shard
        writer.write_shard(shard, tokens[: len(card.shard_frames(shard))])
    writer.finish()
    yield writer.path
    shutil.rmtree(writer.path)
