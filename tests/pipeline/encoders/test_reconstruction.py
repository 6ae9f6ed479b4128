from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from wmcache.cache import TokenStore
from wmcache.pipeline.encoders.base import EARLY, LAST, Features
from wmcache.pipeline.encoders.fitting import (
    SAMPLED_FRAMES,
    FitData,
    PixelDecoder,
    Reconstruction,
    ReconstructionOptions,
    Standardise,
    TokenDecoder,
    patch_moments,
)
from wmcache.pipeline.fit import load_images
from wmcache.pipeline.frames import FrameDataset

MakeData = Callable[[TokenStore], FitData]


def test_channels_are_standardised_and_constant_ones_are_0(vit_layers: TokenStore, fit_data: MakeData) -> None:
    tokens = fit_data(vit_layers).features(np.arange(360)).patches(LAST)
    tokens[..., 3] = 7.0
    standardise = Standardise(192)
    standardise.fit_statistics((tokens.mean((0, 1)), tokens.flatten(0, 1).std(0)))
    seen = standardise(tokens).flatten(0, 1)
    usual = torch.arange(192) != 3
    torch.testing.assert_close(seen.mean(0), torch.zeros(192), atol=1e-2, rtol=0)
    torch.testing.assert_close(seen.std(0), usual.float(), atol=1e-2, rtol=0)


def test_statistics_ignore_class_and_register_tokens(vit_layers: TokenStore, fit_data: MakeData) -> None:
    data = fit_data(vit_layers)
    assert len(data) < SAMPLED_FRAMES
    patches = data.features(np.arange(len(data))).patches(EARLY).flatten(0, 1).double()

    def gather(rows: NDArray[np.integer]) -> Features:
        features = data.features(rows)
        layers = {name: values.clone() for name, values in features.layers.items()}
        layers[EARLY][:, : features.prefix] = 1e4
        return replace(features, layers=layers)

    mean, std = patch_moments(replace(data, gather=gather), (EARLY,), 0)[EARLY]
    torch.testing.assert_close(mean, patches.mean(0))
    torch.testing.assert_close(std, patches.std(0, correction=0))


def test_the_error_is_of_standardised_features_without_their_prefix(vit_layers: TokenStore, fit_data: MakeData) -> None:
    data = fit_data(vit_layers)
    reconstruction = Reconstruction(data, ReconstructionOptions(), 5, (EARLY, LAST))
    torch.nn.init.zeros_(reconstruction.decoder.leave[1].weight)
    torch.nn.init.zeros_(reconstruction.decoder.leave[1].bias)
    rows = np.arange(32)
    features = data.features(rows)
    moments = patch_moments(data, (EARLY, LAST), 0)
    parts = [(features.layers[layer][:, 1:] - mean) / std for layer, (mean, std) in moments.items()]
    torch.testing.assert_close(
        reconstruction(torch.randn(32, 16, 5), features, rows), torch.cat(parts, -1).square().mean().float()
    )


def test_the_error_of_pixels_is_of_the_difference_from_the_mean_frame(
    tcn_layers: TokenStore, dataset: FrameDataset, fit_data: MakeData
) -> None:
    data = fit_data(tcn_layers)
    images = load_images(dataset, np.arange(len(dataset.steps.episode)), data.preprocess)
    data = replace(data, images=images)
    reconstruction = Reconstruction(data, ReconstructionOptions(decoder="pixels"), 5, (EARLY, LAST))
    torch.nn.init.zeros_(reconstruction.decoder.last.weight)
    torch.nn.init.zeros_(reconstruction.decoder.last.bias)
    rows, seen = np.arange(32), images.float() / 127.5 - 1
    expected = (seen[:32] - seen.mean(0)).abs().mean()
    torch.testing.assert_close(reconstruction(torch.randn(32, 4, 5), data.features(rows), rows), expected)


def test_a_batch_has_each_frame_at_most_once_in_ascending_order(tcn_layers: TokenStore, fit_data: MakeData) -> None:
    rows = fit_data(tcn_layers).random_rows(100, np.random.default_rng(0))
    assert (np.diff(rows) > 0).all()
    assert rows[-1] < 360


@pytest.mark.parametrize(
    ("grid", "image_size", "scales"),
    [((14, 14), 196, 3), ((2, 2), 64, 4), ((1, 1), 64, 5), ((3, 2), 50, 4), ((8, 8), 8, 0)],
)
def test_any_grid_becomes_an_image_of_the_requested_size(grid: tuple[int, int], image_size: int, scales: int) -> None:
    decoder = PixelDecoder(grid, 5, image_size, width=16)
    assert decoder(torch.randn(2, grid[0] * grid[1], 5)).shape == (2, 3, image_size, image_size)
    assert len(decoder.scales) == scales


def test_the_mean_frame_is_added() -> None:
    decoder, images = PixelDecoder((2, 2), 5, 16, width=16), torch.randn(7, 3, 16, 16)
    tokens = torch.randn(2, 4, 5)
    drawn = decoder(tokens)
    decoder.fit_statistics(images)
    torch.testing.assert_close(decoder(tokens) - drawn, images.mean(0).expand(2, -1, -1, -1), atol=1e-6, rtol=0)
    assert "background" in decoder.state_dict()


def test_tokens_are_row_major_over_the_image() -> None:
    decoder = PixelDecoder((4, 4), 5, 64, width=16)
    # Without group norm, which sees the whole map, a token draws near its position.
    decoder.apply(
        lambda module: setattr(module, "forward", lambda maps: maps) if isinstance(module, torch.nn.GroupNorm) else None
    )
    tokens = torch.zeros(16, 16, 5)
    tokens[range(16), range(16)] = 1
    energy = (decoder(tokens) - decoder(torch.zeros(1, 16, 5))).square().sum(1)
    rows = (energy.sum(2) * torch.arange(64)).sum(1) / energy.sum((1, 2)) / 16
    columns = (energy.sum(1) * torch.arange(64)).sum(1) / energy.sum((1, 2)) / 16
    rows, columns = rows.view(4, 4), columns.view(4, 4)
    assert (rows.diff(dim=0) > 0).all()
    assert (columns.diff(dim=1) > 0).all()


def test_every_parameter_is_trained() -> None:
    for decoder in (PixelDecoder((2, 2), 5, 32, width=16), TokenDecoder(4, 5, 7, width=16)):
        decoder(torch.randn(2, 4, 5)).square().sum().backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in decoder.parameters())


def test_features_depend_on_the_position_of_latents() -> None:
    torch.manual_seed(0)
    decoder, latents = TokenDecoder(6, 4, 12, width=16), torch.randn(2, 6, 4)
    features = decoder(latents)
    assert features.shape == (2, 6, 12)
    assert not torch.allclose(decoder(latents.flip(1)).flip(1), features, atol=1e-3)
