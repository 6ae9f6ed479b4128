"""Small stores with made-up tokens: what the cache does must not depend on any encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from upath import UPath

from wmcache.cache import Identity, StoreCard, StoreWriter
from wmcache.common.paths import as_path, remove, upload

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
def tokens() -> NDArray[np.float16]:
    """50 frames; zarr skips chunks that equal its fill value, so frames of zeros and a whole shard of them are among these."""
    tokens = np.random.default_rng(0).normal(3, 2, (CARD.frames, 6, 4)).astype(np.float16)
    tokens[[0, 7, 49]] = 0
    tokens[32:48] = 0
    return tokens


@pytest.fixture(scope="session")
def make_writer() -> MakeWriter:
    """(path, identity=…) -> writer of a store of 2 episodes, 20 and 30 frames long, in 4 shards."""

    def make(path: Path, identity: Identity = IDENTITY) -> StoreWriter:
        rng = np.random.default_rng(1)
        lengths = (20, 30)
        steps = {
            "action": rng.uniform(-1, 1, (CARD.frames, 2)).astype(np.float32),
            "state": rng.normal(size=(CARD.frames, 4)),
            "episode": np.repeat(np.arange(2, dtype=np.int32), lengths),
            "step": np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
        }
        return StoreWriter.create(path, CARD, identity, steps)

    return make


@pytest.fixture
def finished(tmp_path: Path, make_writer: MakeWriter, tokens: NDArray[np.float16]) -> Path:
    """A finished store of one's own, to be damaged at will."""
    writer = make_writer(tmp_path / "made-up.zarr")
    for shard in writer.pending():
        frames = CARD.shard_frames(shard)
        writer.write_shard(shard, tokens[frames.start : frames.stop])
    writer.finish()
    return writer.path


@pytest.fixture
def bucket() -> Iterator[UPath]:
    """Of an object store in this process; empty, and gone at the end."""
    there = as_path("memory://bucket")
    assert isinstance(there, UPath)
    remove(there)
    yield there
    remove(there)


@pytest.fixture
def far(bucket: UPath, finished: Path) -> UPath:
    """The finished store, as objects."""
    assert upload(finished, bucket / "made-up.zarr", last="zarr.json")
    return bucket / "made-up.zarr"
