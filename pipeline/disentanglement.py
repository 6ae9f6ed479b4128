"""How disentangled the latents of a store are: what each channel knows of each column of the state."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import entropy

from wmcache.cache.store import TokenStore

BINS = 20
"""Of equal width from the smallest to the largest value, for channels and for state columns, as in disentanglement_lib."""
MEASURED_FRAMES = 10_000

Float = NDArray[np.float64]


def measure_information(store: TokenStore) -> Float | None:
    """Estimate the mutual information of each channel and each state column from frames evenly spaced over a store.

    Returns:
        [D, S], as shares of the columns' entropies, see `information_shares`; None where frames have several tokens or no state.
    """
    tokens, _ = store.card.frame_shape
    if tokens > 1 or store.state is None or not store.state.shape[1]:
        return None
    frames = np.unique(np.linspace(0, len(store) - 1, MEASURED_FRAMES).astype(np.int64))
    return information_shares(store.gather(frames)[:, 0].astype(np.float64), store.state[frames])


def information_shares(latents: Float, state: Float) -> Float:
    """Estimate mutual information by histograms: channels [n, D], state [n, S] -> [D, S].

    Each is a share of the entropy of the column: 0 if the channel knows nothing of it, 1 if it determines the column's bin. NaN for a
    constant column. Few frames make all shares too large, by about (BINS - 1)^2 / 2n nats.
    """
    channels, columns = _discretise(latents), _discretise(state)
    shares = np.full((channels.shape[1], columns.shape[1]), np.nan)
    alone = entropy(_counts(channels, BINS), axis=1)
    for number, column in enumerate(columns.T):
        if whole := float(entropy(np.bincount(column))):
            both = entropy(_counts(BINS * channels + column[:, None], BINS * BINS), axis=1)
            shares[:, number] = (alone + whole - both) / whole
    return shares


def information_gaps(shares: Float) -> list[float | None]:
    """Compute the mutual information gap of each column (arXiv 1802.04942, equation 6) from shares [D, S] of two channels or more.

    It is the share of the most informative channel minus that of the next: 1 if one channel knows all of the column and the others
    nothing. None for a constant column.
    """
    ranked = np.sort(shares, axis=0)
    return [None if np.isnan(gap) else float(gap) for gap in ranked[-1] - ranked[-2]]


def _discretise(values: Float) -> NDArray[np.int64]:
    # [n, k] -> numbers of bins from 0.
    edges = [np.histogram_bin_edges(column, BINS)[1:-1] for column in values.T]
    found = [np.digitize(column, inner) for column, inner in zip(values.T, edges, strict=True)]
    return np.stack(found, 1) if found else np.zeros(values.shape, np.int64)


def _counts(bins: NDArray[np.int64], number: int) -> NDArray[np.int64]:
    return np.stack([np.bincount(column, minlength=number) for column in bins.T])
