"""Latents whose disentanglement is known: the state itself, a rotation of it, and noise."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from wmcache.cache import TokenStore
from wmcache.pipeline.disentanglement import BINS, information_gaps, information_shares, measure_information

from ..conftest import CARD, IDENTITY, episodes_of, write_tokens

FRAMES = 4000
STATE = np.random.default_rng(0).uniform(-1, 1, (FRAMES, 2))
ROTATION = np.array([[1, 1], [-1, 1]]) / math.sqrt(2)


def slow_share(channel: NDArray[Any], column: NDArray[Any]) -> float:
    """Sum p log(p / q) over pairs of bins, divided by the entropy of the column."""
    pairs = list(zip(*(slow_bins(values.tolist()) for values in (channel, column)), strict=True))
    joint, first, second = Counter(pairs), Counter(x for x, _ in pairs), Counter(y for _, y in pairs)
    n = len(pairs)
    known = sum(k / n * math.log(k * n / (first[x] * second[y])) for (x, y), k in joint.items())
    return known / -sum(k / n * math.log(k / n) for k in second.values())


def slow_bins(values: list[float]) -> list[int]:
    low, high = min(values), max(values)
    return [min(BINS - 1, int((value - low) / (high - low) * BINS)) for value in values]


def test_shares_are_those_of_the_definition_and_invariant_to_scale_and_sign() -> None:
    rng = np.random.default_rng(1)
    state = np.concatenate([rng.normal(size=(500, 2)), rng.integers(0, 3, (500, 1))], 1)
    latents = np.concatenate([state @ rng.normal(size=(3, 3)), rng.normal(size=(500, 2)), state[:, :1] ** 2], 1)
    shares = information_shares(latents, state)
    expected = [[slow_share(channel, column) for column in state.T] for channel in latents.T]
    np.testing.assert_allclose(shares, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(information_shares(-4 * latents, state), shares, rtol=1e-9, atol=1e-12)
    ranked = [sorted(column) for column in zip(*expected, strict=True)]
    assert information_gaps(shares) == pytest.approx([column[-1] - column[-2] for column in ranked])


def test_gaps_are_large_for_the_state_and_small_for_a_rotation_and_for_noise() -> None:
    gaps = [information_gaps(information_shares(latents, STATE)) for latents in (STATE, STATE @ ROTATION)]
    assert min(gaps[0]) > 0.95
    assert max(gaps[1]) < 0.05
    noise = np.random.default_rng(2).normal(size=(FRAMES, 8))
    shares = information_shares(noise, STATE)
    assert shares.shape == (8, 2)
    assert 0 <= shares.min() <= shares.max() < 0.05


def test_a_constant_channel_knows_nothing_and_a_constant_column_has_no_gap() -> None:
    state = np.concatenate([STATE, np.full((FRAMES, 1), 3.0)], 1)
    shares = information_shares(np.concatenate([STATE, np.full((FRAMES, 1), 7.0)], 1), state)
    np.testing.assert_allclose(shares[2, :2], 0, atol=1e-12)
    assert np.isnan(shares[:, 2]).all()
    assert information_gaps(shares)[2] is None


@pytest.mark.parametrize(("tokens", "known"), [(1, True), (2, False)])
def test_only_stores_of_one_token_are_measured(tmp_path: Path, tokens: int, known: bool) -> None:
    card = dataclasses.replace(CARD, token_grid=(1, tokens), frames_per_shard=1000)
    steps = {
        "action": np.zeros((FRAMES, 2), np.float32),
        "state": np.tile(STATE, 2),
        **episodes_of([40] * (FRAMES // 40)),
    }
    values = np.repeat(STATE[:, None], tokens, 1)
    found = measure_information(TokenStore.open(write_tokens(tmp_path / "s.zarr", values, card, IDENTITY, steps)))
    assert (found is not None) == known
    if found is not None:
        exact = information_shares(STATE.astype(np.float16).astype(np.float64), np.tile(STATE, 2))
        np.testing.assert_array_equal(found, exact)
