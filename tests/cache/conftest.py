"""Small stores with random tokens: the cache does not depend on any encoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from upath import UPath

from wmcache.cache import Identity, StoreCard, StoreWriter
from wmcache.common.paths import AnyPath, as_path, is_local, remove, upload

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
CARD = StoreCard(
    encoder={"name": "made-up"},
    dataset={"name": "made-up"},
    token_grid=(2, 3),
    token_dim=4,
    frames=50,
    frames_per_shard=16,
)

MakeWriter = Callable[..., StoreWriter]


@pytest.fixture(scope="session")
def identity() -> Identity:
    return IDENTITY


@pytest.fixture(scope="session")
def card() -> StoreCard:
    """50 frames of [6, 4] in shards of 16."""
    return CARD


@pytest.fixture(scope="session")
def tokens() -> NDArray[np.float16]:
    """50 frames [6, 4]. Some frames and one shard are zeros, which zarr would not write by default."""
    tokens = np.random.default_rng(0).normal(3, 2, (CARD.frames, 6, 4)).astype(np.float16)
    tokens[[0, 7, 49]] = 0
    tokens[32:48] = 0
    return tokens


@pytest.fixture(scope="session")
def steps() -> dict[str, NDArray[Any]]:
    """Two episodes, 20 and 30 frames long."""
    rng = np.random.default_rng(1)
    lengths = (20, 30)
    return {
        "action": rng.uniform(-1, 1, (CARD.frames, 2)).astype(np.float32),
        "state": rng.normal(size=(CARD.frames, 4)),
        "episode": np.repeat(np.arange(2, dtype=np.int32), lengths),
        "step": np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
    }


@pytest.fixture(scope="session")
def make_writer(steps: dict[str, NDArray[Any]]) -> MakeWriter:
    """(path, identity, **changes of the card): a writer of a store of 4 shards."""

    def make(path: AnyPath, identity: Identity = IDENTITY, **changes: Any) -> StoreWriter:
        card = dataclasses.replace(CARD, **changes)
        identity = dataclasses.replace(identity, store_dtype=card.dtype)
        return StoreWriter.create(path, card, identity, steps)

    return make


@pytest.fixture(scope="session")
def write(tokens: NDArray[np.float16]) -> Callable[..., None]:
    """(writer, shards): write these shards; (writer): write those that are pending, and finish the store."""

    def write(writer: StoreWriter, shards: Iterable[int] | None = None) -> None:
        for shard in writer.pending() if shards is None else shards:
            rows = writer.card.shard_frames(shard)
            with writer.claim(shard) as claimed:
                assert claimed
                writer.write_shard(shard, tokens[rows.start : rows.stop])
        if shards is None:
            writer.finish()

    return write


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, bytes]]:
    """(path): the files in a folder, with their content."""

    def contents(path: Path) -> dict[str, bytes]:
        return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}

    return contents


@pytest.fixture
def finished(tmp_path: Path, make_writer: MakeWriter, write: Callable[..., None]) -> Path:
    """A finished store that the test may damage."""
    writer = make_writer(tmp_path / "made-up.zarr")
    write(writer)
    return tmp_path / "made-up.zarr"


@pytest.fixture
def bucket() -> Iterator[UPath]:
    """An empty bucket of an object store in this process."""
    found = as_path("memory://bucket")
    assert not is_local(found)
    remove(found)
    yield found
    remove(found)


@pytest.fixture
def far(bucket: UPath, finished: Path) -> UPath:
    """The finished store as objects."""
    assert upload(finished, bucket / "made-up.zarr", last="zarr.json")
    return bucket / "made-up.zarr"
