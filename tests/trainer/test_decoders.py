"""The decoders: the sizes of the reference, any grid and image size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from wmcache.common.errors import UserError
from wmcache.trainer.decoders import Decoder, DecoderShape, build_decoder
from wmcache.trainer.decoders.vqvae import VqVaeDecoder

SMALL: dict[str, dict[str, Any]] = {
    "vqvae": {"channels": 8, "residual": 4, "blocks": 1},
    "transposed-conv": {"depth": 2},
}
REFERENCE = DecoderShape(14, 14, 384, 224)


def make(name: str, shape: DecoderShape, **options: Any) -> Decoder:
    size = shape.image_size
    statistics = {
        "tokens_mean": torch.zeros(shape.token_dim),
        "tokens_std": torch.ones(shape.token_dim),
        "images_mean": torch.zeros(3, size, size),
    }
    torch.manual_seed(0)
    return build_decoder(name, shape, options, statistics)


def layers(module: nn.Module, kind: type[nn.Module]) -> list[tuple[int, int]]:
    """Channels in and out of each layer of a kind, in order."""
    found = (part for part in module.modules() if type(part) is kind)
    return [(int(part.in_channels), int(part.out_channels)) for part in found]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("rows", "columns", "image_size"), [(1, 1, 32), (2, 2, 30), (2, 3, 32)])
def test_any_grid_becomes_an_image_of_the_size_of_the_frames(
    name: str, rows: int, columns: int, image_size: int
) -> None:
    model = make(name, DecoderShape(rows, columns, 5, image_size), **SMALL[name])
    assert model(torch.randn(3, rows * columns, 5).half()).shape == (3, 3, image_size, image_size)


def test_decoders_have_the_sizes_of_the_reference() -> None:
    with torch.device("meta"):
        patches, lone = make("vqvae", REFERENCE), make("transposed-conv", DecoderShape(1, 1, 384, 224))
        assert isinstance(patches, VqVaeDecoder)
        middle = patches.first(torch.empty(1, 384, 14, 14))
        assert (middle.shape, patches.second(middle).shape) == ((1, 384, 56, 56), (1, 3, 224, 224))
        assert lone.draw(torch.empty(1, 1, 384))[0].shape == (1, 3, 243, 243)
    assert layers(patches, nn.Conv2d) == 2 * [(384, 384), *4 * [(384, 128), (128, 384)]]
    assert layers(patches, nn.ConvTranspose2d) == [(384, 192), (192, 384), (384, 192), (192, 3)]
    (project,) = (part for part in lone.modules() if isinstance(part, nn.Linear))
    assert (project.in_features, project.out_features) == (384, 2048)
    assert layers(lone, nn.ConvTranspose2d) == [(2048, 512), (512, 256), (256, 128), (128, 64), (64, 3)]


def test_the_patch_decoder_draws_a_token_at_its_position() -> None:
    model = make("vqvae", DecoderShape(12, 16, 3, 128), **SMALL["vqvae"])
    tokens = torch.zeros(1, 12 * 16, 3)
    moved = tokens.clone()
    moved[0, 16 * 5 + 9] = 1
    changed = (model.draw(moved)[0] - model.draw(tokens)[0]).abs().sum((0, 1)).nonzero()
    middle = (changed.min(0).values + changed.max(0).values) / 2
    torch.testing.assert_close(middle, 16 * torch.tensor([5.5, 9.5]), atol=8, rtol=0)


@pytest.mark.parametrize("name", SMALL)
def test_a_few_frames_are_memorised(name: str) -> None:
    torch.manual_seed(0)
    tokens, images = torch.randn(4, 4, 6), torch.full((4, 3, 32, 32), -0.5)
    for i, image in enumerate(images):
        image[:, 8 * i : 8 * i + 8, 12:20] = 0.5  # a square at another position in each
    model = make(name, DecoderShape(2, 2, 6, 32), **{"vqvae": {"channels": 32}, "transposed-conv": {"depth": 8}}[name])
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(200):
        optimiser.zero_grad()
        model.loss(tokens, images)["loss"].backward()
        optimiser.step()
    error = model.loss(tokens, images)["mse"].item()
    assert error < 0.1 * images.var().item()
    assert model.loss(tokens.flip(0), images)["mse"].item() > 5 * error


@pytest.mark.parametrize("name", SMALL)
def test_no_gradient_flows_back_into_the_tokens(name: str) -> None:
    model = make(name, DecoderShape(2, 2, 3, 32), **SMALL[name])
    weight = torch.ones((), requires_grad=True)
    model.loss(weight * torch.randn(2, 4, 3), torch.zeros(2, 3, 32, 32))["loss"].backward()
    assert weight.grad is None
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_tokens_are_standardised_and_the_mean_frame_is_added() -> None:
    shape, mean, std = DecoderShape(2, 2, 3, 32), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 1.0, 2.0])
    plain = make("vqvae", shape, **SMALL["vqvae"])
    statistics = {"tokens_mean": mean, "tokens_std": std, "images_mean": torch.full((3, 32, 32), 0.25)}
    other = build_decoder("vqvae", shape, SMALL["vqvae"], statistics)
    other.load_state_dict({**plain.state_dict(), **statistics})
    tokens = torch.randn(2, 4, 3)
    torch.testing.assert_close(other(tokens * std + mean), plain(tokens) + 0.25)


def test_commitment_is_a_part_of_the_loss() -> None:
    model = make("vqvae", DecoderShape(2, 2, 3, 32), **SMALL["vqvae"], quantize=True, codes=2, commitment=0.25)
    tokens, images = torch.randn(4, 4, 3), torch.zeros(4, 3, 32, 32)
    assert isinstance(model, VqVaeDecoder)
    assert model.codebook is not None
    model(tokens)
    model.eval()
    losses = model.loss(tokens, images)
    torch.testing.assert_close(losses["loss"] - losses["mse"], 0.25 * model.codebook(tokens)[1])


def test_unknown_decoders_and_options_are_refused_by_name() -> None:
    with pytest.raises(UserError, match="'gan'"):
        make("gan", REFERENCE)
    with pytest.raises(UserError, match="depth"):
        make("vqvae", REFERENCE, depth=3)
