"""Repairs. Damage of all kinds is in tests/faults, moved frames and weights in tests/commands."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from wmcache.cache import TokenStore
from wmcache.cache.layout import read_attributes, shard_file, write_attributes
from wmcache.cache.records import block_file, record_file
from wmcache.common.errors import UserError
from wmcache.pipeline.collect import collect
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.extract import extract
from wmcache.pipeline.frames import FrameDataset
from wmcache.pipeline.repair import live_encoder, repair, verify_deep

from ..conftest import contents, flip, times


@pytest.fixture
def path(store_path: Path, tmp_path: Path) -> Path:
    """A copy of the store of 6 shards, to damage; its frames and weights are at their recorded paths."""
    return Path(shutil.copytree(store_path, tmp_path / "tcn-64.zarr"))


@pytest.fixture(scope="module")
def others(tcn_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Another dataset and other weights, by the name of their option."""
    folder = tmp_path_factory.mktemp("other")
    collect("UMaze", folder / "other", episodes=1, length=4, image_size=32, frames_per_shard=4, cluster="local:1")
    values = load_file(tcn_weights)
    save_file({**values, "head.1.bias": values["head.1.bias"] + 0.5}, folder / "other.safetensors")
    return {"dataset": folder / "other", "weights": folder / "other.safetensors"}


@pytest.mark.parametrize("lost", [(), (1, 4)])
def test_an_unfinished_store_is_finished(path: Path, store_path: Path, lost: tuple[int]) -> None:
    attributes = read_attributes(path)
    for name in ("mean", "std"):
        del attributes[name]
    write_attributes(path, {**attributes, "complete": False})
    for shard in lost:
        record_file(path, shard).unlink()
        shard_file(path, shard).unlink()
    when = times(path / "tokens")
    found = repair(path, device="cpu")
    assert (found.complete, found.shards_done, found.faults) == (False, 6 - len(lost), [])
    assert contents(path) == contents(store_path)
    assert {file: times(path / "tokens")[file] for file in when} == when
    when = times(path / "tokens")
    assert repair(path, device="cpu").sound
    assert times(path / "tokens") == when


@pytest.mark.parametrize("call", [repair, verify_deep, live_encoder])
@pytest.mark.parametrize(("other", "field"), [("dataset", "dataset_fingerprint"), ("weights", "weights_sha256")])
def test_other_frames_and_weights_are_refused_before_anything_is_changed(
    path: Path, others: dict[str, Path], call: Callable[..., object], other: str, field: str
) -> None:
    if call is repair:
        flip(shard_file(path, 2), 5)
    before, when = contents(path), times(path / "tokens")
    with pytest.raises(UserError, match=f"{field}: .*--{other}"):
        call(path, **{other: others[other]}, device="cpu")
    assert contents(path) == before
    assert times(path / "tokens") == when


def test_the_live_encoder_encodes_decoded_frames_of_the_store(
    copied: Path, encoder: Encoder, store: TokenStore, tmp_path: Path
) -> None:
    extract(FrameDataset.open(copied), encoder, tmp_path / "some.zarr")
    encode = live_encoder(tmp_path / "some.zarr", device="cpu")
    shutil.rmtree(copied)
    for count in (1, 100):
        found = encode(count)
        assert (found.dtype, tuple(found.shape)) == (torch.float16, (count, *store.card.frame_shape))
        # Another batch size rounds differently in the last bits.
        np.testing.assert_allclose(found.numpy(), store.gather(np.arange(count) % 64), atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_shard_is_encoded_again_and_a_block_written_again(
    dataset: FrameDataset,
    encoder: Encoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
) -> None:
    monkeypatch.setattr("wmcache.cache.records.IN_A_BLOCK", 4)
    monkeypatch.setattr("wmcache.cache.verify.IN_A_BLOCK", 4)
    path = tmp_path / "folded.zarr"
    extract(dataset, encoder, path, dtype=dtype)
    names = sorted(file.name for file in (path / "tokens" / "commits").iterdir())
    assert names == ["000004.json", "000005.json", "block-000000.safetensors"]
    before = contents(path)
    for damage, faulty in ((lambda: flip(shard_file(path, 2), 400), [2]), (block_file(path, 0).unlink, [0, 1, 2, 3])):
        when = times(path / "tokens")
        damage()
        assert [fault.shard for fault in repair(path, device="cpu").faults] == faulty
        assert contents(path) == before
        # A block of float16 tokens is made from the tokens that are there.
        again = set() if faulty != [2] and dtype == "float16" else set(faulty)
        for file in (shard_file(path, shard) for shard in set(range(6)) - again):
            assert times(path / "tokens")[file] == when[file]
