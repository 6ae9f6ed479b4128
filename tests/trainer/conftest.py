"""What the tests of the trainer share: tiny settings, and a store whose latents are known to be predictable."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from wmcache.cache import Identity, StoreCard, StoreWriter
from wmcache.cache.windows import split_episodes
from wmcache.trainer.options import TrainOptions

# Test modules import `model_tools` from here.
sys.path.insert(0, str(Path(__file__).parent))


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
    """A store whose latents are a linear picture of a linear system: 20 episodes of 40 frames, 2 tokens of 3 dimensions."""
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
    """Lengths other than those cut the same frames elsewhere, so that dynamics jump within episodes."""
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
        "episode": np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
        "step": np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
    }
    writer = StoreWriter.create(path, card, identity, steps)
    writer.write_shard(0, latents)
    writer.finish()
    return writer.path
