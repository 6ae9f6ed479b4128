from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from wmcache.cache import TokenStore
from wmcache.common.errors import UserError
from wmcache.pipeline.encoders import Encoder, encode_together
from wmcache.pipeline.encoders.base import Features
from wmcache.pipeline.encoders.fitting import FitData
from wmcache.pipeline.encoders.straighten import StraightenFitting, StraightenOptions, curvature
from wmcache.pipeline.frames import FrameDataset

Fit = Callable[..., Encoder]
FEW = StraightenOptions(steps=3, batch=16, width=16, dim=8)


@pytest.mark.parametrize(("side", "grid"), [(0, (4, 4)), (1, (1, 1)), (2, (2, 2)), (9, (4, 4))])
def test_tokens_of_a_store_are_those_of_frames(
    vit_layers: TokenStore,
    dataset: FrameDataset,
    fitted: Fit,
    restored: Callable[..., Features],
    side: int,
    grid: tuple[int, int],
) -> None:
    options = StraightenOptions(**{**vars(FEW), "side": side})
    encoder = fitted(vit_layers, "straighten", options)
    assert (encoder.token_grid, encoder.token_dim) == (grid, 8)
    from_store = encoder.tokens(restored(vit_layers, 8))
    torch.testing.assert_close(
        from_store, encode_together([encoder], dataset.read_shard(0)[:8])[0], atol=2e-2, rtol=2e-2
    )


def test_distance_follows_a_path_that_features_fold(
    vit_layers: TokenStore, fit_data: Callable[[TokenStore], FitData]
) -> None:
    """Walks along a line, which the features show through waves that come back: their distance says little of that on the line."""
    rng = np.random.default_rng(0)
    episode, steps = np.repeat(np.arange(20), 50), 0.04 * np.arange(50)
    place = np.concatenate([start + (-1) ** k * steps for k, start in enumerate(rng.random(20))])
    waves = torch.from_numpy(
        np.sin(np.outer(place, 2 * np.pi * rng.uniform(1, 1.5, 192)) + rng.uniform(0, 6, 192))
    ).float()
    known = fit_data(vit_layers)

    def features(rows: np.ndarray) -> Features:
        return Features({"last": waves[rows][:, None].expand(-1, 17, -1)}, prefix=1)

    torch.manual_seed(0)
    options = StraightenOptions(batch=64, width=32, dim=8, side=1)
    fitting = StraightenFitting(replace(known, episode=episode, gather=features), options)
    optimiser = torch.optim.Adam(fitting.parameters(), 1e-3)
    for _ in range(150):
        optimiser.zero_grad()
        fitting.loss(fitting.rows(rng))["loss"].backward()
        optimiser.step()

    def correlation(tokens: torch.Tensor) -> float:
        apart = np.abs(np.subtract.outer(place, place))[np.triu_indices(len(place), 1)]
        return float(spearmanr(apart, torch.pdist(tokens.flatten(1))).statistic)

    with torch.no_grad():
        straight = correlation(fitting.kept(features(np.arange(len(place)))))
    assert straight > 0.5 > 0.2 > correlation(waves)


def test_curvature_is_that_of_angles() -> None:
    """90 degrees, straight on, back, and a frame that repeats, which has no direction."""
    paths = [[[0, 0], [1, 0], [1, 2]], [[0, 0], [1, 0], [3, 0]], [[0, 0], [1, 0], [0, 0]], [[0, 0], [0, 0], [1, 0]]]
    latents = torch.tensor(paths, dtype=torch.float64)
    torch.testing.assert_close(curvature(latents), torch.tensor((1.0 + 0.0 + 2.0) / 3, dtype=torch.float64))
    assert curvature(latents[3:]) == 0


def test_frames_in_a_row_are_of_one_episode(vit_layers: TokenStore, fit_data: Callable[[TokenStore], FitData]) -> None:
    data = fit_data(vit_layers)
    fitting = StraightenFitting(data, StraightenOptions(batch=64, width=16, curvature=1.0, stride=3))
    first, second, third, fourth = np.split(fitting.rows(np.random.default_rng(0)), 4)
    assert all((data.episode[rows] == data.episode[first]).all() for rows in (second, third, fourth))
    inside = first + 6 < np.searchsorted(data.episode, data.episode[first], side="right")
    assert inside.any()
    assert ((third - first)[inside] == 3).all()
    assert ((fourth - first)[inside] == 6).all()
    assert ((second - first) >= 1).all()
    assert ((second - first) <= 4).all()


def test_negatives_of_one_episode_are_the_frames_of_it(
    vit_layers: TokenStore, fit_data: Callable[[TokenStore], FitData]
) -> None:
    options = StraightenOptions(batch=64, width=16, dim=8, negatives="episode", spread=0.3)
    fitting = StraightenFitting(fit_data(vit_layers), options)
    rows = fitting.rows(np.random.default_rng(0))
    first = rows[:64]
    episodes = fitting.data.episode[first]
    assert len(np.unique(episodes)) == 2
    with torch.no_grad():
        tokens = fitting.kept(fitting.data.features(rows)).flatten(1)
        squared = torch.cdist(tokens[:64].double(), tokens[64:].double()).square()
        rows_of = [np.flatnonzero(episodes == episodes[i]) for i in range(64)]
        likelihoods = [
            [(-square[i, i]).exp() / (-square[i, rows_of[i]]).exp().sum() for i in range(64)]
            for square in (squared, squared.T)
        ]
        contrast = -torch.tensor(likelihoods).log().mean()
        apart = torch.cat([(squared[i, rows_of[i]] + 1e-2).sqrt() for i in range(64)]).mean()
        loss = fitting.loss(rows)["loss"].double()
    torch.testing.assert_close(loss, contrast - 0.3 * apart, atol=1e-3, rtol=1e-3)


def test_a_width_that_heads_cannot_share_is_refused(vit_layers: TokenStore, fitted: Fit) -> None:
    with pytest.raises(UserError, match="--width 30"):
        fitted(vit_layers, "straighten", StraightenOptions(steps=1, batch=8, width=30))
