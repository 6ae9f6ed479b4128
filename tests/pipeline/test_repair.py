"""Repairs. More kinds of damage are in tests/faults."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from wmcache.cache import StoreWriter, TokenStore
from wmcache.cache.layout import read_attributes, shard_file, write_attributes
from wmcache.cache.records import block_file, record_file
from wmcache.cache.verify import verify
from wmcache.common.errors import UserError
from wmcache.pipeline.collect import collect
from wmcache.pipeline.encoders import COSINE_TOLERANCE, Encoder
from wmcache.pipeline.extract import extract
from wmcache.pipeline.frames import FrameDataset
from wmcache.pipeline.repair import SAMPLED_FRAMES, live_encoder, repair, verify_deep

Snapshot = Callable[[Path], dict[str, bytes]]
Damage = Callable[[Path], object]
FRAME_BYTES = 4 * 32 * 2 + 4


def times(path: Path) -> dict[Path, tuple[int, int]]:
    """Modification times and inodes of the shards and their records."""
    found = [file for part in ("tokens/c.*", "tokens/commits/*") for file in path.glob(part) if file.is_file()]
    return {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in found}


def flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


@pytest.fixture
def path(store_path: Path, tmp_path: Path) -> Path:
    """A copy of the store of 6 shards, to damage; its frames and weights are in their places."""
    return Path(shutil.copytree(store_path, tmp_path / "tcn-64.zarr"))


@pytest.fixture(scope="module")
def int8_path(dataset: FrameDataset, encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only, so copy it to change it."""
    path = tmp_path_factory.mktemp("int8") / "tcn-64-int8.zarr"
    extract(dataset, encoder, path, dtype="int8")
    return path


@dataclasses.dataclass
class Copies:
    """A store, its frames and its weights, to move or damage."""

    store: Path
    dataset: Path
    weights: Path


@pytest.fixture
def copies(path: Path, copied: Path, tcn_weights: Path, tmp_path: Path) -> Copies:
    weights = Path(shutil.copy(tcn_weights, tmp_path / "tcn.safetensors"))
    attributes = read_attributes(path)
    card = attributes["card"]
    card["dataset"]["path"], card["encoder"]["weights"] = str(copied), str(weights)
    write_attributes(path, attributes)
    return Copies(path, copied, weights)


@pytest.fixture(scope="module")
def other_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("other") / "other"
    collect("UMaze", path, episodes=1, length=4, image_size=32, frames_per_shard=4, cluster="local:1")
    return path


@pytest.fixture(scope="module")
def other_weights(tcn_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("other") / "other.safetensors"
    values = load_file(tcn_weights)
    values["head.1.bias"] = values["head.1.bias"] + 0.5
    save_file(values, path)
    return path


def test_a_whole_store_needs_neither_frames_nor_weights(copies: Copies, all_bytes: Snapshot) -> None:
    shutil.rmtree(copies.dataset)
    copies.weights.unlink()
    before, when = all_bytes(copies.store), {file: file.stat().st_mtime_ns for file in copies.store.rglob("*")}
    assert repair(copies.store, device="cpu").sound
    assert {file: file.stat().st_mtime_ns for file in copies.store.rglob("*")} == when
    write_attributes(copies.store, {**read_attributes(copies.store), "complete": False})
    repair(copies.store, device="cpu")
    assert all_bytes(copies.store) == before


SHARDS: dict[str, Damage] = {
    "flipped": lambda path: flip(shard_file(path, 2), 5 * FRAME_BYTES),
    "missing": lambda path: shard_file(path, 2).unlink(),
    "a folder": lambda path: (shard_file(path, 2).unlink(), shard_file(path, 2).mkdir()),
    "another shard's": lambda path: shutil.copy(shard_file(path, 1), shard_file(path, 2)),
}


@pytest.mark.parametrize("damage", SHARDS)
def test_only_the_damaged_shard_is_encoded_again(
    path: Path, store_path: Path, all_bytes: Snapshot, damage: str
) -> None:
    SHARDS[damage](path)
    when = times(path)
    found = repair(path, device="cpu")
    assert (found.complete, found.shards, found.shards_done) == (True, 6, 5)  # before the repair
    assert {fault.shard for fault in found.faults} == {2}
    assert all_bytes(path) == all_bytes(store_path)
    assert verify(path).sound
    untouched = {file for file, stamp in times(path).items() if when.get(file) == stamp}
    assert untouched == set(times(path)) - {shard_file(path, 2), record_file(path, 2)}


RECORDS: dict[str, Damage] = {
    "missing": lambda path: record_file(path, 2).unlink(),
    "another's": lambda path: shutil.copy(record_file(path, 1), record_file(path, 2)),
}


@pytest.mark.parametrize("damage", RECORDS)
def test_a_record_is_written_from_the_tokens_without_frames_or_weights(
    copies: Copies, all_bytes: Snapshot, damage: str
) -> None:
    shutil.rmtree(copies.dataset)
    copies.weights.unlink()
    path, record = copies.store, record_file(copies.store, 2)
    before, when = all_bytes(path), times(path)
    RECORDS[damage](path)
    found = repair(path, device="cpu")
    assert [(fault.shard, fault.file) for fault in found.faults] == [(2, str(record))]
    assert all_bytes(path) == before
    assert {file for file, stamp in times(path).items() if when[file] != stamp} == {record}


DESCRIPTIONS: dict[str, Damage] = {
    "column lost": lambda path: shutil.rmtree(path / "state"),
    "array garbled": lambda path: (path / "tokens" / "zarr.json").write_text("{"),
}


@pytest.mark.parametrize("damage", DESCRIPTIONS)
def test_a_description_is_written_again_and_no_shard_is_touched(
    path: Path, store_path: Path, all_bytes: Snapshot, damage: str
) -> None:
    when = times(path)
    DESCRIPTIONS[damage](path)
    found = repair(path, device="cpu")
    assert [fault.shard for fault in found.faults] == [None]
    assert all_bytes(path) == all_bytes(store_path)
    assert times(path) == when


@pytest.mark.parametrize("text", ["", "{", '{"attributes": {}}', None])
def test_a_store_without_attributes_needs_its_extraction(
    path: Path, dataset: FrameDataset, encoder: Encoder, store_path: Path, all_bytes: Snapshot, text: str | None
) -> None:
    if text is None:
        (path / "zarr.json").unlink()
    else:
        (path / "zarr.json").write_text(text)
    before = all_bytes(path)
    with pytest.raises(UserError, match=r"zarr\.json .*wmcache extract"):
        repair(path, device="cpu")
    assert all_bytes(path) == before
    extract(dataset, encoder, path)
    assert all_bytes(path) == all_bytes(store_path)


def test_an_unfinished_store_is_finished(path: Path, store_path: Path, all_bytes: Snapshot) -> None:
    attributes = read_attributes(path)
    for name in ("mean", "std"):
        del attributes[name]
    write_attributes(path, {**attributes, "complete": False})
    for shard in (1, 4):
        record_file(path, shard).unlink()
        shard_file(path, shard).unlink()
    when = times(path)
    found = repair(path, device="cpu")
    assert (found.complete, found.shards_done, found.faults) == (False, 4, [])
    assert all_bytes(path) == all_bytes(store_path)
    assert {file: times(path)[file] for file in when} == when


def test_an_int8_store_is_repaired(int8_path: Path, tmp_path: Path, all_bytes: Snapshot) -> None:
    path = Path(shutil.copytree(int8_path, tmp_path / "tcn-64-int8.zarr"))
    record_file(path, 1).unlink()
    flip(shard_file(path, 2), 40)
    flip(path / "scale/c/0/0/0", 60)
    assert {fault.shard for fault in repair(path, device="cpu").faults} == {None, 1, 2}
    assert all_bytes(path) == all_bytes(int8_path)


@pytest.mark.parametrize(
    "damage", [lambda path: flip(shard_file(path, 2), 9), lambda path: shutil.rmtree(path / "state")]
)
def test_moved_frames_and_weights_are_passed_by_option(
    copies: Copies, tmp_path: Path, all_bytes: Snapshot, damage: Damage
) -> None:
    before = all_bytes(copies.store)
    damage(copies.store)
    damaged = all_bytes(copies.store)
    data = copies.dataset.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=f"{copies.dataset}.* --dataset"):
        repair(copies.store, device="cpu")
    weights = copies.weights.rename(tmp_path / "moved.safetensors")
    with pytest.raises(UserError, match=r"--weights .*tcn\.safetensors"):
        repair(copies.store, dataset=data, device="cpu")
    assert all_bytes(copies.store) == damaged
    repair(copies.store, dataset=data, weights=weights, device="cpu")
    assert all_bytes(copies.store) == before  # the paths in the card too


@pytest.mark.parametrize(
    ("damage", "other", "field"),
    [
        ("flipped", "dataset", "dataset_fingerprint"),
        ("missing", "dataset", "dataset_fingerprint"),
        ("another shard's", "dataset", "dataset_fingerprint"),
        ("flipped", "weights", "weights_sha256"),
    ],
)
def test_other_frames_or_weights_are_refused_before_anything_is_touched(
    path: Path, other_dataset: Path, other_weights: Path, all_bytes: Snapshot, damage: str, other: str, field: str
) -> None:
    SHARDS[damage](path)
    before, when = all_bytes(path), times(path)
    moved = {other: {"dataset": other_dataset, "weights": other_weights}[other]}
    with pytest.raises(UserError, match=f"{field}: .*--{other}"):
        repair(path, **moved, device="cpu")
    assert all_bytes(path) == before
    assert times(path) == when


def test_a_missing_store_and_frames_replaced_at_their_path_are_refused(
    copies: Copies, other_dataset: Path, all_bytes: Snapshot
) -> None:
    SHARDS["flipped"](copies.store)
    before = all_bytes(copies.store)
    shutil.rmtree(copies.dataset)
    shutil.copytree(other_dataset, copies.dataset)
    for store, named in ((copies.store, "dataset_fingerprint: "), (copies.store / "none.zarr", r"none\.zarr")):
        with pytest.raises(UserError, match=named):
            repair(store, device="cpu")
    assert all_bytes(copies.store) == before


class TestDeepVerification:
    def test_a_sound_store_has_the_tokens_of_its_encoder(
        self, path: Path, int8_path: Path, all_bytes: Snapshot
    ) -> None:
        for store, largest in ((path, 0.01), (int8_path, 0.05)):
            before, found = all_bytes(store), verify_deep(store, device="cpu")
            assert found.sound
            assert found.drift is not None
            assert found.drift["cosine"] > COSINE_TOLERANCE
            assert 0 <= found.drift["relative_error"] < largest
            assert dataclasses.replace(found, drift=None) == verify(store)
            assert all_bytes(store) == before

    @pytest.mark.parametrize("shard", [0, 3, 5])
    def test_wrong_tokens_with_right_checksums_are_found(self, path: Path, shard: int) -> None:
        store = TokenStore.open(path)
        assert store.card.num_shards <= SAMPLED_FRAMES
        rows = store.card.shard_frames(shard)
        made_up = np.random.default_rng(shard).normal(size=(len(rows), *store.card.frame_shape)).astype(np.float16)
        writer = StoreWriter.resume(path, store.identity)
        writer.write_shard(shard, made_up)
        assert not verify(path).sound
        writer.reopen([])
        writer.finish()
        assert verify(path).sound
        found = verify_deep(path, device="cpu")
        assert [(fault.file, fault.shard) for fault in found.faults] == [(str(path), None)]
        assert found.drift is not None
        assert found.drift["cosine"] < COSINE_TOLERANCE

    def test_moved_frames_and_weights_are_passed_by_option_and_a_damaged_store_needs_none(
        self, copies: Copies, tmp_path: Path
    ) -> None:
        data, weights = copies.dataset.rename(tmp_path / "moved"), copies.weights.rename(tmp_path / "moved.safetensors")
        with pytest.raises(UserError, match="--dataset"):
            verify_deep(copies.store, device="cpu")
        assert verify_deep(copies.store, dataset=data, weights=weights, device="cpu").sound
        flip(shard_file(copies.store, 1), 3)
        found = verify_deep(copies.store, device="cpu")
        assert (found.sound, found.drift) == (False, None)
        assert [fault.shard for fault in found.faults] == [1]


@pytest.mark.parametrize("call", [verify_deep, live_encoder])
def test_other_frames_and_weights_are_refused(
    call: Callable[..., object], path: Path, other_dataset: Path, other_weights: Path
) -> None:
    with pytest.raises(UserError, match="dataset_fingerprint: "):
        call(path, dataset=other_dataset, device="cpu")
    with pytest.raises(UserError, match="weights_sha256: "):
        call(path, weights=other_weights, device="cpu")


def test_the_live_encoder_encodes_decoded_frames_of_the_store(copies: Copies, store: TokenStore) -> None:
    encode = live_encoder(copies.store, device="cpu")
    shutil.rmtree(copies.dataset)
    for count in (1, 64, 100):
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
    all_bytes: Snapshot,
    dtype: str,
) -> None:
    monkeypatch.setattr("wmcache.cache.records.IN_A_BLOCK", 4)
    monkeypatch.setattr("wmcache.cache.verify.IN_A_BLOCK", 4)
    path = tmp_path / "folded.zarr"
    extract(dataset, encoder, path, dtype=dtype)
    names = sorted(file.name for file in (path / "tokens" / "commits").iterdir())
    assert names == ["000004.json", "000005.json", "block-000000.safetensors"]
    before = all_bytes(path)
    damages = {
        "shard": (lambda: flip(shard_file(path, 2), 400), [2], [0, 1, 3, 4, 5]),
        "lost block": (block_file(path, 0).unlink, [0, 1, 2, 3], [4, 5]),
        "flipped block": (lambda: flip(block_file(path, 0), -3), [0, 1, 2, 3], [4, 5]),
    }
    for name, (damage, faulty, untouched) in damages.items():
        when = times(path)
        damage()
        assert [fault.shard for fault in repair(path, device="cpu").faults] == faulty, name
        assert all_bytes(path) == before, name
        assert verify(path).sound
        # Blocks of float16 tokens are made from the tokens that are there.
        kept = range(6) if "block" in name and dtype == "float16" else untouched
        for file in (shard_file(path, shard) for shard in kept):
            assert times(path)[file] == when[file], name
