from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from wmcache.cache import TokenStore
from wmcache.cache.windows import split_episodes
from wmcache.engine.codebook import nearest
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.encoders.base import LAST, Features
from wmcache.pipeline.encoders.dino_tok import (
    DinoTokFitting,
    DinoTokOptions,
    DinoTokVqOptions,
    DominantSubspace,
)
from wmcache.pipeline.encoders.fitting import FitData
from wmcache.pipeline.encoders.pca import principal_axes

Fit = Callable[..., Encoder]
Restore = Callable[[TokenStore, int], Features]
MakeData = Callable[[TokenStore], FitData]

TINY = DinoTokOptions(steps=2, batch=16, shallow=6)
TINY_VQ = DinoTokVqOptions(steps=2, batch=16, shallow=6, codes=24)


def test_meaning_is_the_bases_tokens_standardised(layers: TokenStore, fitted: Fit, restored: Restore) -> None:
    encoder, features = fitted(layers, "dino-tok", TINY), restored(layers, 32)
    patches, channels = features.patches(LAST).float(), features.layers[LAST].shape[2]
    train = np.flatnonzero(np.isin(layers.episode, split_episodes(6, "train", 42)))
    known = torch.from_numpy(layers.gather(train)[:, features.prefix :, -channels:]).double().flatten(0, 1)
    expected = (patches - known.mean(0)) / known.std(0, correction=0)
    tokens = encoder.tokens(features)
    torch.testing.assert_close(tokens[..., :channels].double(), expected, atol=1e-3, rtol=1e-3)
    assert tokens.shape[2] == channels + 6


def test_texture_has_mean_0_and_deviation_1_in_every_token(layers: TokenStore, fitted: Fit, restored: Restore) -> None:
    texture = fitted(layers, "dino-tok", TINY).tokens(restored(layers, 32))[..., -6:].float()
    torch.testing.assert_close(texture.mean(-1), torch.zeros(texture.shape[:2]), atol=2e-3, rtol=0)
    torch.testing.assert_close(texture.std(-1, correction=0), torch.ones(texture.shape[:2]), atol=2e-2, rtol=0)


@pytest.mark.parametrize("kind", [DinoTokOptions, DinoTokVqOptions])
def test_training_lowers_the_error(tcn_layers: TokenStore, fit_data: MakeData, kind: type[DinoTokOptions]) -> None:
    torch.manual_seed(0)
    fitting = DinoTokFitting(fit_data(tcn_layers), kind(batch=64))
    optimiser, rng, errors = torch.optim.Adam(fitting.parameters(), 3e-3), np.random.default_rng(0), []
    for _ in range(30):
        losses = fitting.loss(fitting.rows(rng))
        optimiser.zero_grad()
        losses["loss"].backward()
        optimiser.step()
        errors.append(losses["error"].item())
    assert errors[-1] < 0.6 * errors[0]
    # Gradients reach texture's adapter through its codes.
    assert all(parameter.grad.abs().sum() > 0 for parameter in fitting.kept.texture.parameters())


def test_quantised_tokens_are_codes(layers: TokenStore, fitted: Fit, restored: Restore) -> None:
    encoder, features = fitted(layers, "dino-tok-vq", TINY_VQ), restored(layers, 32)
    channels = features.layers[LAST].shape[2]
    meaning, texture = encoder.tokens(features).flatten(0, 1).split([channels, 6], 1)
    for part, branch in ((meaning, encoder.head.meaning), (texture, encoder.head.texture)):
        codes = {tuple(code) for code in branch.book.codes.half().tolist()}
        found = {tuple(token) for token in part.tolist()}
        assert found <= codes
        assert len(found) > 1


def test_codes_of_meaning_are_in_the_subspace_of_the_leading_components(tcn_layers: TokenStore, fitted: Fit) -> None:
    meaning = fitted(tcn_layers, "dino-tok-vq", TINY_VQ).head.meaning
    assert int(torch.linalg.matrix_rank(meaning.subspace.projection)) < 32
    torch.testing.assert_close(meaning.subspace(meaning.book.codes), meaning.book.codes, atol=1e-4, rtol=1e-4)


def test_a_subspace_explains_its_share_of_the_variance_with_the_fewest_axes() -> None:
    tokens = torch.randn(4000, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([4.0, 2.0, 1.0, 0.1])
    _, variances, axes = principal_axes([tokens])
    for share, rank in ((0.5, 1), (0.9, 2), (0.99, 3), (1.0, 4)):
        subspace = DominantSubspace(4)
        subspace.fit_statistics(variances, axes, share)
        kept = subspace(tokens)
        assert torch.linalg.matrix_rank(subspace.projection) == rank
        assert kept.var(0).sum() >= (share - 1e-3) * tokens.var(0).sum()
        torch.testing.assert_close(subspace(kept), kept, atol=1e-5, rtol=1e-5)


def test_after_a_fit_all_codes_are_in_use(tcn_layers: TokenStore, fitted: Fit, restored: Restore) -> None:
    options = DinoTokVqOptions(steps=30, batch=32, codes=16)
    head = fitted(tcn_layers, "dino-tok-vq", options).head
    features = restored(tcn_layers, 360)
    wide = type(features)({layer: values.float() for layer, values in features.layers.items()}, features.prefix)
    for branch in head.branches:
        assert len(nearest(branch(wide), branch.book.codes).unique()) >= 15
