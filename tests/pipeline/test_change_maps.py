"""Change maps beside token stores: the same wherever they are made, and refused where they are not those of the store."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from wmcache.cache import StoreWriter, TokenStore
from wmcache.cache.change_maps import change_maps_path, open_change_maps
from wmcache.cache.verify import verify
from wmcache.common.errors import UserError
from wmcache.pipeline import encoders
from wmcache.pipeline.change_maps import derive_change_maps
from wmcache.pipeline.collect import collect
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.encoders.changes import changes_for
from wmcache.pipeline.extract import extract, extract_together
from wmcache.pipeline.frames import FrameDataset
from wmcache.pipeline.repair import repair, verify_deep

Snapshot = Callable[[Path], dict[str, bytes]]


@pytest.fixture
def own(store_path: Path, tmp_path: Path) -> TokenStore:
    """A store of one's own, 2 x 2 tokens, that has no change maps."""
    return TokenStore.open(shutil.copytree(store_path, tmp_path / "stores" / "tcn-64.zarr"))


@pytest.fixture(scope="module")
def maps_path(dataset: FrameDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 2 x 2 patches and frames 5 steps apart; read only, so copy it to change it."""
    path = tmp_path_factory.mktemp("maps") / "tcn-64.changes-5.zarr"
    extract(dataset, changes_for((2, 2), 5, "cpu"), path)
    return path


@pytest.fixture(scope="module")
def other_frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("others") / "pointmaze-umaze"
    collect("UMaze", path, episodes=6, length=60, seed=1, image_size=32, frames_per_shard=64, cluster="local:1")
    return path


def data(all_bytes: Snapshot, path: Path) -> dict[str, bytes]:
    """Whatever is the same each time; a lock is of those who have it, and the places of frames stand in the description."""
    return {name: content for name, content in all_bytes(path).items() if not name.endswith(".lock")}


@pytest.mark.parametrize("frameskip", [1, 5])
def test_a_map_says_what_has_changed_since_the_frame_so_many_steps_before(
    dataset: FrameDataset, own: TokenStore, frameskip: int
) -> None:
    place = derive_change_maps(own, frameskip)
    assert place == own.path.with_name(f"tcn-64.changes-{frameskip}.zarr")
    maps, encoder = open_change_maps(own, frameskip), changes_for((2, 2), frameskip, "cpu")
    assert (maps.path, len(maps), maps.card.token_grid, maps.card.token_dim) == (place, len(own), (2, 2), 4)
    frames = np.concatenate([dataset.read_shard(shard) for shard in range(len(dataset.card.shards))])
    # One after the other, however far that is: across the bounds of shards, and not of episodes, which begin with themselves.
    first = np.maximum.accumulate(np.where(own.step == 0, np.arange(len(own)), 0))
    before = np.maximum(np.arange(len(own)) - frameskip, first)
    found = maps.gather(np.arange(len(own)))
    np.testing.assert_array_equal(found, encoder(np.stack([frames[before], frames], 1)).numpy())
    assert not found[own.step == 0].any()
    assert found[own.step == 2].any((1, 2)).all()
    for name in ("action", "state", "episode", "step"):
        np.testing.assert_array_equal(getattr(maps, name), getattr(own, name))


def test_maps_extracted_with_the_tokens_are_those_derived_later(
    dataset: FrameDataset, encoder: Encoder, own: TokenStore, store_path: Path, tmp_path: Path, all_bytes: Snapshot
) -> None:
    out = tmp_path / "together" / "tcn-64.zarr"
    together = [(encoder, out), (changes_for((2, 2), 5, "cpu"), change_maps_path(out, 5))]
    extract_together(dataset, together)
    derived = derive_change_maps(own)
    assert open_change_maps(TokenStore.open(out), 5).identity == open_change_maps(own, 5).identity
    assert data(all_bytes, derived) == data(all_bytes, change_maps_path(out, 5))
    # And the tokens are none the worse for it.
    assert data(all_bytes, out) == data(all_bytes, store_path)


def test_an_unfinished_derivation_goes_on(
    own: TokenStore, maps_path: Path, monkeypatch: pytest.MonkeyPatch, all_bytes: Snapshot
) -> None:
    write, written = StoreWriter.write_shard, []

    def until_the_third(self: StoreWriter, shard: int, tokens: np.ndarray) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(shard)
        write(self, shard, tokens)

    monkeypatch.setattr(StoreWriter, "write_shard", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        derive_change_maps(own)
    with pytest.raises(UserError, match=r"is incomplete.*make them with: wmcache derive change-maps .* --frameskip 5"):
        open_change_maps(own, 5)
    again: list[int] = []

    def noted(self: StoreWriter, shard: int, tokens: np.ndarray) -> None:
        again.append(shard)
        write(self, shard, tokens)

    monkeypatch.setattr(StoreWriter, "write_shard", noted)
    derive_change_maps(own)
    assert sorted(written + again) == list(range(6))
    assert data(all_bytes, open_change_maps(own, 5).path) == data(all_bytes, maps_path)


def test_what_is_there_is_left_alone(own: TokenStore, all_bytes: Snapshot) -> None:
    place = derive_change_maps(own)
    before = {file: file.stat().st_mtime_ns for file in place.rglob("*") if file.suffix != ".lock"}
    tokens = all_bytes(own.path)
    derive_change_maps(own)
    assert {file: file.stat().st_mtime_ns for file in place.rglob("*") if file.suffix != ".lock"} == before
    assert all_bytes(own.path) == tokens


def test_a_store_without_maps_names_the_command_that_makes_them(own: TokenStore) -> None:
    derive_change_maps(own, 4)
    with pytest.raises(UserError, match=r"there are no change maps .*tcn-64\.changes-5\.zarr; ") as raised:
        open_change_maps(own, 5)
    assert str(raised.value).endswith(f"make them with: wmcache derive change-maps {own.path} --frameskip 5")
    assert "\n" not in str(raised.value)


def test_damaged_maps_are_refused_with_the_command_that_repairs_them(own: TokenStore) -> None:
    place = derive_change_maps(own)
    (place / "tokens" / "c.1.0.0").unlink()
    with pytest.raises(UserError, match=f"1 of 6 shards are missing.*wmcache repair {place}"):
        open_change_maps(own, 5)
    repair(place, device="cpu")
    assert open_change_maps(own, 5).complete


@pytest.mark.parametrize("others", ["frames", "grid", "tokens"])
def test_maps_that_are_not_of_the_store_are_refused(
    dataset: FrameDataset, encoder: Encoder, own: TokenStore, other_frames: Path, others: str
) -> None:
    place = change_maps_path(own.path, 5)
    if others == "tokens":
        extract(dataset, encoder, place)
    else:
        frames = FrameDataset.open(other_frames) if others == "frames" else dataset
        lag, grid = (3 if others == "lag" else 5), ((4, 4) if others == "grid" else (2, 2))
        extract(frames, changes_for(grid, lag, "cpu"), place)
    with pytest.raises(UserError, match="is not of the frames or of the grid of") as raised:
        open_change_maps(own, 5)
    assert f"{place} is not of the frames" in str(raised.value)
    assert str(raised.value).endswith(f"wmcache derive change-maps {own.path} --frameskip 5")
    assert "\n" not in str(raised.value)


def test_other_frames_are_refused_before_anything_is_made(own: TokenStore, other_frames: Path) -> None:
    with pytest.raises(UserError, match=f"^{other_frames} .* {own.path}; .*--dataset"):
        derive_change_maps(own, dataset=other_frames)
    assert list(own.path.parent.iterdir()) == [own.path]


def test_maps_of_a_store_of_bytes_are_those_extracted_with_it(
    dataset: FrameDataset, encoder: Encoder, tmp_path: Path
) -> None:
    path = tmp_path / "tcn-64-int8.zarr"
    maps = changes_for((2, 2), 5, "cpu")
    extract_together(dataset, [(encoder, path), (maps, change_maps_path(path, 5))], dtype="int8")
    store = TokenStore.open(path)
    assert derive_change_maps(store) == open_change_maps(store, 5).path


def test_frames_that_have_moved_are_named_by_an_option(copied: Path, encoder: Encoder, tmp_path: Path) -> None:
    extract(FrameDataset.open(copied), encoder, tmp_path / "tcn-64.zarr")
    store, moved = TokenStore.open(tmp_path / "tcn-64.zarr"), copied.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="--dataset"):
        derive_change_maps(store)
    derive_change_maps(store, dataset=moved)
    assert open_change_maps(store, 5).complete


def test_tokens_that_are_no_square_of_patches_have_none(dataset: FrameDataset, tmp_path: Path) -> None:
    path = tmp_path / "random-vit-layers-64.zarr"
    extract(dataset, encoders.create("random-vit-layers", device="cpu"), path)
    with pytest.raises(UserError, match="1 x 17"):
        derive_change_maps(TokenStore.open(path))
    assert list(tmp_path.iterdir()) == [path]


def test_maps_are_verified_as_every_store_is(maps_path: Path, tmp_path: Path) -> None:
    found = verify_deep(maps_path, device="cpu")
    assert found.sound
    assert found.drift is not None
    # Some of its frames begin an episode: nothing has changed there, and nothing but zeros has no cosine.
    assert found.drift["cosine"] == pytest.approx(1, abs=1e-5)
    assert found.drift["relative_error"] < 0.01
    assert dataclasses.replace(found, drift=None) == verify(maps_path)


def test_wrong_maps_are_found_though_every_checksum_fits(maps_path: Path, tmp_path: Path) -> None:
    path = shutil.copytree(maps_path, tmp_path / maps_path.name)
    store = TokenStore.open(path)
    writer = StoreWriter.resume(path, store.identity)
    writer.write_shard(2, np.zeros((len(store.card.shard_frames(2)), 4, 4), np.float16))
    writer.reopen([])
    writer.finish()
    assert verify(path).sound
    assert not verify_deep(path, device="cpu").sound
