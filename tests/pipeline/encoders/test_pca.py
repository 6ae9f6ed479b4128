from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from wmcache.cache import TokenStore
from wmcache.cache.windows import split_episodes
from wmcache.common.errors import UserError
from wmcache.pipeline.encoders import Encoder, FitOptions
from wmcache.pipeline.encoders.base import LAST, Features
from wmcache.pipeline.encoders.pca import PcaOptions, principal_axes

Fit = Callable[..., Encoder]
Restore = Callable[[TokenStore, int], Features]


def test_axes_are_those_of_a_singular_value_decomposition_up_to_sign() -> None:
    tokens = torch.randn(50, 7, 12, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 13) + 100
    mean, variances, axes = principal_axes(tokens.split(9))
    flat = tokens.double().flatten(0, 1).numpy()
    _, singular, expected = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    np.testing.assert_allclose(mean, flat.mean(0))
    np.testing.assert_allclose(variances, singular**2 / len(flat), rtol=1e-8)
    np.testing.assert_allclose((axes.numpy() * expected).sum(1).__abs__(), 1, rtol=1e-8)
    assert (variances.diff() <= 0).all()


def test_the_largest_entry_of_each_axis_is_positive() -> None:
    tokens = torch.randn(100, 8, generator=torch.Generator().manual_seed(1))
    _, _, axes = principal_axes([tokens])
    _, _, mirrored = principal_axes([-tokens])
    assert (axes.gather(1, axes.abs().argmax(1, keepdim=True)) > 0).all()
    torch.testing.assert_close(mirrored, axes)


def test_a_channel_that_never_changes_has_no_variance() -> None:
    tokens = torch.randn(100, 3, generator=torch.Generator().manual_seed(1))
    tokens[:, 1] = 1e4
    _, variances, axes = principal_axes([tokens])
    assert variances[-1] < 1e-6
    torch.testing.assert_close(axes[-1].abs(), torch.tensor([0, 1, 0]).double(), atol=1e-6, rtol=0)


def test_tokens_are_the_components_of_the_training_frames_patches(store: TokenStore, fitted: Fit) -> None:
    encoder = fitted(store, "pca", PcaOptions(dim=5))
    train = np.flatnonzero(np.isin(store.episode, split_episodes(6, "train", 42)))
    patches = torch.from_numpy(store.gather(train)).float()
    centred = patches - patches.flatten(0, 1).mean(0)
    tokens = encoder.head(Features({LAST: patches}, 0))
    _, _, expected = np.linalg.svd(centred.flatten(0, 1).numpy(), full_matrices=False)
    torch.testing.assert_close(tokens.abs(), (centred @ torch.from_numpy(expected[:5]).T).abs(), atol=1e-3, rtol=1e-3)
    assert encoder.frame_shape == (4, 5)
    assert (tokens.flatten(0, 1).var(0).diff() <= 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [(PcaOptions(dim=33), "--dim is 33.* 32"), (PcaOptions(steps=10), "--steps is 10.*pca")],
)
def test_options_that_do_not_fit_the_store_are_refused(
    store: TokenStore, fitted: Fit, options: FitOptions, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        fitted(store, "pca", options)
