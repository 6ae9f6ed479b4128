"""Tokens in a byte: never further from the truth than half a step, and never the value that means "missing"."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from wmcache.cache import Identity, StoreWriter, TokenStore
from wmcache.cache.quantise import LEVELS, dequantise, quantise
from wmcache.common.errors import UserError

Tokens = NDArray[np.float16]

LARGEST = float(np.finfo(np.float16).max)
SMALLEST = float(np.finfo(np.float16).smallest_subnormal)
ROUNDING = 1 + 1e-4
"""What float32 arithmetic may add to half a step."""

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
def test_every_value_comes_back_within_half_a_step(tokens: Tokens) -> None:
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
    # float16 is itself a grid: where it is the coarser one, rounding to it gives back the very value.
    grid = np.exp2(np.where(truth == 0, -24, np.maximum(np.frexp(truth)[1] - 11, -24)))
    error = np.abs(found.astype(np.float64) - truth)
    assert (error <= scale / 2 * ROUNDING + grid / 2).all()
    assert (error[np.broadcast_to(scale, tokens.shape) < grid / 2] == 0).all()


@given(value=st.floats(width=16, allow_nan=False, allow_infinity=False), frames=st.integers(1, 40))
@example(value=0.0, frames=17)
@example(value=LARGEST, frames=1)
@example(value=-LARGEST, frames=33)
def test_a_constant_channel_comes_back_exactly(value: float, frames: int) -> None:
    tokens = np.full((frames, 2, 3), value, np.float16)
    tokens[:, :, 1] = 5  # its neighbour has a middle of its own
    stored, scale, middle = quantise(tokens)
    assert not stored.any()
    np.testing.assert_array_equal(dequantise(stored, per_frame(scale, frames), per_frame(middle, frames)), tokens)


def test_the_ends_of_a_channel_are_the_ends_of_the_scale() -> None:
    stored, scale, middle = quantise(column(-3, 7, 2, 4.5))
    assert stored.ravel().tolist() == [-127, 127, 0, 64]
    assert scale == pytest.approx(10 / 254)
    assert middle == pytest.approx(2)


def test_channels_share_nothing() -> None:
    rng = np.random.default_rng(0)
    one, other = (rng.normal(0, spread, (20, 3, 1)).astype(np.float16) for spread in (1, 1000))
    together = quantise(np.concatenate([one, other], axis=2))
    for channel, alone in enumerate((quantise(one), quantise(other))):
        for ours, theirs in zip(together, alone, strict=True):
            np.testing.assert_array_equal(ours[..., channel], theirs[..., 0])


def test_every_frame_is_multiplied_by_its_own_scale() -> None:
    stored = np.full((40, 2, 1), 2, np.int8)
    scale, middle = np.arange(40, dtype=np.float32)[:, None], np.full((40, 1), 0.5, np.float32)
    out = np.empty((40, 2, 1), np.float16)
    assert dequantise(stored, scale, middle, out) is out
    np.testing.assert_array_equal(out[:, 0, 0], 2 * np.arange(40) + 0.5)
    np.testing.assert_array_equal(out[:, 1], out[:, 0])


@pytest.fixture(scope="module")
def int8_path(
    tmp_path_factory: pytest.TempPathFactory,
    make_writer: Callable[..., StoreWriter],
    identity: Identity,
    tokens: Tokens,
) -> Path:
    """50 frames in shards of 16, 16, 16 and 2, one shard of zeros; read only."""
    folder = tmp_path_factory.mktemp("int8")
    like = TokenStore.open(make_writer(folder / "float16.zarr").path, allow_incomplete=True)
    card = dataclasses.replace(like.card, dtype="int8")
    steps = {name: getattr(like, name) for name in ("action", "state", "episode", "step")}
    writer = StoreWriter.create(folder / "int8.zarr", card, dataclasses.replace(identity, store_dtype="int8"), steps)
    for shard in writer.pending():
        rows = card.shard_frames(shard)
        writer.write_shard(shard, tokens[rows.start : rows.stop])
    writer.finish()
    return writer.path


@pytest.fixture(scope="module")
def int8_store(int8_path: Path) -> TokenStore:
    return TokenStore.open(int8_path)


def test_a_store_gives_the_dequantised_tokens(int8_store: TokenStore, tokens: Tokens) -> None:
    parts = []
    for shard in range(4):
        rows = int8_store.card.shard_frames(shard)
        stored, scale, middle = quantise(tokens[rows.start : rows.stop])
        parts.append(dequantise(stored, per_frame(scale, len(rows)), per_frame(middle, len(rows))))
    expected = np.concatenate(parts)
    assert np.abs(expected.astype(float) - tokens).max() < 0.1
    np.testing.assert_array_equal(int8_store.gather(np.arange(50)), expected)
    frames = np.random.default_rng(0).integers(0, 50, 70)
    out = np.full((70, 6, 4), np.nan, np.float16)
    assert int8_store.gather(frames, out) is out
    np.testing.assert_array_equal(out, expected[frames])
    assert int8_store.gather(frames[:0]).shape == (0, 6, 4)


def test_what_is_stored_can_be_had_as_it_is(int8_store: TokenStore, tokens: Tokens) -> None:
    expected = np.concatenate([quantise(tokens[start : start + 16])[0] for start in (0, 16, 32, 48)])
    frames = np.array([49, 0, 47, 0])
    found = int8_store.gather_stored(frames)
    assert found.dtype == np.int8
    np.testing.assert_array_equal(found, expected[frames])
    assert int8_store.scale is not None
    scale, middle = int8_store.scale[frames // 16, 0], int8_store.scale[frames // 16, 1]
    np.testing.assert_array_equal(dequantise(found, scale, middle), int8_store.gather(frames))


def test_mean_and_std_are_those_of_the_tokens_and_not_of_the_bytes(int8_store: TokenStore, tokens: Tokens) -> None:
    np.testing.assert_allclose(int8_store.mean, tokens.astype(np.float64).mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(int8_store.std, tokens.astype(np.float64).std((0, 1)), rtol=1e-5)


def test_a_store_of_bytes_takes_half_the_room(int8_store: TokenStore, tokens: Tokens) -> None:
    assert int8_store.card.token_bytes == tokens.nbytes // 2


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(int8_store: TokenStore, tmp_path: Path, value: float) -> None:
    steps = {name: getattr(int8_store, name) for name in ("action", "state", "episode", "step")}
    writer = StoreWriter.create(tmp_path / "some.zarr", int8_store.card, int8_store.identity, steps)
    tokens = np.zeros((16, 6, 4), np.float16)
    tokens[3, 5, 3] = value
    with pytest.raises(UserError, match="frame 19;"):
        writer.write_shard(1, tokens)
    assert writer.pending() == [0, 1, 2, 3]


def test_an_incomplete_store_of_bytes_says_that_it_has_to_be_finished(int8_store: TokenStore, tmp_path: Path) -> None:
    # What its steps are worth becomes a column when it is finished, and not before.
    steps = {name: getattr(int8_store, name) for name in ("action", "state", "episode", "step")}
    writer = StoreWriter.create(tmp_path / "some.zarr", int8_store.card, int8_store.identity, steps)
    for allowed in (False, True):
        with pytest.raises(UserError, match=r"some\.zarr .*complete; finish it by running its wmcache extract again"):
            TokenStore.open(writer.path, allow_incomplete=allowed)


def test_a_missing_frame_is_no_value(int8_path: Path, int8_store: TokenStore) -> None:
    array = zarr.open_group(int8_path, mode="r")["tokens"]
    assert isinstance(array, zarr.Array)
    assert array.fill_value == -128
    assert int8_store.gather_stored(np.arange(50)).min() > -128
