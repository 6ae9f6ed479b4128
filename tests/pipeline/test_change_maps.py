"""Change maps beside token stores."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wmcache.cache import StoreWriter, TokenStore
from wmcache.cache.change_maps import change_maps_path, open_change_maps
from wmcache.cache.verify import verify
from wmcache.common.errors import UserError
from wmcache.pipeline import encoders
from wmcache.pipeline.collect import collect
from wmcache.pipeline.derive import derive_change_maps
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.encoders.changes import changes_for
from wmcache.pipeline.extract import extract, extract_together
from wmcache.pipeline.frames import FrameDataset
from wmcache.pipeline.repair import repair, verify_deep

Snapshot = Callable[[Path], dict[str, bytes]]


@pytest.fixture
def own(store_path: Path, tmp_path: Path) -> TokenStore:
    """A copy of the store of 2 x 2 tokens, without change maps."""
    return TokenStore.open(shutil.copytree(store_path, tmp_path / "stores" / "tcn-64.zarr"))


@pytest.fixture(scope="module")
def maps_path(dataset: FrameDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Maps of 2 x 2 patches and frames 5 steps apart; read only, so copy it to change it."""
    path = tmp_path_factory.mktemp("maps") / "tcn-64.changes-5.zarr"
    extract(dataset, changes_for((2, 2), 5, "cpu"), path)
    return path


@pytest.fixture(scope="module")
def other_frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("others") / "pointmaze-umaze"
    collect("UMaze", path, episodes=6, length=60, seed=1, image_size=32, frames_per_shard=64, cluster="local:1")
    return path


def data(all_bytes: Snapshot, path: Path) -> dict[str, bytes]:
    """The files of a store without locks."""
    return {name: content for name, content in all_bytes(path).items() if not name.endswith(".lock")}


@pytest.mark.parametrize("frameskip", [1, 5])
def test_a_map_is_the_change_since_the_frame_some_steps_before(
    dataset: FrameDataset, own: TokenStore, frameskip: int
) -> None:
    path = derive_change_maps(own, frameskip)
    assert path == own.path.with_name(f"tcn-64.changes-{frameskip}.zarr")
    maps, encoder = open_change_maps(own, frameskip), changes_for((2, 2), frameskip, "cpu")
    assert (maps.path, len(maps), maps.card.token_grid, maps.card.token_dim) == (path, len(own), (2, 2), 4)
    frames = np.concatenate([dataset.read_shard(shard) for shard in range(len(dataset.card.shards))])
    # Across shards, but not across episodes: the first frames of an episode are compared with its first.
    first = np.maximum.accumulate(np.where(own.step == 0, np.arange(len(own)), 0))
    before = np.maximum(np.arange(len(own)) - frameskip, first)
    found = maps.gather(np.arange(len(own)))
    np.testing.assert_array_equal(found, encoder(np.stack([frames[before], frames], 1)).numpy())
    assert not found[own.step == 0].any()
    assert found[own.step == 2].any((1, 2)).all()
    for name in ("action", "state", "episode", "step"):
        np.testing.assert_array_equal(getattr(maps, name), getattr(own, name))


def test_maps_extracted_with_the_tokens_equal_derived_ones(
    dataset: FrameDataset, encoder: Encoder, own: TokenStore, store_path: Path, tmp_path: Path, all_bytes: Snapshot
) -> None:
    out = tmp_path / "together" / "tcn-64.zarr"
    together = [(encoder, out), (changes_for((2, 2), 5, "cpu"), change_maps_path(out, 5))]
    extract_together(dataset, together)
    derived = derive_change_maps(own)
    assert open_change_maps(TokenStore.open(out), 5).identity == open_change_maps(own, 5).identity
    assert data(all_bytes, derived) == data(all_bytes, change_maps_path(out, 5))
    assert data(all_bytes, out) == data(all_bytes, store_path)


def test_an_unfinished_derivation_resumes(
    own: TokenStore, maps_path: Path, stop_after: Callable[..., Any], all_bytes: Snapshot
) -> None:
    with stop_after(2):
        derive_change_maps(own)
    with pytest.raises(UserError, match="--frameskip 5"):
        open_change_maps(own, 5)
    derive_change_maps(own)
    assert data(all_bytes, open_change_maps(own, 5).path) == data(all_bytes, maps_path)


def test_missing_and_damaged_maps_name_the_command_that_makes_them(own: TokenStore) -> None:
    path = derive_change_maps(own, 4)
    with pytest.raises(UserError, match=rf"tcn-64\.changes-5\.zarr.* change-maps {own.path} --frameskip 5$"):
        open_change_maps(own, 5)
    (path / "tokens" / "c.1.0.0").unlink()
    with pytest.raises(UserError, match=f"1 of 6 .*wmcache repair {path}"):
        open_change_maps(own, 4)
    repair(path, device="cpu")
    assert open_change_maps(own, 4).complete


@pytest.mark.parametrize("others", ["frames", "grid", "tokens"])
def test_maps_of_another_store_are_refused(
    dataset: FrameDataset, encoder: Encoder, own: TokenStore, other_frames: Path, others: str
) -> None:
    path = change_maps_path(own.path, 5)
    if others == "tokens":
        extract(dataset, encoder, path)
    else:
        frames = FrameDataset.open(other_frames) if others == "frames" else dataset
        extract(frames, changes_for((4, 4) if others == "grid" else (2, 2), 5, "cpu"), path)
    with pytest.raises(UserError, match=f"{path} .*wmcache derive change-maps {own.path} --frameskip 5$"):
        open_change_maps(own, 5)


def test_maps_of_an_int8_store_are_those_extracted_with_it(
    dataset: FrameDataset, encoder: Encoder, tmp_path: Path
) -> None:
    path = tmp_path / "tcn-64-int8.zarr"
    maps = changes_for((2, 2), 5, "cpu")
    extract_together(dataset, [(encoder, path), (maps, change_maps_path(path, 5))], dtype="int8")
    store = TokenStore.open(path)
    assert derive_change_maps(store) == open_change_maps(store, 5).path


def test_moved_frames_are_passed_by_option_and_others_refused(
    copied: Path, encoder: Encoder, other_frames: Path, tmp_path: Path
) -> None:
    extract(FrameDataset.open(copied), encoder, tmp_path / "tcn-64.zarr")
    store, moved = TokenStore.open(tmp_path / "tcn-64.zarr"), copied.rename(tmp_path / "moved")
    for others, named in ((None, "--dataset"), (other_frames, f"{store.path}; .*--dataset")):
        with pytest.raises(UserError, match=named):
            derive_change_maps(store, dataset=others)
    assert sorted(tmp_path.iterdir()) == [moved, store.path]
    derive_change_maps(store, dataset=moved)
    assert open_change_maps(store, 5).complete


def test_tokens_without_a_square_grid_are_refused(dataset: FrameDataset, tmp_path: Path) -> None:
    path = tmp_path / "random-vit-layers-64.zarr"
    extract(dataset, encoders.create("random-vit-layers", device="cpu"), path)
    with pytest.raises(UserError, match="1 x 17"):
        derive_change_maps(TokenStore.open(path))
    assert list(tmp_path.iterdir()) == [path]


def test_maps_are_verified_and_wrong_ones_with_right_checksums_found(maps_path: Path, tmp_path: Path) -> None:
    found = verify_deep(maps_path, device="cpu")
    assert found.sound
    assert found.drift is not None
    # Maps of the first frame of an episode are zero, and zeros have no cosine.
    assert found.drift["cosine"] == pytest.approx(1, abs=1e-5)
    assert found.drift["relative_error"] < 0.01
    path = shutil.copytree(maps_path, tmp_path / maps_path.name)
    store = TokenStore.open(path)
    writer = StoreWriter.resume(path, store.identity)
    writer.write_shard(2, np.zeros((len(store.card.shard_frames(2)), 4, 4), np.float16))
    writer.reopen([])
    writer.finish()
    assert verify(path).sound
    assert not verify_deep(path, device="cpu").sound
