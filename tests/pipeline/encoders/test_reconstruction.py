from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from wmcache.cache import TokenStore
from wmcache.pipeline.encoders.base import EARLY, LAST
from wmcache.pipeline.encoders.fitting import FitData
from wmcache.pipeline.encoders.reconstruction import Reconstruction, ReconstructionOptions, Standardise, random_rows
from wmcache.pipeline.fit import load_images
from wmcache.pipeline.frames import FrameDataset

MakeData = Callable[[TokenStore], FitData]


def test_channels_are_standardised_and_those_that_never_change_are_0(
    vit_layers: TokenStore, fit_data: MakeData
) -> None:
    data = fit_data(vit_layers)
    data.mean[LAST][3], data.std[LAST][3] = 7.0, 0.0
    standardise = Standardise(192)
    standardise.look_at(data, LAST)
    tokens = data.features(np.arange(len(data))).layers[LAST]
    tokens[..., 3] = 7.0
    seen = standardise(tokens).flatten(0, 1)
    usual = torch.arange(192) != 3
    torch.testing.assert_close(seen.mean(0), torch.zeros(192), atol=1e-2, rtol=0)
    torch.testing.assert_close(seen.std(0), usual.float(), atol=1e-2, rtol=0)


def test_features_are_judged_standardised_and_without_their_prefix(vit_layers: TokenStore, fit_data: MakeData) -> None:
    data = fit_data(vit_layers)
    reconstruction = Reconstruction(data, ReconstructionOptions(), 5, (EARLY, LAST))
    torch.nn.init.zeros_(reconstruction.decoder.leave[1].weight)
    torch.nn.init.zeros_(reconstruction.decoder.leave[1].bias)
    rows = np.arange(32)
    features = data.features(rows)
    parts = [(features.layers[layer][:, 1:] - data.mean[layer]) / data.std[layer] for layer in (EARLY, LAST)]
    torch.testing.assert_close(
        reconstruction(torch.randn(32, 16, 5), features, rows), torch.cat(parts, -1).square().mean()
    )


def test_pixels_are_judged_by_what_differs_from_the_mean_frame(
    tcn_layers: TokenStore, dataset: FrameDataset, fit_data: MakeData
) -> None:
    images = load_images(dataset, np.arange(len(dataset.steps.episode)), 64)
    data = replace(fit_data(tcn_layers), images=images)
    reconstruction = Reconstruction(data, ReconstructionOptions(decoder="pixels"), 5, (EARLY, LAST))
    torch.nn.init.zeros_(reconstruction.decoder.last.weight)
    torch.nn.init.zeros_(reconstruction.decoder.last.bias)
    rows, seen = np.arange(32), images.float() / 127.5 - 1
    expected = (seen[:32] - seen.mean(0)).abs().mean()
    torch.testing.assert_close(reconstruction(torch.randn(32, 4, 5), data.features(rows), rows), expected)


def test_a_batch_holds_each_frame_at_most_once_in_ascending_order(tcn_layers: TokenStore, fit_data: MakeData) -> None:
    rows = random_rows(fit_data(tcn_layers), 100, np.random.default_rng(0))
    assert (np.diff(rows) > 0).all()
    assert rows[-1] < 360
