"""What is not as it was written is made again, and nothing else; and nothing at all where the source is not the right one."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from wmcache.cache import StoreWriter, TokenStore
from wmcache.cache.layout import read_attributes, shard_file, write_attributes
from wmcache.cache.records import block_file, record_file
from wmcache.cache.verify import verify
from wmcache.common.errors import UserError
from wmcache.common.jsonfiles import read_json, write_json
from wmcache.pipeline.collect import collect
from wmcache.pipeline.encoders import COSINE_TOLERANCE, Encoder
from wmcache.pipeline.extract import extract
from wmcache.pipeline.frames import FrameDataset
from wmcache.pipeline.repair import SAMPLED_FRAMES, live_encoder, repair, verify_deep

Snapshot = Callable[[Path], dict[str, bytes]]
STRIDE = 4 * 32 * 2 + 4


def times(path: Path) -> dict[Path, tuple[int, int]]:
    """Of the shards and their records: when they were written, and whether they are the same files."""
    found = [file for part in ("tokens/c.*", "tokens/commits/*") for file in path.glob(part) if file.is_file()]
    return {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in found}


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


@pytest.fixture
def path(store_path: Path, tmp_path: Path) -> Path:
    """A store of one's own, of 6 shards, to be damaged at will; its frames and weights are where they were."""
    return Path(shutil.copytree(store_path, tmp_path / "tcn-64.zarr"))


@pytest.fixture(scope="module")
def int8_path(dataset: FrameDataset, encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only, so copy it to change it."""
    path = tmp_path_factory.mktemp("int8") / "tcn-64-int8.zarr"
    extract(dataset, encoder, path, dtype="int8")
    return path


@dataclasses.dataclass
class Road:
    """A store, and its frames and weights, all to be moved or spoilt at will."""

    store: Path
    dataset: Path
    weights: Path


@pytest.fixture
def road(path: Path, copied: Path, tcn_weights: Path, tmp_path: Path) -> Road:
    weights = Path(shutil.copy(tcn_weights, tmp_path / "tcn.safetensors"))
    attributes = read_attributes(path)
    card = attributes["card"]
    card["dataset"]["path"], card["encoder"]["weights"] = str(copied), str(weights)
    write_attributes(path, attributes)
    return Road(path, copied, weights)


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


def test_a_sound_store_is_left_alone(path: Path, all_bytes: Snapshot) -> None:
    before, when = all_bytes(path), {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    found = repair(path, device="cpu")
    assert found.sound
    assert all_bytes(path) == before
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == when


def test_a_sound_store_needs_neither_frames_nor_weights(road: Road) -> None:
    shutil.rmtree(road.dataset)
    road.weights.unlink()
    assert repair(road.store, device="cpu").sound


def _cut(path: Path) -> None:
    file = shard_file(path, 2)
    file.write_bytes(file.read_bytes()[:-100])


def _frames_exchanged(path: Path) -> None:
    file = shard_file(path, 2)
    data = file.read_bytes()
    file.write_bytes(data[STRIDE : 2 * STRIDE] + data[:STRIDE] + data[2 * STRIDE :])


SHARDS: dict[str, Callable[[Path], object]] = {
    "flipped": lambda path: flip(shard_file(path, 2), 5 * STRIDE),
    "index": lambda path: flip(shard_file(path, 2), -20),
    "cut": _cut,
    "missing": lambda path: shard_file(path, 2).unlink(),
    "a folder": lambda path: (shard_file(path, 2).unlink(), shard_file(path, 2).mkdir()),
    "both missing": lambda path: (shard_file(path, 2).unlink(), record_file(path, 2).unlink()),
    "frames exchanged": _frames_exchanged,
    "another shard's": lambda path: shutil.copy(shard_file(path, 1), shard_file(path, 2)),
}


@pytest.mark.parametrize("damage", SHARDS)
def test_exactly_the_shard_that_is_damaged_is_encoded_again(
    path: Path, store_path: Path, all_bytes: Snapshot, damage: str
) -> None:
    SHARDS[damage](path)
    when = times(path)
    found = repair(path, device="cpu")
    # What was found before anything was repaired.
    assert (found.complete, found.shards, found.shards_done) == (True, 6, 5)
    assert {fault.shard for fault in found.faults} == {2}
    assert all_bytes(path) == all_bytes(store_path)
    assert verify(path).sound
    theirs = {shard_file(path, 2), record_file(path, 2)}
    untouched = {file for file, stamp in times(path).items() if when.get(file) == stamp}
    assert untouched == set(times(path)) - theirs


RECORDS: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: record_file(path, 2).unlink(),
    "emptied": lambda path: record_file(path, 2).write_text(""),
    "changed": lambda path: write_json(record_file(path, 2), {**read_json(record_file(path, 2), ""), "bytes": 7}),
    "another's": lambda path: shutil.copy(record_file(path, 1), record_file(path, 2)),
}


@pytest.mark.parametrize("damage", RECORDS)
def test_a_record_is_written_from_the_tokens_without_frames_or_weights(
    road: Road, all_bytes: Snapshot, damage: str
) -> None:
    shutil.rmtree(road.dataset)
    road.weights.unlink()
    before, when = all_bytes(road.store), times(road.store)
    RECORDS[damage](road.store)
    found = repair(road.store, device="cpu")
    assert [(fault.shard, fault.file) for fault in found.faults] == [(2, str(record_file(road.store, 2)))]
    assert all_bytes(road.store) == before
    assert {file for file, stamp in times(road.store).items() if when[file] != stamp} == {record_file(road.store, 2)}


def test_all_records_lost_with_their_folder_are_written_from_the_tokens(
    path: Path, store_path: Path, all_bytes: Snapshot
) -> None:
    shutil.rmtree(path / "tokens" / "commits")
    when = times(path)
    found = repair(path, device="cpu")
    assert {fault.shard for fault in found.faults} == set(range(6))
    assert all_bytes(path) == all_bytes(store_path)
    assert {file: times(path)[file] for file in when} == when


def test_damage_of_every_kind_at_once(path: Path, store_path: Path, all_bytes: Snapshot) -> None:
    record_file(path, 0).unlink()
    flip(shard_file(path, 1), 7)
    shard_file(path, 3).unlink()
    record_file(path, 5).write_text("{")
    (path / "step" / "zarr.json").write_text("")
    (path / "tokens" / "zarr.json").write_text("")
    when = times(path)
    found = repair(path, device="cpu")
    assert {fault.shard for fault in found.faults} == {None, 0, 1, 3, 5}
    assert all_bytes(path) == all_bytes(store_path)
    for shard in (0, 2, 4, 5):
        assert times(path)[shard_file(path, shard)] == when[shard_file(path, shard)]


DESCRIPTIONS: dict[str, Callable[[Path], object]] = {
    "column lost": lambda path: shutil.rmtree(path / "state"),
    "column garbled": lambda path: (path / "action" / "zarr.json").write_text("{"),
    "column without values": lambda path: shutil.rmtree(path / "episode" / "c"),
    "array garbled": lambda path: (path / "tokens" / "zarr.json").write_text("{"),
    "array lost": lambda path: (path / "tokens" / "zarr.json").unlink(),
}


@pytest.mark.parametrize("damage", DESCRIPTIONS)
def test_a_description_is_written_anew_and_no_shard_is_touched(
    path: Path, store_path: Path, all_bytes: Snapshot, damage: str
) -> None:
    when = times(path)
    DESCRIPTIONS[damage](path)
    found = repair(path, device="cpu")
    assert [fault.shard for fault in found.faults] == [None]
    assert all_bytes(path) == all_bytes(store_path)
    assert times(path) == when


@pytest.mark.parametrize("text", ["", "{", '{"attributes": {}}', None])
def test_a_store_that_cannot_say_what_it_is_needs_its_extraction(
    path: Path, dataset: FrameDataset, encoder: Encoder, store_path: Path, all_bytes: Snapshot, text: str | None
) -> None:
    if text is None:
        (path / "zarr.json").unlink()
    else:
        (path / "zarr.json").write_text(text)
    before = all_bytes(path)
    with pytest.raises(UserError, match=r"zarr\.json .*; run its wmcache extract again$"):
        repair(path, device="cpu")
    assert all_bytes(path) == before
    # And that advice is good.
    extract(dataset, encoder, path)
    assert all_bytes(path) == all_bytes(store_path)


def test_an_unfinished_store_is_finished(path: Path, store_path: Path, all_bytes: Snapshot) -> None:
    attributes = read_attributes(path)
    write_attributes(
        path, {name: value for name, value in attributes.items() if name not in ("mean", "std")} | {"complete": False}
    )
    for shard in (1, 4):
        record_file(path, shard).unlink()
        shard_file(path, shard).unlink()
    when = times(path)
    found = repair(path, device="cpu")
    assert (found.complete, found.shards_done, found.faults) == (False, 4, [])
    assert all_bytes(path) == all_bytes(store_path)
    assert {file: times(path)[file] for file in when} == when


def test_an_unfinished_store_that_is_damaged_too(path: Path, store_path: Path, all_bytes: Snapshot) -> None:
    write_attributes(path, {**read_attributes(path), "complete": False})
    record_file(path, 1).unlink()
    flip(shard_file(path, 3), 9)
    found = repair(path, device="cpu")
    assert [fault.shard for fault in found.faults] == [3]
    assert all_bytes(path) == all_bytes(store_path)


def test_a_store_that_lacks_only_the_last_word_needs_neither_frames_nor_weights(
    road: Road, all_bytes: Snapshot
) -> None:
    before = all_bytes(road.store)
    write_attributes(road.store, {**read_attributes(road.store), "complete": False})
    shutil.rmtree(road.dataset)
    road.weights.unlink()
    repair(road.store, device="cpu")
    assert all_bytes(road.store) == before


BYTES: dict[str, Callable[[Path], object]] = {
    "record lost": lambda path: record_file(path, 2).unlink(),
    "flipped": lambda path: flip(shard_file(path, 2), 40),
    "scale lost": lambda path: shutil.rmtree(path / "scale"),
    "scale garbled": lambda path: flip(path / "scale/c/0/0/0", 60),
    "column lost": lambda path: shutil.rmtree(path / "state"),
}


@pytest.mark.parametrize("damage", BYTES)
def test_a_store_of_bytes(int8_path: Path, tmp_path: Path, all_bytes: Snapshot, damage: str) -> None:
    path = Path(shutil.copytree(int8_path, tmp_path / "tcn-64-int8.zarr"))
    BYTES[damage](path)
    assert not repair(path, device="cpu").sound
    assert all_bytes(path) == all_bytes(int8_path)


def test_frames_and_weights_that_have_moved_are_said(road: Road, tmp_path: Path, all_bytes: Snapshot) -> None:
    before = all_bytes(road.store)
    flip(shard_file(road.store, 2), 9)
    damaged = all_bytes(road.store)
    data = road.dataset.rename(tmp_path / "moved")
    with pytest.raises(
        UserError, match=r"the store's frames are needed: .*; or say where they are with --dataset"
    ) as caught:
        repair(road.store, device="cpu")
    assert str(road.dataset) in str(caught.value)
    weights = road.weights.rename(tmp_path / "moved.safetensors")
    with pytest.raises(UserError, match=r"--weights .*tcn\.safetensors: neither an existing"):
        repair(road.store, dataset=data, device="cpu")
    assert all_bytes(road.store) == damaged
    repair(road.store, dataset=data, weights=weights, device="cpu")
    assert all_bytes(road.store)["tokens/c.2.0.0"] == before["tokens/c.2.0.0"]
    assert verify(road.store).sound
    # Where they are now is no part of what the store is.
    assert all_bytes(road.store) == before


def test_frames_and_weights_that_have_moved_mend_a_description_too(road: Road, tmp_path: Path) -> None:
    shutil.rmtree(road.store / "state")
    data, weights = road.dataset.rename(tmp_path / "moved"), road.weights.rename(tmp_path / "moved.safetensors")
    repair(road.store, dataset=data, weights=weights, device="cpu")
    assert verify(road.store).sound


@pytest.mark.parametrize("damage", ["flipped", "missing", "another shard's"])
def test_other_frames_are_refused_before_anything_is_touched(
    path: Path, other_dataset: Path, all_bytes: Snapshot, damage: str
) -> None:
    SHARDS[damage](path)
    before, when = all_bytes(path), times(path)
    with pytest.raises(
        UserError, match=r"\(dataset_fingerprint: .* != .*\); pass the right --dataset or --weights"
    ) as caught:
        repair(path, dataset=other_dataset, device="cpu")
    assert "\n" not in str(caught.value)
    assert all_bytes(path) == before
    assert times(path) == when


def test_other_weights_are_refused_before_anything_is_touched(
    path: Path, other_weights: Path, all_bytes: Snapshot
) -> None:
    SHARDS["flipped"](path)
    before, when = all_bytes(path), times(path)
    with pytest.raises(UserError, match=r"\(weights_sha256: .* != .*\); pass the right --dataset or --weights"):
        repair(path, weights=other_weights, device="cpu")
    assert all_bytes(path) == before
    assert times(path) == when


def test_frames_changed_in_their_place_are_refused(road: Road, other_dataset: Path, all_bytes: Snapshot) -> None:
    SHARDS["flipped"](road.store)
    before = all_bytes(road.store)
    shutil.rmtree(road.dataset)
    shutil.copytree(other_dataset, road.dataset)
    with pytest.raises(UserError, match="dataset_fingerprint: "):
        repair(road.store, device="cpu")
    assert all_bytes(road.store) == before


def test_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.zarr does not exist"):
        repair(tmp_path / "none.zarr", device="cpu")


class TestDeepVerification:
    def test_a_sound_store_is_what_its_encoder_gives_now(self, path: Path, all_bytes: Snapshot) -> None:
        before = all_bytes(path)
        found = verify_deep(path, device="cpu")
        assert found.sound
        assert found.drift is not None
        assert found.drift["cosine"] > COSINE_TOLERANCE
        assert 0 <= found.drift["relative_error"] < 0.01
        assert dataclasses.replace(found, drift=None) == verify(path)
        assert all_bytes(path) == before

    def test_a_store_of_bytes_is_near_enough(self, int8_path: Path) -> None:
        found = verify_deep(int8_path, device="cpu")
        assert found.sound
        assert found.drift is not None
        assert 0 < found.drift["relative_error"] < 0.05

    @pytest.mark.parametrize("shard", [0, 3, 5])
    def test_wrong_tokens_are_found_though_every_checksum_fits(self, path: Path, shard: int) -> None:
        store = TokenStore.open(path)
        rows = store.card.shard_frames(shard)
        made_up = np.random.default_rng(shard).normal(size=(len(rows), *store.card.frame_shape)).astype(np.float16)
        writer = StoreWriter.resume(path, store.identity)
        writer.write_shard(shard, made_up)
        assert not verify(path).sound
        writer.reopen([])
        writer.finish()
        assert verify(path).sound
        found = verify_deep(path, device="cpu")
        assert not found.sound
        (fault,) = found.faults
        assert fault.shard is None
        assert "encoding 64 of its frames anew gives other tokens (smallest cosine " in fault.reason
        assert found.drift is not None
        assert found.drift["cosine"] < COSINE_TOLERANCE

    def test_the_sample_reaches_every_shard(self, store: TokenStore) -> None:
        assert store.card.num_shards <= SAMPLED_FRAMES

    def test_a_damaged_store_is_not_encoded(self, road: Road) -> None:
        flip(shard_file(road.store, 1), 3)
        shutil.rmtree(road.dataset)
        found = verify_deep(road.store, device="cpu")
        assert (found.sound, found.drift) == (False, None)
        assert [fault.shard for fault in found.faults] == [1]

    def test_it_takes_frames_and_weights_that_have_moved(self, road: Road, tmp_path: Path) -> None:
        data, weights = road.dataset.rename(tmp_path / "moved"), road.weights.rename(tmp_path / "moved.safetensors")
        with pytest.raises(UserError, match="--dataset"):
            verify_deep(road.store, device="cpu")
        assert verify_deep(road.store, dataset=data, weights=weights, device="cpu").sound

    def test_it_refuses_others(self, path: Path, other_dataset: Path, other_weights: Path) -> None:
        with pytest.raises(UserError, match="dataset_fingerprint: "):
            verify_deep(path, dataset=other_dataset, device="cpu")
        with pytest.raises(UserError, match="weights_sha256: "):
            verify_deep(path, weights=other_weights, device="cpu")


class TestLiveEncoder:
    @pytest.mark.parametrize("count", [1, 16, 64, 100])
    def test_it_encodes_the_stores_own_frames_as_many_as_are_asked_for(
        self, store_path: Path, store: TokenStore, dataset: FrameDataset, count: int
    ) -> None:
        encode = live_encoder(store_path, device="cpu")
        for _ in range(2):
            found = encode(count)
            assert (found.dtype, tuple(found.shape)) == (torch.float16, (count, *store.card.frame_shape))
            # Another batch size rounds differently in the last bits.
            expected: NDArray[np.float16] = store.gather(np.arange(count) % 64)
            np.testing.assert_allclose(found.numpy(), expected, atol=2e-2, rtol=1e-2)

    def test_it_decodes_nothing_when_it_is_called(self, road: Road) -> None:
        encode = live_encoder(road.store, device="cpu")
        shutil.rmtree(road.dataset)
        assert len(encode(70)) == 70

    def test_it_refuses_other_frames_and_weights(self, path: Path, other_dataset: Path, other_weights: Path) -> None:
        with pytest.raises(UserError, match="dataset_fingerprint: "):
            live_encoder(path, dataset=other_dataset, device="cpu")
        with pytest.raises(UserError, match="weights_sha256: "):
            live_encoder(path, weights=other_weights, device="cpu")


class TestBlocks:
    """Records of four shards in one file, and two alone."""

    @pytest.fixture(params=["float16", "int8"])
    def folded(
        self,
        request: pytest.FixtureRequest,
        dataset: FrameDataset,
        encoder: Encoder,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> Path:
        monkeypatch.setattr("wmcache.cache.records.IN_A_BLOCK", 4)
        monkeypatch.setattr("wmcache.cache.verify.IN_A_BLOCK", 4)
        path = tmp_path / "folded.zarr"
        extract(dataset, encoder, path, dtype=request.param)
        names = sorted(file.name for file in (path / "tokens" / "commits").iterdir())
        assert names == ["000004.json", "000005.json", "block-000000.safetensors"]
        return path

    def test_a_shard_is_encoded_again_and_its_block_made_whole(self, folded: Path, all_bytes: Snapshot) -> None:
        before, when = all_bytes(folded), times(folded)
        flip(shard_file(folded, 2), 400)
        assert [fault.shard for fault in repair(folded, device="cpu").faults] == [2]
        assert all_bytes(folded) == before
        for shard in (0, 1, 3, 4, 5):
            assert times(folded)[shard_file(folded, shard)] == when[shard_file(folded, shard)]

    @pytest.mark.parametrize("damage", ["lost", "flipped"])
    def test_a_block_is_written_again(self, folded: Path, all_bytes: Snapshot, damage: str) -> None:
        before, when = all_bytes(folded), times(folded)
        if damage == "lost":
            block_file(folded, 0).unlink()
        else:
            flip(block_file(folded, 0), -3)
        assert [fault.shard for fault in repair(folded, device="cpu").faults] == [0, 1, 2, 3]
        assert all_bytes(folded) == before
        assert verify(folded).sound
        if read_attributes(folded)["card"]["dtype"] == "float16":  # from the tokens that are there
            for shard in range(4):
                assert times(folded)[shard_file(folded, shard)] == when[shard_file(folded, shard)]
