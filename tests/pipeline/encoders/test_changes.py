from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from wmcache.common.errors import UserError
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.encoders.changes import PATCH, changes_for


@pytest.fixture(scope="module")
def changes() -> Encoder:
    """At DDP-WM's size: 14 x 14 patches of frames of 196 pixels."""
    return changes_for((14, 14), 5, "cpu")


def noise(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


def plain(pairs: NDArray[np.uint8], side: int) -> NDArray[np.float64]:
    """The map [B, side, side] of frames [B, 2, S, S, 3] that need no resizing; an independent slow version."""
    images = pairs.astype(np.float64) / 127.5 - 1
    squares = np.square(images[:, 1] - images[:, 0]).sum(-1)
    cell = squares.shape[1] // side
    return np.sqrt(squares.reshape(-1, side, cell, side, cell).mean((2, 4)))


def of_patches(maps: NDArray[np.float64], grid: int) -> NDArray[np.float64]:
    """[B, 2 * grid, 2 * grid] -> [B, grid * grid, 4], patch by patch."""
    corners = [divmod(patch, grid) for patch in range(grid * grid)]
    return np.stack([maps[:, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].reshape(-1, 4) for r, c in corners], 1)


@pytest.mark.parametrize("grid", [1, 2, 5, 14, 16])
def test_a_cell_is_the_norm_over_channels_in_the_mean_over_its_pixels(grid: int) -> None:
    encoder = changes_for((grid, grid), 3, "cpu")
    assert (encoder.token_grid, encoder.token_dim, encoder.image_size) == ((grid, grid), 4, grid * PATCH)
    pairs = noise(2, 2, grid * PATCH, grid * PATCH)
    pairs[1, 1, : PATCH // 2] = pairs[1, 0, : PATCH // 2]  # no change in the first row of cells
    np.testing.assert_allclose(encoder(pairs), of_patches(plain(pairs, 2 * grid), grid), rtol=1e-3)


def test_frames_of_another_size_are_resized_first() -> None:
    small = np.zeros((1, 2, 28, 28, 3), np.uint8)
    small[0, 1, 14:21, 7:14] = 255
    large = small.repeat(2, 2).repeat(2, 3)
    encoder = changes_for((2, 2), 5, "cpu")
    of_small, of_large = encoder(small)[0], encoder(large)[0]
    # Of the third patch the cell at the top right; its edges blur a little into the cells around it.
    assert of_small.flatten().nonzero().tolist() == [[2 * 4 + 1]]
    assert of_large.argmax() == 2 * 4 + 1
    assert of_large.flatten().topk(2).values[1] < of_large.max() / 4


def test_equal_frames_have_no_change_whatever_is_in_them(changes: Encoder) -> None:
    frames = noise(2, 64, 64)
    assert not changes(frames).any()
    assert not changes(np.stack([frames, frames], 1)).any()


@pytest.mark.parametrize("grid", [(1, 17), (4, 2)])
def test_a_grid_that_is_not_square_is_refused(grid: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=f"{grid[0]} x {grid[1]}"):
        changes_for(grid, 5, "cpu")


def test_maps_of_other_frameskips_and_grids_are_other_stores(changes: Encoder) -> None:
    for other, field in (
        (changes_for((14, 14), 4, "cpu"), "token_selection"),
        (changes_for((2, 2), 5, "cpu"), "image_size"),
    ):
        (difference,) = [
            words
            for words in changes.identity("data").differences(other.identity("data"))
            if not words.startswith("resize: ")  # which names the size too
        ]
        assert difference.startswith(f"{field}: ")


@pytest.mark.parametrize("cached", ["equal", "zeros", "others"])
def test_frames_without_change_drift_only_if_one_side_is_zero(changes: Encoder, cached: str) -> None:
    pairs = noise(3, 2, 196, 196)
    pairs[2, 1] = pairs[2, 0]  # whose tokens are zeros: a cosine is not defined
    known = changes(pairs).numpy()
    if cached == "zeros":
        known[1] = 0
    elif cached == "others":
        pairs[1, 1] = pairs[1, 0]
    found = changes.drift(pairs, known)
    if cached == "equal":
        assert found["cosine"] == pytest.approx(1, abs=1e-5)
        assert found["relative_error"] == 0
    else:
        assert found["cosine"] == 0
        assert found["relative_error"] >= 1
