from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from wmcache.pipeline.encoders.changes import PATCH, changes_for

Noise = Callable[..., NDArray[np.uint8]]


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
def test_a_cell_is_the_norm_over_channels_in_the_mean_over_its_pixels(noise: Noise, grid: int) -> None:
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


def test_equal_frames_have_no_change_and_drift_only_if_the_other_side_has_one(noise: Noise) -> None:
    changes, pairs = changes_for((14, 14), 5, "cpu"), noise(3, 2, 196, 196)
    assert not changes(pairs[:, 0]).any()
    pairs[2, 1] = pairs[2, 0]  # whose tokens are zeros: a cosine is not defined
    known = changes(pairs).numpy()
    assert not known[2].any()
    found = changes.drift(pairs, known)
    assert found["cosine"] == pytest.approx(1, abs=1e-5)
    assert found["relative_error"] == 0
    still = pairs.copy()
    still[1, 1] = still[1, 0]
    for other in (changes.drift(still, known), changes.drift(pairs, changes(still).numpy())):
        assert other["cosine"] == 0
        assert other["relative_error"] >= 1
