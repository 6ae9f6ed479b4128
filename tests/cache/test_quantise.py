"""Quantised tokens are at most half a step from the original, and never the value that means "missing"."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from wmcache.cache import TokenStore
from wmcache.cache.quantise import LEVELS, dequantise, quantise
from wmcache.common.errors import UserError

from ..conftest import TOKENS, make_writer, write

Tokens = NDArray[np.float16]

LARGEST = float(np.finfo(np.float16).max)
SMALLEST = float(np.finfo(np.float16).smallest_subnormal)
ROUNDING = 1 + 1e-4
"""Error of float32 arithmetic beyond half a step."""

any_tokens = st.tuples(st.integers(1, 40), st.integers(1, 3), st.integers(1, 4)).flatmap(
    lambda shape: arrays.arrays(np.float16, shape, elements=st.floats(width=16, allow_nan=False, allow_infinity=False))
)


def column(*values: float) -> Tokens:
    return np.array(values, np.float16).reshape(-1, 1, 1)


def per_frame(values: NDArray[np.float32], frames: int) -> NDArray[np.float32]:
    return np.broadcast_to(values, (frames, len(values)))


@settings(max_examples=200)
@given(tokens=any_tokens)
@example(tokens=column(LARGEST, -LARGEST, 0, 1, -SMALLEST))
@example(tokens=column(LARGEST, SMALLEST))
@example(tokens=column(LARGEST, LARGEST - 32, LARGEST - 64))
@example(tokens=column(SMALLEST, 0, 2 * SMALLEST))
@example(tokens=column(0, -0.01563, 0.03125))
@example(tokens=column(*np.linspace(-1, 1, 255)))
def test_every_value_is_within_half_a_step(tokens: Tokens) -> None:
    stored, scale, middle = quantise(tokens)
    assert (stored.dtype, stored.shape) == (np.int8, tokens.shape)
    assert scale.dtype == middle.dtype == np.float32
    assert scale.shape == middle.shape == tokens.shape[-1:]
    assert stored.min() >= -LEVELS
    assert (scale > 0).all()
    truth = tokens.astype(np.float64)
    exact = stored * scale.astype(np.float64) + middle
    assert (np.abs(exact - truth) <= scale / 2 * ROUNDING).all()
    found = dequantise(stored, per_frame(scale, len(tokens)), per_frame(middle, len(tokens)))
    assert (found.dtype, found.shape) == (np.float16, tokens.shape)
    # Where the float16 grid is coarser than the step, rounding to it returns the original.
    grid = np.exp2(np.where(truth == 0, -24, np.maximum(np.frexp(truth)[1] - 11, -24)))
    error = np.abs(found.astype(np.float64) - truth)
    assert (error <= scale / 2 * ROUNDING + grid / 2).all()
    assert (error[np.broadcast_to(scale, tokens.shape) < grid / 2] == 0).all()


@given(value=st.floats(width=16, allow_nan=False, allow_infinity=False), frames=st.integers(1, 40))
@example(value=0.0, frames=17)
@example(value=LARGEST, frames=1)
@example(value=-LARGEST, frames=33)
def test_a_constant_channel_is_exact(value: float, frames: int) -> None:
    tokens = np.full((frames, 2, 3), value, np.float16)
    tokens[:, :, 1] = 5
    stored, scale, middle = quantise(tokens)
    assert not stored.any()
    np.testing.assert_array_equal(dequantise(stored, per_frame(scale, frames), per_frame(middle, frames)), tokens)


def test_a_channel_uses_the_whole_range() -> None:
    stored, scale, middle = quantise(column(-3, 7, 2, 4.5))
    assert stored.ravel().tolist() == [-127, 127, 0, 64]
    assert scale == pytest.approx(10 / 254)
    assert middle == pytest.approx(2)


@pytest.fixture(scope="module")
def int8_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 frames in shards of 16, 16, 16 and 2, one shard of zeros; read-only."""
    path = tmp_path_factory.mktemp("int8") / "int8.zarr"
    write(make_writer(path, dtype="int8"))
    return path


@pytest.fixture(scope="module")
def int8_store(int8_path: Path) -> TokenStore:
    return TokenStore.open(int8_path)


def test_a_store_gives_the_dequantised_tokens(int8_store: TokenStore) -> None:
    parts = []
    for shard in range(4):
        rows = int8_store.card.shard_frames(shard)
        stored, scale, middle = quantise(TOKENS[rows.start : rows.stop])
        parts.append(dequantise(stored, per_frame(scale, len(rows)), per_frame(middle, len(rows))))
    expected = np.concatenate(parts)
    assert np.abs(expected.astype(float) - TOKENS).max() < 0.1
    np.testing.assert_array_equal(int8_store.gather(np.arange(50)), expected)
    frames = np.random.default_rng(0).integers(0, 50, 70)
    out = np.full((70, 6, 4), np.nan, np.float16)
    assert int8_store.gather(frames, out) is out
    np.testing.assert_array_equal(out, expected[frames])
    stored = int8_store.gather_stored(frames)
    assert (stored.dtype, stored.min() > -128) == (np.int8, True)
    assert int8_store.scale is not None
    scale, middle = np.moveaxis(int8_store.scale[frames // 16], 1, 0)
    np.testing.assert_array_equal(dequantise(stored, scale, middle), out)


def test_statistics_and_sizes_are_those_of_the_tokens(int8_path: Path, int8_store: TokenStore) -> None:
    np.testing.assert_allclose(int8_store.mean, TOKENS.astype(np.float64).mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(int8_store.std, TOKENS.astype(np.float64).std((0, 1)), rtol=1e-5)
    assert int8_store.card.token_bytes == TOKENS.nbytes // 2
    assert zarr.open_array(int8_path / "tokens", mode="r").fill_value == -128


@pytest.mark.parametrize("allowed", [False, True])
def test_an_incomplete_int8_store_cannot_be_read(tmp_path: Path, allowed: bool) -> None:
    # Scales become a column when the store is finished.
    make_writer(tmp_path / "some.zarr", dtype="int8")
    with pytest.raises(UserError, match=r"some\.zarr .*wmcache extract"):
        TokenStore.open(tmp_path / "some.zarr", allow_incomplete=allowed)
