from __future__ import annotations

import pytest
import torch

from wmcache.pipeline.encoders.decoders import PixelDecoder, TokenDecoder


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


def test_a_pixel_decoder_learns_where_the_ball_is() -> None:
    torch.manual_seed(0)
    decoder, tokens = PixelDecoder((2, 2), 4, 16, width=16), torch.eye(4)[None].expand(4, -1, -1).clone()
    tokens *= torch.eye(4)[:, :, None]
    images = torch.zeros(4, 3, 16, 16)
    for i in range(4):
        images[i, :, 8 * (i // 2) + 3 : 8 * (i // 2) + 6, 8 * (i % 2) + 3 : 8 * (i % 2) + 6] = 1
    decoder.fit_statistics(images)
    optimiser = torch.optim.Adam(decoder.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = (decoder(tokens) - images).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    # Below what the mean frame alone leaves.
    assert losses[-1] < 0.2 * (images - images.mean(0)).square().mean()


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
