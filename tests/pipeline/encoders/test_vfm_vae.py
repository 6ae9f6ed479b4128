from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.distributions import Normal, kl_divergence

from wmcache.cache import TokenStore
from wmcache.cache.windows import split_episodes
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.encoders.base import EARLY, LAST, MIDDLE, Features
from wmcache.pipeline.encoders.fitting import FitData
from wmcache.pipeline.encoders.vfm_vae import VfmVaeFitting, VfmVaeOptions, alignment_loss

Fit = Callable[..., Encoder]
Restore = Callable[[TokenStore, int], Features]
MakeData = Callable[[TokenStore], FitData]

TINY = VfmVaeOptions(steps=3, batch=16, latent=8)


def test_tokens_have_mean_0_and_deviation_1(tcn_layers: TokenStore, fitted: Fit) -> None:
    encoder = fitted(tcn_layers, "vfm-vae", VfmVaeOptions(steps=40, batch=64))
    train = np.flatnonzero(np.isin(tcn_layers.episode, split_episodes(6, "train", 42)))
    cached = torch.from_numpy(tcn_layers.gather(train))
    layers = dict(zip((EARLY, MIDDLE, LAST), cached.split([64, 64, 32], -1), strict=True))
    tokens = encoder.tokens(Features(layers, 0)).float().flatten(0, 1)
    torch.testing.assert_close(tokens.mean(0), torch.zeros(32), atol=0.2, rtol=0)
    torch.testing.assert_close(tokens.std(0), torch.ones(32), atol=0.2, rtol=0)


def test_the_divergence_is_that_of_gaussians_summed_over_a_frame(tcn_layers: TokenStore, fit_data: MakeData) -> None:
    fitting = VfmVaeFitting(fit_data(tcn_layers), TINY)
    rows = np.arange(16)
    losses = fitting.loss(rows)
    mean, logvar = fitting.kept.encode(fitting.data.features(rows))
    expected = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0)).sum((1, 2)).mean()
    torch.testing.assert_close(losses["kl"], expected)
    torch.testing.assert_close(losses["loss"], losses["error"] + 1e-6 * losses["kl"] + losses["align"])


def test_variances_cannot_run_away(tcn_layers: TokenStore, fit_data: MakeData) -> None:
    fitting = VfmVaeFitting(fit_data(tcn_layers), TINY)
    torch.nn.init.constant_(fitting.kept.moments[1].bias, 1e6)
    _, logvar = fitting.kept.encode(fitting.data.features(np.arange(4)))
    assert (logvar == 20).all()


def test_latents_with_the_features_angles_are_aligned(tcn_layers: TokenStore, restored: Restore) -> None:
    features = restored(tcn_layers, 16).patches(LAST).float()
    torch.testing.assert_close(alignment_loss(features, features, features), torch.zeros(()), atol=1e-6, rtol=0)
    turned = features @ torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))[0]
    # Turning keeps the angles between tokens, and a projection could turn it back; opposite features are as wrong as can be.
    torch.testing.assert_close(alignment_loss(turned, features, features), torch.zeros(()), atol=1e-5, rtol=0)
    torch.testing.assert_close(alignment_loss(features, -features, features), torch.tensor(2.0))
    assert alignment_loss(torch.randn(16, 4, 32), features, features) > 0.1


def test_descent_lowers_every_term(tcn_layers: TokenStore, fit_data: MakeData) -> None:
    torch.manual_seed(0)
    fitting = VfmVaeFitting(fit_data(tcn_layers), VfmVaeOptions(batch=64))
    optimiser, rng, losses = torch.optim.Adam(fitting.parameters(), 3e-3), np.random.default_rng(0), []
    for _ in range(25):
        losses.append(fitting.loss(fitting.rows(rng)))
        optimiser.zero_grad()
        losses[-1]["loss"].backward()
        optimiser.step()
    for term in ("error", "align"):
        assert losses[-1][term] < 0.8 * losses[0][term], term
