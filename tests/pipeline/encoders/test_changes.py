from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from wmcache.common.errors import UserError
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.encoders.changes import LEAST_CHANGE, PATCH, changes_for

CELL = PATCH // 2


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
    return np.stack(
        [
            maps[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].reshape(-1, 4)
            for row in range(grid)
            for column in range(grid)
        ],
        1,
    )


def square_at(row: int, column: int) -> NDArray[np.uint8]:
    """A black frame whose one white square fills a cell of the 28 x 28."""
    frame = np.zeros((14 * PATCH, 14 * PATCH, 3), np.uint8)
    frame[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = 255
    return frame


# Cells of the map: before and after the move.
MOVES = [((0, 0), (27, 27)), ((6, 9), (7, 9)), ((13, 4), (13, 5)), ((20, 15), (11, 22))]


@pytest.mark.parametrize(("was", "is_now"), MOVES)
def test_a_square_that_moves_changes_the_cells_that_it_leaves_and_enters(
    changes: Encoder, was: tuple[int, int], is_now: tuple[int, int]
) -> None:
    cells = changes(np.stack([square_at(*was), square_at(*is_now)])[None])[0]
    assert cells.shape == (14 * 14, 4)
    expected = {(row // 2 * 14 + column // 2, row % 2 * 2 + column % 2) for row, column in (was, is_now)}
    assert {tuple(index) for index in (cells > LEAST_CHANGE).nonzero().tolist()} == expected
    assert {tuple(index) for index in cells.nonzero().tolist()} == expected
    # From black to white, or back, each of three channels changes by 2.
    assert cells.max().item() == pytest.approx(np.sqrt(12), rel=1e-3)


@pytest.mark.parametrize("grid", [1, 2, 5, 14, 16])
def test_a_cell_is_the_norm_over_channels_in_the_mean_over_its_pixels(grid: int) -> None:
    encoder = changes_for((grid, grid), 3, "cpu")
    assert (encoder.token_grid, encoder.token_dim, encoder.image_size) == ((grid, grid), 4, grid * PATCH)
    pairs = noise(2, 2, grid * PATCH, grid * PATCH)
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


def test_a_change_is_the_same_forwards_and_backwards(changes: Encoder) -> None:
    pairs = noise(2, 2, 64, 64)
    assert torch.equal(changes(pairs), changes(pairs[:, ::-1].copy()))


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
