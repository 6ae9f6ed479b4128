"""Change maps beside token stores."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from wmcache.cache import TokenStore
from wmcache.cache.change_maps import change_maps_path, open_change_maps
from wmcache.common.errors import UserError
from wmcache.pipeline.collect import collect
from wmcache.pipeline.derive import derive_change_maps
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.encoders.changes import changes_for
from wmcache.pipeline.extract import extract
from wmcache.pipeline.frames import FrameDataset


@pytest.fixture
def own(store_path: Path, tmp_path: Path) -> TokenStore:
    """A copy of the store of 2 x 2 tokens, without change maps."""
    return TokenStore.open(shutil.copytree(store_path, tmp_path / "stores" / "tcn-64.zarr"))


@pytest.fixture(scope="module")
def other_frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("others") / "pointmaze-umaze"
    collect("UMaze", path, episodes=6, length=60, seed=1, image_size=32, frames_per_shard=64, cluster="local:1")
    return path


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


def test_missing_and_damaged_maps_name_the_command_that_makes_them(own: TokenStore) -> None:
    path = derive_change_maps(own, 4)
    with pytest.raises(UserError, match=rf"tcn-64\.changes-5\.zarr.* change-maps {own.path} --frameskip 5$"):
        open_change_maps(own, 5)
    (path / "tokens" / "c.1.0.0").unlink()
    with pytest.raises(UserError, match=f"wmcache repair {path}"):
        open_change_maps(own, 4)


@pytest.mark.parametrize("others", ["frames", "grid", "frameskip", "tokens"])
def test_maps_of_another_store_are_refused(
    dataset: FrameDataset, encoder: Encoder, own: TokenStore, other_frames: Path, others: str
) -> None:
    path = change_maps_path(own.path, 5)
    if others == "tokens":
        extract(dataset, encoder, path)
    else:
        frames = FrameDataset.open(other_frames) if others == "frames" else dataset
        grid, frameskip = (4, 4) if others == "grid" else (2, 2), 4 if others == "frameskip" else 5
        extract(frames, changes_for(grid, frameskip, "cpu"), path)
    with pytest.raises(UserError, match=f"{path} .*wmcache derive change-maps {own.path} --frameskip 5$"):
        open_change_maps(own, 5)
