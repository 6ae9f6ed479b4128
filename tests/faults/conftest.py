"""Fixtures of the fault suite: processes that start in milliseconds, and small samples with their undisturbed stores."""

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

# Child processes import what they run from here; they inherit this path.
sys.path.insert(0, str(Path(__file__).parent))

from damage_tools import AT_ONCE, FRAMES, PER_SHARD, ROOM, Copy, is_refusal, with_little_memory
from fault_workers import Child, Sample, collect_few

from wmcache.cache import StoreCard, StoreWriter
from wmcache.pipeline.collect import collect
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.train import train

from ..conftest import IDENTITY, episodes_of

PRELOADED = [
    "pytest",
    "torch",
    "torch.utils.tensorboard",
    "wmcache.cache.verify",
    "wmcache.pipeline.collect",
    "wmcache.pipeline.extract",
    "wmcache.pipeline.fit",
    "wmcache.pipeline.repair",
    "wmcache.trainer.train",
    "wmcache.cli",
    # Imported by these at their first call.
    "einops._torch_specific",
    "pyarrow.compute",
    "pydantic.dataclasses",
    "torch._dynamo",
]

Start = Callable[..., Child]


@pytest.fixture(scope="session")
def processes() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


@pytest.fixture
def start(processes: ForkServerContext) -> Iterator[Start]:
    """(function, *arguments) -> a process that runs a function of `fault_workers`; it is killed at the end of the test."""
    children: list[Child] = []

    def run(function: Callable[..., Any], *arguments: Any) -> Child:
        children.append(Child(processes, function, arguments))
        return children[-1]

    yield run
    for child in children:
        child.kill()


def make_sample(dataset: Path, weights: Path) -> Sample:
    sample = Sample(dataset, weights, {dtype: dataset.with_name(f"{dtype}.zarr") for dtype in ("float16", "int8")})
    for dtype, path in sample.stores.items():
        sample.extract(path, dtype)
    return sample


@pytest.fixture(scope="session")
def few(tcn_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """24 frames in 3 tars, for tests that do everything a hundred times; read only."""
    path = tmp_path_factory.mktemp("few") / "few"
    collect_few(path)
    return make_sample(path, tcn_weights)


@pytest.fixture(scope="session")
def small(tcn_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """22 frames in 6 tars, the last one short; read only."""
    path = tmp_path_factory.mktemp("small") / "small"
    collect("UMaze", path, episodes=1, length=FRAMES, image_size=16, frames_per_shard=PER_SHARD, cluster="local:1")
    return make_sample(path, tcn_weights)


@pytest.fixture(scope="session")
def big_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """5 600 frames of 75 kB with generated tokens, 420 MB: more than the memory limits leave; read only."""
    rng = np.random.default_rng(0)
    episodes, length = 56, 100
    card = StoreCard({}, {}, (4, 4), 2344, frames=episodes * length, frames_per_shard=128)
    steps = {
        "action": rng.uniform(-1, 1, (card.frames, 2)).astype(np.float32),
        "state": rng.normal(size=(card.frames, 4)),
        **episodes_of([length] * episodes),
    }
    writer = StoreWriter.create(tmp_path_factory.mktemp("big") / "big.zarr", card, IDENTITY, steps)
    tokens = rng.normal(size=(card.frames_per_shard, *card.frame_shape)).astype(np.float16)
    for shard in writer.pending():
        writer.write_shard(shard, tokens[: len(card.shard_frames(shard))])
    writer.finish()
    yield writer.path
    shutil.rmtree(writer.path)


@pytest.fixture
def dtype() -> str:
    """The dtype of the store that a test damages, unless the test is parametrised."""
    return "float16"


@pytest.fixture
def copy(small: Sample, dtype: str, tmp_path: Path) -> Copy:
    path = Path(shutil.copytree(small.stores[dtype], tmp_path / "in" / "copy.zarr"))
    return Copy(small, small.stores[dtype], path, dtype)


@pytest.fixture(scope="session")
def orphaned(small: Sample, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("orphan")
    dataset = Path(shutil.copytree(small.dataset, root / "small"))
    weights = Path(shutil.copy(small.weights, root / "tcn.safetensors"))
    Sample(dataset, weights, {}).extract(root / "orphan.zarr")
    shutil.rmtree(dataset)
    weights.unlink()
    return root / "orphan.zarr"


@pytest.fixture
def orphan(small: Sample, orphaned: Path, tmp_path: Path) -> Copy:
    return Copy(small, orphaned, Path(shutil.copytree(orphaned, tmp_path / "orphan.zarr")))


# Hostile files are read by a child process with limited memory and time.


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A folder that hostile code would make; the test fails if it exists at the end."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


@pytest.fixture
def outcome(start: Start, small: Sample, tmp_path: Path) -> Callable[..., tuple[str, Any]]:
    """(function, *arguments) -> outcome and error of the call, which takes bounded memory and time and makes no file."""

    def call(function: Callable[..., Any], *arguments: Any, room: int = ROOM) -> tuple[str, Any]:
        before = sorted(tmp_path.rglob("*"))
        kind, line = start(with_little_memory, small, room, function, *arguments).outcome(AT_ONCE)
        assert kind in ("returned", "refused"), f"{kind}: {line}"
        assert sorted(tmp_path.rglob("*")) == before
        assert kind == "returned" or is_refusal(line), line
        return kind, line

    return call


@pytest.fixture
def refused(outcome: Callable[..., tuple[str, Any]]) -> Callable[..., str]:
    """(function, *arguments) -> the one line of the call's error."""

    def call(function: Callable[..., Any], *arguments: Any, room: int = ROOM) -> str:
        kind, line = outcome(function, *arguments, room=room)
        assert kind == "refused"
        return line

    return call


@pytest.fixture(scope="session")
def trained(store_path: Path, tmp_path_factory: pytest.TempPathFactory, tiny: TrainOptions) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    train(store_path, run, tiny)
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "in" / "run", symlinks=True))
